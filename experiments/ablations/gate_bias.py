"""Where a highway network's gates start, each start with the learning rate that suits it.

Claim: a negative bias, which lets the input through at first, trains deep highway networks
(Srivastava et al. 2015, section 2.2), and He et al. (2016b, section 3.1) find the result to hang on
it. A bias scales what a block adds, so one learning rate for all would favour the bias it was
chosen for. Here each bias is trained at three rates, 32 layers on nine tenths of CIFAR-10's
training images, measured on the last tenth. To read the table: of each bias take the rate with the
least mean error, then compare biases at their own rates. Those minima are over three rates each, so
a little too good, alike for all. The test images are not looked at; what is chosen here goes there
once: experiments.cifar10_highway --model.gate-bias B --optimizer.learning-rate R.

Command: python -m experiments.ablations.gate_bias --data.data-dir DIR --seeds 3
Hardware: not run here; meant for one GPU.
Published: none of these networks.
"""

import dataclasses

from experiments import cifar10_highway
from flax_resnet import TrainConfig, grid
from flax_resnet.cli.experiment import ablate

BASELINE = "gate_bias=-2.0,learning_rate=0.1"


def get_base() -> TrainConfig:
    """Highway-32 by the residual paper's recipe, evaluated on training images held out."""
    config = cifar10_highway.get_config(32)
    data = dataclasses.replace(config.data, train_split="train[:90%]", eval_split="train[90%:]")
    return dataclasses.replace(config, data=data)


def get_grid(base: TrainConfig, seeds: int) -> dict[str, TrainConfig]:
    """Every bias at every rate."""
    axes = {
        "model.gate_bias": (0.0, -1.0, -2.0, -4.0, -6.0),
        "optimizer.learning_rate": (0.03, 0.1, 0.3),
    }
    return grid(base, axes, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, "runs/ablations/gate_bias", baseline=BASELINE)
