"""Highway networks on CIFAR-10 (Srivastava et al. 2015): shortcuts with a learned gate.

Claim: y = T(x) H(x) + (1 - T(x)) x lets deep networks train where plain ones fail; the residual
papers, and the tutorial after them, find the gates no better than a bare shortcut. It is held
against experiments.cifar10_resnet and cifar10_plain under their recipe, so neither widths nor
schedule are the highway paper's: those of its networks differ from one to the next, and 16, 32 and
64 channels are used here, with BatchNorm in H. The gates' biases start at -2;
experiments.ablations.gate_bias tunes them.

Command: python -m experiments.cifar10_highway --depth 19 --data.data-dir DIR
Hardware: not run here; meant for one GPU.
Published: about 92.4 % top-1 for 19 layers with 2.3 million parameters, about 90.3 % for 32 layers
with 1.25 million (Training Very Deep Networks, table 2); other networks than these.
"""

import dataclasses

from experiments import cifar10_resnet
from flax_resnet import TrainConfig, highway_net
from flax_resnet.cli.experiment import main


def get_config(depth: int = 19) -> TrainConfig:
    """The residual paper's recipe on a highway network, of 19 or 32 layers in its paper."""
    return dataclasses.replace(cifar10_resnet.get_config(), model=highway_net(depth))


if __name__ == "__main__":
    main(get_config, workdir="runs/cifar10_highway")
