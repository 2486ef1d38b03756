"""Plain networks on CIFAR-10: the residual ones without shortcuts (He et al. 2016, section 4.2).

Claim: past some twenty layers a plain network gets worse with depth, in training error too, so it
is not overfitting; it is the degradation that residual networks are made against. All else is the
residual networks' recipe (experiments/cifar10_resnet.py). The study of both by depth, training
and test error against steps, is experiments/ablations/depth.py.

Command: python -m experiments.cifar10_plain --depth 20 --data.data-dir DIR
Hardware: not run here at full size (reduced: experiments/README.md, ablations.depth); meant for
one GPU.
Published: test error of 20, 32, 44 and 56 layers about 9, 10, 11 and 13 % (figure 6, left, read off
the curves).
"""

from experiments import cifar10_resnet
from flax_resnet import TrainConfig, replaced
from flax_resnet.cli.experiment import main


def get_config(depth: int = 20) -> TrainConfig:
    """The residual networks' recipe for 6n + 2 layers, without the shortcuts."""
    return replaced(cifar10_resnet.get_config(depth), "model.connection", "plain")


if __name__ == "__main__":
    main(get_config, workdir="runs/cifar10_plain")
