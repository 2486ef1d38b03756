"""Blocks that start as the identity: the last norm's scale at zero instead of one.

Claim: it helps early training, most of all of deep networks and large batches (Goyal et al. 2017,
section 5.1). ResNet-20 and 56 on CIFAR-10, the recipe of experiments.cifar10_resnet, so batches of
128, at which little is expected.

Command: python -m experiments.ablations.zero_init --data.data-dir DIR --seeds 3
Hardware: not run here; meant for one GPU.
Published: ResNet-50 on ImageNet, about 0.2 points of top-1 error less with batches of 256, about
0.4 with 8,192 (Goyal et al. 2017, table 2b).
"""

from experiments import cifar10_resnet
from flax_resnet import TrainConfig, cifar_resnet, grid
from flax_resnet.cli.experiment import ablate

DEPTHS = (20, 56)
BASELINE = {f"zero{depth}": f"one{depth}" for depth in DEPTHS}


def get_base() -> TrainConfig:
    """ResNet-20 by the paper's recipe."""
    return cifar10_resnet.get_config(20)


def get_grid(base: TrainConfig, seeds: int) -> dict[str, TrainConfig]:
    """The last scale at one and at zero, at each depth."""
    variants = {
        f"{name}{depth}": {
            "model.zero_init_last": zero,
            "model.stage_sizes": cifar_resnet(depth).stage_sizes,
        }
        for depth in DEPTHS
        for name, zero in (("one", False), ("zero", True))
    }
    return grid(base, {"": variants}, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, "runs/ablations/zero_init", baseline=BASELINE)
