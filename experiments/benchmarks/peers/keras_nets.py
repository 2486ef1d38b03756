"""The networks in Keras 3 as its users write them: functional models on images (N, H, W, C)."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from experiments.benchmarks.peers import specs

Tensor = Any  # a KerasTensor


def conv(x: Tensor, filters: int, kernel: int, stride: int, name: str, bias: bool) -> Tensor:
    """A square convolution, padded evenly: at stride 2 by a layer, as keras.applications does."""
    padding = "same"
    if stride > 1:
        padding = "valid"
        x = layers.ZeroPadding2D(kernel // 2)(x) if kernel > 1 else x
    return layers.Conv2D(filters, kernel, stride, padding, use_bias=bias, name=name)(x)


def batch_norm(x: Tensor, norm: specs.Norm, name: str) -> Tensor:
    """Batch normalisation."""
    return layers.BatchNormalization(momentum=norm.momentum, epsilon=norm.epsilon, name=name)(x)


def block(x: Tensor, spec: specs.ResNet, filters: int, stride: int, name: str) -> Tensor:
    """A residual block of a ResNet."""
    h = x
    for i, (channels, kernel, step) in enumerate(spec.convs(filters, stride), start=1):
        h = layers.ReLU()(h) if i > 1 else h
        h = conv(h, channels, kernel, step, f"{name}.conv{i}", bias=False)
        h = batch_norm(h, spec.norm, f"{name}.norm{i}")
    missing = h.shape[-1] - x.shape[-1]
    if missing and spec.imagenet:
        x = conv(x, h.shape[-1], 1, stride, f"{name}.shortcut_conv", bias=False)
        x = batch_norm(x, spec.norm, f"{name}.shortcut_norm")
    elif missing:
        half = missing // 2
        x = ops.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((half, missing - half),))
    return layers.ReLU()(layers.add([h, x]))


def resnet(x: Tensor, spec: specs.ResNet) -> Tensor:
    """Stem, stages, global average, head."""
    x = conv(x, spec.filters, *((7, 2) if spec.imagenet else (3, 1)), "stem_conv", bias=False)
    x = layers.ReLU()(batch_norm(x, spec.norm, "stem_norm"))
    if spec.imagenet:  # after a ReLU zeros are no more than what is there
        x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))
    for name, filters, stride in spec.blocks():
        x = block(x, spec, filters, stride, name)
    return layers.Dense(spec.classes, name="head")(layers.GlobalAveragePooling2D()(x))


def unit(x: Tensor, filters: int, norm: specs.Norm, name: str) -> Tensor:
    """BN, ReLU, 3x3 convolution, twice."""
    for i in (1, 2):
        x = layers.ReLU()(batch_norm(x, norm, f"{name}.norm{i}"))
        x = conv(x, filters, 3, 1, f"{name}.conv{i}", bias=True)
    return x


def mini(x: Tensor, spec: specs.Mini) -> Tensor:
    """A convolution, units, global average, head."""
    x = conv(x, spec.filters, 3, 1, "stem_conv", bias=True)
    for name, filters, pools in spec.units():
        h, shortcut = x, x
        if pools:
            h = layers.MaxPooling2D(2)(x)
            shortcut = conv(x, filters, 1, 2, f"{name}.shortcut", bias=True)
        x = layers.add([shortcut, unit(h, filters, spec.norm, name)])
    x = layers.Dropout(spec.dropout)(layers.ReLU()(batch_norm(x, spec.norm, "final_norm")))
    return layers.Dense(spec.classes, name="head")(layers.GlobalAveragePooling2D()(x))


class DropBlock(layers.Layer):
    """DropBlock of a square map (Ghiasi et al. 2018, algorithm 1)."""

    def __init__(self, rate: float, size: int):
        super().__init__()
        self.rate, self.size = rate, size
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """Maps (N, H, W, C) to the same shape."""
        if not training:
            return x
        n, side, _, channels = ops.shape(x)
        block = min(self.size, side)
        places = side - block + 1
        drawn = keras.random.uniform((n, places, places, channels), seed=self.seeds)
        seeds = ops.cast(drawn < specs.drop_chance(self.rate, side, block), x.dtype)
        seeds = ops.pad(seeds, ((0, 0), (block - 1,) * 2, (block - 1,) * 2, (0, 0)))
        kept = 1 - ops.max_pool(seeds, block, 1)
        total = ops.sum(ops.cast(kept, "float32"))
        return x * kept * ops.cast(ops.size(kept) / total, x.dtype)


def dropblock_net(x: Tensor, spec: specs.DropBlockNet) -> Tensor:
    """Wide residual stages, DropBlock and a max-pool after each, dense layers."""
    for stage, filters in enumerate(spec.filters, start=1):
        h = layers.ReLU()(unit(x, filters, spec.norm, f"stage{stage}_unit1"))
        x = layers.add([h, unit(h, filters, spec.norm, f"stage{stage}_unit2")])
        x = DropBlock(spec.rate, spec.block_size)(layers.ReLU()(x))
        x = layers.MaxPooling2D(3, 2, "same")(x)
    x = layers.Flatten()(x)
    for i, width in enumerate(spec.dense, start=1):
        x = layers.Dense(width, "relu", name=f"dense{i}")(x)
        x = layers.Dropout(spec.dropout)(x)
    return layers.Dense(spec.classes, name="head")(x)


def build(spec: specs.Spec, image_size: int) -> keras.Model:
    """The network of a spec, for square images."""
    images = keras.Input((image_size, image_size, 3))
    match spec:
        case specs.ResNet():
            logits = resnet(images, spec)
        case specs.Mini():
            logits = mini(images, spec)
        case specs.DropBlockNet():
            logits = dropblock_net(images, spec)
    return keras.Model(images, logits)
