"""What drops parts of a network in training: DropBlock and stochastic depth.

Rates may be Python numbers or traced values, so annealing one never compiles a step again. A
rate of 0 changes no bit of the input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Rate = float | jax.Array
NEWTON_STEPS = 30


def drop_path(key: jax.Array, branch: jax.Array, rate: Rate) -> jax.Array:
    """Stochastic depth (Huang et al. 2016, section 3): drops whole branches, example by example.

    Args:
      key: random key.
      branch: (N, ...), the residual branch before it is added.
      rate: chance of each example's branch to be zero; the others are divided by 1 - rate,
        in place of the paper's multiplication at test time. (The paper drops a branch for a
        whole mini-batch at once.)
    """
    shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
    keep = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.uniform(key, shape) < keep
    scale = jnp.where(kept, 1.0 / jnp.maximum(keep, jnp.finfo(jnp.float32).tiny), 0.0)
    return branch * scale.astype(branch.dtype)


def drop_block(
    key: jax.Array, x: jax.Array, rate: Rate, block_size: int = 7, *, clamp: bool = True
) -> jax.Array:
    """DropBlock (Ghiasi, Lin and Le 2018, algorithm 1): zeroes square blocks of each channel.

    Blocks lie wholly inside the map. The paper's chance of a block ignores that blocks
    overlap, and so drops less than ``rate``; here it is solved for, and the expected share of
    zeros is ``rate``. What is kept is scaled by the count of all over the count of the kept.

    Args:
      key: random key.
      x: (N, H, W, C).
      rate: expected share of zeros, 0 <= rate < 1.
      block_size: side of a block.
      clamp: on a map smaller than the block, shrink the block to the map; False leaves such
        a map as it is, as the CIFAR-100 tutorial's code does with its 4x4 map.
    """
    _, height, width, _ = x.shape
    if min(height, width) < block_size and not clamp:
        return x
    window = (min(block_size, height), min(block_size, width))
    chance = block_chance(rate, (height, width), window)
    n, h, w, c = x.shape
    seeds = jax.random.uniform(key, (n, h - window[0] + 1, w - window[1] + 1, c)) < chance
    # As floats: XLA pools these twice as fast as it does booleans.
    padding = [(size - 1, size - 1) for size in window]
    dropped = nn.max_pool(seeds.astype(jnp.float32), window, padding=padding) > 0
    kept = jnp.maximum(
        jnp.sum(~dropped, dtype=jnp.int32), 1
    )  # whole numbers: all kept is exactly 1
    scale = (jnp.float32(x.size) / kept.astype(jnp.float32)).astype(x.dtype)
    return jnp.where(dropped, jnp.zeros((), x.dtype), x * scale)


def block_chance(rate: Rate, size: tuple[int, int], window: tuple[int, int]) -> jax.Array:
    """Chance of a block at each place where one fits, for an expected share ``rate`` of zeros.

    With chance g a pixel that n blocks can cover is kept with (1 - g)^n. With u = -log(1 - g)
    the mean of exp(-n u) over pixels is convex and falls, so Newton's steps from u = 0 rise
    to the root and never pass it.
    """
    rows, columns = (_covers(*pair) for pair in zip(size, window, strict=True))
    values, counts = np.unique(np.outer(rows, columns), return_counts=True)
    n = jnp.asarray(values, jnp.float32)
    share = jnp.asarray(counts / counts.sum(), jnp.float32)
    rate = jnp.asarray(rate, jnp.float32)

    def newton(_: int, u: jax.Array) -> jax.Array:
        # 1 - exp(-n u) in place of exp(-n u): no digits are lost at small rates.
        missing = rate + jnp.sum(share * jnp.expm1(-n * u))
        return u + missing / jnp.sum(share * n * jnp.exp(-n * u))

    return -jnp.expm1(-jax.lax.fori_loop(0, NEWTON_STEPS, newton, jnp.zeros((), jnp.float32)))


def _covers(size: int, window: int) -> np.ndarray:
    """For each of ``size`` pixels in a row, how many intervals of ``window`` inside cover it."""
    return np.convolve(np.ones(size - window + 1, int), np.ones(window, int))


class DropBlock(nn.Module):
    """``drop_block`` as a module: its key is the "dropout" stream's.

    Attributes:
      block_size: side of a block.
      clamp: on a map smaller than the block, shrink the block; False leaves the map as it is.
    """

    block_size: int = 7
    clamp: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, rate: Rate, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to the same shape; without ``train``, or at a plain 0, to itself."""
        if not train or is_zero(rate):
            return x
        return drop_block(self.make_rng("dropout"), x, rate, self.block_size, clamp=self.clamp)


def is_zero(rate: Rate) -> bool:
    """True for a Python 0; a traced rate is not known to be zero."""
    return not isinstance(rate, jax.Array) and rate == 0
