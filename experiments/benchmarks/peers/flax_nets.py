"""The networks and a training step in Flax linen as its users write them, with nothing of ours."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from experiments.benchmarks.peers import specs


class Layers:
    """Convolutions, norms, dense layers and dropout with a network's constants."""

    def __init__(self, norm: specs.Norm, bias: bool, dtype: Any, train: bool):
        self._conv = functools.partial(nn.Conv, use_bias=bias, dtype=dtype)
        about: dict[str, Any] = {"momentum": norm.momentum, "epsilon": norm.epsilon}
        self.norm = functools.partial(nn.BatchNorm, not train, dtype=dtype, **about)
        self.dense = functools.partial(nn.Dense, dtype=dtype)
        self.dropout = functools.partial(nn.Dropout, deterministic=not train)

    def conv(self, filters: int, kernel: int, stride: int, name: str) -> nn.Conv:
        """A square convolution, padded evenly."""
        return self._conv(filters, (kernel, kernel), stride, padding=kernel // 2, name=name)


class Block(nn.Module):
    """A residual block of a ResNet."""

    spec: specs.ResNet
    filters: int
    stride: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / stride, W / stride, filters * expansion)."""
        layers, h = self.layers, x
        for i, (channels, kernel, stride) in enumerate(self.spec.convs(self.filters, self.stride)):
            h = nn.relu(h) if i else h
            h = layers.conv(channels, kernel, stride, f"conv{i + 1}")(h)
            h = layers.norm(name=f"norm{i + 1}")(h)
        missing = h.shape[-1] - x.shape[-1]
        if missing and self.spec.imagenet:
            x = layers.conv(h.shape[-1], 1, self.stride, "shortcut_conv")(x)
            x = layers.norm(name="shortcut_norm")(x)
        elif missing:
            half = missing // 2
            x = jnp.pad(
                x[:, :: self.stride, :: self.stride], ((0, 0),) * 3 + ((half, missing - half),)
            )
        return nn.relu(h + x)


class ResNet(nn.Module):
    """Stem, stages, global average, head."""

    spec: specs.ResNet
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, C) to logits."""
        spec = self.spec
        layers = Layers(spec.norm, False, self.dtype, train)
        x = layers.conv(spec.filters, *((7, 2) if spec.imagenet else (3, 1)), "stem_conv")(x)
        x = nn.relu(layers.norm(name="stem_norm")(x))
        if spec.imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for name, filters, stride in spec.blocks():
            x = Block(spec, filters, stride, layers, name=name)(x)
        return layers.dense(spec.classes, name="head")(jnp.mean(x, axis=(1, 2)))


class Unit(nn.Module):
    """BN, ReLU, 3x3 convolution, twice."""

    filters: int
    layers: Layers

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, filters)."""
        for i in (1, 2):
            x = nn.relu(self.layers.norm(name=f"norm{i}")(x))
            x = self.layers.conv(self.filters, 3, 1, f"conv{i}")(x)
        return x


class PooledUnit(Unit):
    """A unit of a max-pooled input, with a strided projection beside it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H / 2, W / 2, filters)."""
        shortcut = self.layers.conv(self.filters, 1, 2, "shortcut")(x)
        return shortcut + super().__call__(nn.max_pool(x, (2, 2), (2, 2)))


class Mini(nn.Module):
    """A convolution, units, global average, head."""

    spec: specs.Mini
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, C) to logits."""
        spec = self.spec
        layers = Layers(spec.norm, True, self.dtype, train)
        x = layers.conv(spec.filters, 3, 1, "stem_conv")(x)
        for name, filters, pools in spec.units():
            if pools:
                x = PooledUnit(filters, layers, name=name)(x)
            else:
                x = x + Unit(filters, layers, name=name)(x)
        x = layers.dropout(spec.dropout)(nn.relu(layers.norm(name="final_norm")(x)))
        return layers.dense(spec.classes, name="head")(jnp.mean(x, axis=(1, 2)))


def drop_block(key: jax.Array, x: jax.Array, rate: float, size: int) -> jax.Array:
    """DropBlock of a square map (Ghiasi et al. 2018, algorithm 1)."""
    n, side, _, channels = x.shape
    block = min(size, side)
    places = side - block + 1
    chance = specs.drop_chance(rate, side, block)
    seeds = jax.random.bernoulli(key, chance, (n, places, places, channels)).astype(x.dtype)
    kept = 1 - nn.max_pool(seeds, (block, block), padding=((block - 1, block - 1),) * 2)
    return x * kept * (kept.size / jnp.sum(kept, dtype=jnp.float32)).astype(x.dtype)


class DropBlockNet(nn.Module):
    """Wide residual stages, DropBlock and a max-pool after each, dense layers."""

    spec: specs.DropBlockNet
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, C) to logits."""
        spec = self.spec
        layers = Layers(spec.norm, True, self.dtype, train)
        for stage, filters in enumerate(spec.filters, start=1):
            h = nn.relu(Unit(filters, layers, name=f"stage{stage}_unit1")(x))
            x = nn.relu(h + Unit(filters, layers, name=f"stage{stage}_unit2")(h))
            if train:
                x = drop_block(self.make_rng("dropout"), x, spec.rate, spec.block_size)
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(spec.dense, start=1):
            x = layers.dropout(spec.dropout)(nn.relu(layers.dense(width, name=f"dense{i}")(x)))
        return layers.dense(spec.classes, name="head")(x)


def build(spec: specs.Spec, dtype: Any = jnp.float32) -> nn.Module:
    """The network of a spec."""
    match spec:
        case specs.ResNet():
            return ResNet(spec, dtype)
        case specs.Mini():
            return Mini(spec, dtype)
        case specs.DropBlockNet():
            return DropBlockNet(spec, dtype)


class TrainState(train_state.TrainState):
    """Flax's TrainState with the running statistics."""

    batch_stats: Any


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[TrainState, jax.Array]:
    """(the state after a step, its loss), as Flax's guides write it."""

    def mean_loss(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss
