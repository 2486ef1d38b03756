"""The four networks in numbers alone, without any framework: what every definition is built from.

Layers have the names that they have in flax_resnet ("stage1_block1.conv1"), so that weights can be
compared one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Norm:
    """Constants of batch normalisation."""

    momentum: float
    """Share of the running statistics kept at each step."""
    epsilon: float
    """Added to the variance."""


PAPERS = Norm(0.9, 1e-5)
KERAS = Norm(0.99, 1e-3)


@dataclasses.dataclass(frozen=True)
class ResNet:
    """He et al. 2016: convolutions without biases, each with a norm after it."""

    stage_sizes: tuple[int, ...]
    """Blocks in each stage; every stage after the first halves the map."""
    filters: int
    """Of the first stage, doubled with each later one."""
    classes: int
    bottleneck: bool
    """Blocks of 1x1, 3x3 (with the stride) and 1x1 convolutions; else of two 3x3."""
    imagenet: bool
    """A 7x7 stem of stride 2 with a max-pool, and projections where the shape changes; else a 3x3
    stem and shortcuts that pad new channels with zeros."""
    norm: Norm = PAPERS

    @property
    def expansion(self) -> int:
        """Channels that leave a block for each filter."""
        return 4 if self.bottleneck else 1

    def convs(self, filters: int, stride: int) -> tuple[tuple[int, int, int], ...]:
        """(channels, kernel, stride) of a block's convolutions."""
        if self.bottleneck:
            return (filters, 1, 1), (filters, 3, stride), (filters * self.expansion, 1, 1)
        return (filters, 3, stride), (filters, 3, 1)

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """(name, filters, stride) of each block."""
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                stride = 2 if stage and not block else 1
                yield f"stage{stage + 1}_block{block + 1}", self.filters * 2**stage, stride


@dataclasses.dataclass(frozen=True)
class Mini:
    """The CIFAR-10 tutorial's network: pre-activated units with max-pool branches."""

    stage_sizes: tuple[int, ...] = (3, 3, 3, 3)
    """Units in each stage; every stage after the first begins with one that pools."""
    filters: int = 32
    """Of the first stage, doubled with each later one."""
    classes: int = 10
    dropout: float = 0.25
    """Share of the last map that is dropped."""
    norm: Norm = KERAS

    def units(self) -> Iterator[tuple[str, int, bool]]:
        """(name, filters, whether it pools) of each unit."""
        for stage, size in enumerate(self.stage_sizes):
            for unit in range(size):
                pools = stage > 0 and unit == 0
                yield f"stage{stage + 1}_unit{unit + 1}", self.filters * 2**stage, pools


@dataclasses.dataclass(frozen=True)
class DropBlockNet:
    """The CIFAR-100 tutorial's network: wide blocks, DropBlock, two wide dense layers."""

    filters: tuple[int, ...] = (128, 256, 512, 1024)
    """Channels of each stage; each halves the map after it."""
    dense: tuple[int, ...] = (4096, 4096)
    """Widths of the hidden dense layers."""
    classes: int = 100
    rate: float = 0.2
    """Share of zeros by DropBlock."""
    block_size: int = 5
    """Side of DropBlock's blocks; on a smaller map, the map."""
    dropout: float = 0.5
    """After each hidden dense layer."""
    norm: Norm = KERAS


Spec = ResNet | Mini | DropBlockNet


def drop_chance(rate: float, side: int, block: int) -> float:
    """DropBlock's chance of a block at each place of a square map (Ghiasi et al. 2018, eq. 1)."""
    return rate / block**2 * side**2 / (side - block + 1) ** 2


@dataclasses.dataclass(frozen=True)
class Network:
    """What is timed by default."""

    spec: Spec
    image_size: int
    batch_size: int


NETWORKS: dict[str, Network] = {
    "mini": Network(Mini(), 32, 128),
    "resnet20": Network(ResNet((3, 3, 3), 16, 10, bottleneck=False, imagenet=False), 32, 128),
    "resnet50": Network(ResNet((3, 4, 6, 3), 64, 1000, bottleneck=True, imagenet=True), 224, 8),
    "dropblock_resnet": Network(DropBlockNet(), 32, 32),
}
"""By the names that flax_resnet has for them."""
