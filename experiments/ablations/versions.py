"""The first residual block against the pre-activated one, by depth.

Claim: pre-activation matters more the deeper the network is: little at 110 layers, much at 1,001,
which this leaves out (experiments.cifar10_preact --depth 1001). 20 and 110 layers are of two-layer
blocks, 164 of bottlenecks. The recipe is that of experiments.cifar10_resnet, with the rise over 400
steps for all.

Command: python -m experiments.ablations.versions --data.data-dir DIR --seeds 3
Hardware: not run here; meant for one GPU.
Published: test error, median of 5 runs, v1 against v2: 110 layers 6.61 and 6.37, 164 layers 5.93
and 5.46, 1001 layers 7.61 and 4.92 % (He et al. 2016b, table 3).
"""

from experiments import cifar10_resnet
from flax_resnet import BasicBlock, BottleneckBlock, TrainConfig, cifar_preact, grid
from flax_resnet.cli.experiment import ablate

DEPTHS = (20, 110, 164)
BASELINE = {f"v2-{depth}": f"v1-{depth}" for depth in DEPTHS}
# What a network of another depth or block is made of; all else is the base's.
PARTS = ("stage_sizes", "block_cls", "shortcut", "stride_conv")


def get_base() -> TrainConfig:
    """ResNet-110 by the papers' recipe."""
    return cifar10_resnet.get_config(110)


def get_grid(base: TrainConfig, seeds: int) -> dict[str, TrainConfig]:
    """The base's network of v1 and v2 blocks at each depth, equal but for the order in a block."""
    variants = {}
    for depth in DEPTHS:
        v2 = cifar_preact(depth)
        bottlenecks = issubclass(v2.block_cls, BottleneckBlock)
        v1 = v2.clone(block_cls=BottleneckBlock if bottlenecks else BasicBlock)
        for name, module in (("v1", v1), ("v2", v2)):
            parts = {f"model.{part}": getattr(module, part) for part in PARTS}
            variants[f"{name}-{depth}"] = parts
    return grid(base, {"": variants}, seeds)


if __name__ == "__main__":
    ablate(get_base, get_grid, "runs/ablations/versions", baseline=BASELINE)
