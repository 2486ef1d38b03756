"""The networks in PyTorch as its users write them; images are (N, C, H, W)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmarks.peers import specs


def conv(inputs: int, filters: int, kernel: int, stride: int, bias: bool) -> nn.Conv2d:
    """A square convolution, padded evenly."""
    return nn.Conv2d(inputs, filters, kernel, stride, kernel // 2, bias=bias)


def batch_norm(channels: int, norm: specs.Norm) -> nn.BatchNorm2d:
    """Batch normalisation; torch's momentum is the share that is replaced."""
    return nn.BatchNorm2d(channels, eps=norm.epsilon, momentum=1 - norm.momentum)


class Block(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, spec: specs.ResNet, inputs: int, filters: int, stride: int):
        super().__init__()
        self.stride, channels = stride, inputs
        self.depth = len(spec.convs(filters, stride))
        for i, (outputs, kernel, step) in enumerate(spec.convs(filters, stride), start=1):
            self.add_module(f"conv{i}", conv(channels, outputs, kernel, step, bias=False))
            self.add_module(f"norm{i}", batch_norm(outputs, spec.norm))
            channels = outputs
        self.missing = channels - inputs
        self.projects = spec.imagenet and self.missing > 0
        if self.projects:
            self.shortcut_conv = conv(inputs, channels, 1, stride, bias=False)
            self.shortcut_norm = batch_norm(channels, spec.norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, filters * expansion, H / stride, W / stride)."""
        h = x
        for i in range(1, self.depth + 1):
            h = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(h))
            h = functional.relu(h) if i < self.depth else h
        if self.projects:
            x = self.shortcut_norm(self.shortcut_conv(x))
        elif self.missing:
            half = self.missing // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, half, self.missing - half))
        return functional.relu(h + x)


class ResNet(nn.Module):
    """Stem, stages, global average, head."""

    def __init__(self, spec: specs.ResNet):
        super().__init__()
        stem = (7, 2) if spec.imagenet else (3, 1)
        self.stem_conv = conv(3, spec.filters, *stem, bias=False)
        self.stem_norm = batch_norm(spec.filters, spec.norm)
        self.pools, inputs = spec.imagenet, spec.filters
        self.stages = [name for name, *_ in spec.blocks()]
        for name, filters, stride in spec.blocks():
            self.add_module(name, Block(spec, inputs, filters, stride))
            inputs = filters * spec.expansion
        self.head = nn.Linear(inputs, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to logits."""
        x = functional.relu(self.stem_norm(self.stem_conv(x)))
        x = functional.max_pool2d(x, 3, 2, 1) if self.pools else x
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.head(x.mean((2, 3)))


class Unit(nn.Module):
    """BN, ReLU, 3x3 convolution, twice; with ``pools``, a pooled one and its projection."""

    def __init__(self, inputs: int, filters: int, norm: specs.Norm, pools: bool = False):
        super().__init__()
        self.pools = pools
        self.norm1 = batch_norm(inputs, norm)
        self.conv1 = conv(inputs, filters, 3, 1, bias=True)
        self.norm2 = batch_norm(filters, norm)
        self.conv2 = conv(filters, filters, 3, 1, bias=True)
        if pools:
            self.shortcut = conv(inputs, filters, 1, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, filters, H', W'), H' = H / 2 with ``pools``."""
        h = functional.max_pool2d(x, 2) if self.pools else x
        h = self.conv1(functional.relu(self.norm1(h)))
        h = self.conv2(functional.relu(self.norm2(h)))
        return self.shortcut(x) + h if self.pools else h


class Mini(nn.Module):
    """A convolution, units, global average, head."""

    def __init__(self, spec: specs.Mini):
        super().__init__()
        self.stem_conv, inputs = conv(3, spec.filters, 3, 1, bias=True), spec.filters
        self.units = [(name, pools) for name, _, pools in spec.units()]
        for name, filters, pools in spec.units():
            self.add_module(name, Unit(inputs, filters, spec.norm, pools))
            inputs = filters
        self.final_norm = batch_norm(inputs, spec.norm)
        self.dropout = nn.Dropout(spec.dropout)
        self.head = nn.Linear(inputs, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to logits."""
        x = self.stem_conv(x)
        for name, pools in self.units:
            h = getattr(self, name)(x)
            x = h if pools else x + h
        x = self.dropout(functional.relu(self.final_norm(x)))
        return self.head(x.mean((2, 3)))


def drop_block(x: Tensor, rate: float, size: int) -> Tensor:
    """DropBlock of a square map (Ghiasi et al. 2018, algorithm 1)."""
    n, channels, side, _ = x.shape
    block = min(size, side)
    places = side - block + 1
    seeds = torch.rand(n, channels, places, places, device=x.device)
    seeds = (seeds < specs.drop_chance(rate, side, block)).to(x.dtype)
    kept = 1 - functional.max_pool2d(functional.pad(seeds, (block - 1,) * 4), block, 1)
    return x * kept * (kept.numel() / kept.sum(dtype=torch.float32)).to(x.dtype)


def max_pool_same(x: Tensor) -> Tensor:
    """A 3x3 max-pool of stride 2 with TensorFlow's padding: an even map's at the far edges."""
    height, width = x.shape[2:]
    return functional.max_pool2d(
        functional.pad(x, (width % 2, 1, height % 2, 1), value=float("-inf")), 3, 2
    )


class DropBlockNet(nn.Module):
    """Wide residual stages, DropBlock and a max-pool after each, dense layers."""

    def __init__(self, spec: specs.DropBlockNet, image_size: int):
        super().__init__()
        self.spec, inputs, side = spec, 3, image_size
        for stage, filters in enumerate(spec.filters, start=1):
            self.add_module(f"stage{stage}_unit1", Unit(inputs, filters, spec.norm))
            self.add_module(f"stage{stage}_unit2", Unit(filters, filters, spec.norm))
            inputs, side = filters, -(-side // 2)
        inputs *= side**2
        for i, width in enumerate(spec.dense, start=1):
            self.add_module(f"dense{i}", nn.Linear(inputs, width))
            inputs = width
        self.dropout = nn.Dropout(spec.dropout)
        self.head = nn.Linear(inputs, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, C, H, W) to logits."""
        spec = self.spec
        for stage in range(1, len(spec.filters) + 1):
            h = functional.relu(getattr(self, f"stage{stage}_unit1")(x))
            x = functional.relu(h + getattr(self, f"stage{stage}_unit2")(h))
            if self.training:
                x = drop_block(x, spec.rate, spec.block_size)
            x = max_pool_same(x)
        x = x.flatten(1)
        for i in range(1, len(spec.dense) + 1):
            x = self.dropout(functional.relu(getattr(self, f"dense{i}")(x)))
        return self.head(x)


def build(spec: specs.Spec, image_size: int) -> nn.Module:
    """The network of a spec, for square images."""
    match spec:
        case specs.ResNet():
            return ResNet(spec)
        case specs.Mini():
            return Mini(spec)
        case specs.DropBlockNet():
            return DropBlockNet(spec, image_size)
