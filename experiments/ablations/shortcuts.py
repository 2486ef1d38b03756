"""Shortcuts where the shape changes: zeros (A), projections there (B), projections everywhere (C).

Claim: C does a little better than B and B than A; He et al. (2016, section 4.1) put that down to
the parameters which projections add, and keep A or B. ResNet-20 on CIFAR-10, the recipe of
experiments.cifar10_resnet.

Command: python -m experiments.ablations.shortcuts --data.data-dir DIR --seeds 3
Hardware: not run here; meant for one GPU.
Published: on ImageNet, 34 layers, ten crops, top-1 error A 25.03, B 24.52, C 24.19 % (table 3).
"""

from experiments import cifar10_resnet
from flax_resnet import TrainConfig, grid
from flax_resnet.cli.experiment import ablate

BASELINE = "shortcut=A"


def get_base() -> TrainConfig:
    """ResNet-20 by the paper's recipe."""
    return cifar10_resnet.get_config(20)


def get_grid(base: TrainConfig, seeds: int) -> dict[str, TrainConfig]:
    """The paper's three shortcuts."""
    return grid(base, {"model.shortcut": ("A", "B", "C")}, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, "runs/ablations/shortcuts", baseline=BASELINE)
