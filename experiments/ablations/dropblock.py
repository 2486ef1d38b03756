"""DropBlock's rate, and whether it rises over the run, on a part of CIFAR-100's training images.

Claim: a rate that rises from 0 does better than one held throughout (Ghiasi et al. 2018, section
3). The network and recipe of experiments.cifar100_dropblock, trained on nine tenths of the training
images and measured on the last tenth: the rate is tuned here, so the test images are not looked at.

Command: python -m experiments.ablations.dropblock --data.data-dir DIR --seeds 3
Hardware: not run here; meant for one GPU, with --model.dtype bfloat16.
Published: ResNet-50 on ImageNet, top-1 76.51 without and 78.13 % with DropBlock, keep probability
0.9 (Ghiasi et al. 2018, table 1).
"""

import dataclasses

from experiments import cifar100_dropblock
from flax_resnet import TrainConfig, grid
from flax_resnet.cli.experiment import ablate

RATES = (0.1, 0.2, 0.3)
# A rate held throughout against none, one that rises against the same held.
BASELINE = {f"dropblock_rate={r},dropblock_rise=0.0": "dropblock_rate=0.0" for r in RATES} | {
    f"dropblock_rate={r},dropblock_rise=1.0": f"dropblock_rate={r},dropblock_rise=0.0"
    for r in RATES
}


def get_base() -> TrainConfig:
    """The tutorial's recipe, evaluated on training images held out."""
    config = cifar100_dropblock.get_config()
    data = dataclasses.replace(config.data, train_split="train[:90%]", eval_split="train[90%:]")
    return dataclasses.replace(config, data=data, dropblock_rise=0.0)


def get_grid(base: TrainConfig, seeds: int) -> dict[str, TrainConfig]:
    """No DropBlock, and three rates, throughout and rising over the whole run."""
    none = grid(base, {"model.dropblock_rate": (0.0,)}, seeds)
    axes = {"model.dropblock_rate": RATES, "dropblock_rise": (0.0, 1.0)}
    return none | grid(base, axes, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, "runs/ablations/dropblock", baseline=BASELINE)
