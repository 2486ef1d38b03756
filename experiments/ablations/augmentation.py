"""Augmentation one by one: the CIFAR-10 tutorial's network with none, each alone, and all.

Claim: with y = f(x) + x the network fits the training images; what it then lacks is more of them,
which rotations, shifts and flips stand in for: a higher training error and a lower test error.

Command: python -m experiments.ablations.augmentation --data.data-dir DIR
Reduced, for a CPU: --model.num-filters 8 --data.image-size 16 --data.train-split 'train[:4%]'
    --num-epochs 40
Hardware: reduced on a 2-core CPU (experiments/README.md); at full size not run here, meant for one
GPU.
Published: none (the tutorial prints no figure).
"""

from collections.abc import Mapping

from experiments import cifar10_mini
from flax_resnet import Augment, TrainConfig, grid
from flax_resnet.cli.experiment import ablate

BASELINE = "none"


def get_base() -> TrainConfig:
    """experiments.cifar10_mini."""
    return cifar10_mini.get_config()


def get_grid(base: TrainConfig, seeds: int) -> Mapping[str, TrainConfig]:
    """None, the base's rotation, shifts and flips each alone, and all of the base's."""
    full = base.augment
    parts = {
        "none": Augment(),
        "rotation": Augment(rotation=full.rotation),
        "shifts": Augment(width_shift=full.width_shift, height_shift=full.height_shift),
        "flips": Augment(flip=full.flip),
        "all": full,
    }
    return grid(base, {"augment": parts}, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, workdir="runs/ablations/augmentation", baseline=BASELINE)
