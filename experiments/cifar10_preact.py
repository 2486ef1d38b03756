"""Pre-activation on CIFAR-10 (He et al. 2016b, "Identity Mappings"): 164 and 1001 layers.

Claim: with norm and ReLU before each convolution, and nothing on the shortcut, 1,001 layers train
better than 164; with the original blocks they train worse. The recipe is that of
experiments.cifar10_resnet with the rise over the first 400 steps at every depth, where the paper
keeps 0.01 for 400 steps. Beyond 110 layers blocks are bottlenecks.

Command: python -m experiments.cifar10_preact --depth 164 --data.data-dir DIR
Less memory: --model.remat; compiled in seconds, and slower on a CPU: --model.scan-blocks
Hardware: not run here; meant for one GPU (1001 layers: the two flags above).
Published: test error, median of 5 runs: 110 layers 6.37, 164 layers 5.46, 1001 layers 4.92 %
(table 3; 4.62 with batches of 64). The original blocks: 6.61, 5.93 and 7.61 %.
"""

import dataclasses

from experiments import cifar10_resnet
from flax_resnet import TrainConfig, cifar_preact
from flax_resnet.cli.experiment import main


def get_config(depth: int = 164) -> TrainConfig:
    """The first paper's recipe with the rise, for 110, 164 and 1001 layers."""
    base = cifar10_resnet.get_config(cifar10_resnet.LEAST_WARMED_UP)
    return dataclasses.replace(base, model=cifar_preact(depth))


if __name__ == "__main__":
    main(get_config, workdir="runs/cifar10_preact")
