"""Forms of a network's operations that XLA's CPU backend runs fast.

Each computes what the plain form does, in another order of summation at most; on other backends the
plain form is what runs. What they are worth is in docs/performance.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def max_pool(
    x: jax.Array, window: int, strides: int, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Square max-pool of (N, H, W, C) as slices and selections.

    XLA's own gradient finds the places of the maxima by a sort of their indices, an array of
    integers as large as the input, and scatters. Here as there the first of equal ones has it.
    """
    sizes = [
        (n + sum(p) - window) // strides + 1 for n, p in zip(x.shape[1:3], padding, strict=True)
    ]
    # Rows in groups of ``strides``, so that a tap is a plain slice.
    groups = [n + (window - 1) // strides for n in sizes]
    config = [(0, 0, 0), *(
        (low, strides * group - n - low, 0)
        for n, group, (low, _) in zip(x.shape[1:3], groups, padding, strict=True)
    ), (0, 0, 0)]  # fmt: skip
    low = jnp.array(-jnp.inf, x.dtype)
    grouped = lax.pad(x, low, config).reshape(
        x.shape[0], groups[0], strides, groups[1], strides, x.shape[3]
    )
    taps = [
        grouped[:, i : i + sizes[0], p, j : j + sizes[1], q]
        for i, p in (divmod(n, strides) for n in range(window))
        for j, q in (divmod(n, strides) for n in range(window))
    ]
    best = lax.stop_gradient(functools.reduce(jnp.maximum, taps))
    y, found = best, jnp.zeros(best.shape, bool)
    for tap in taps:
        here = (lax.stop_gradient(tap) == best) & ~found
        y, found = jnp.where(here, tap, y), found | here
    return y


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """``lax.conv_general_dilated`` of (N, H, W, C) by (h, w, C, K).

    XLA's own, but for two cases of small maps. On a map that is smaller than the kernel XLA's is 10
    to 70 times slower than one matrix product over the taps (3x3 kernels on maps of 1x1 to 3x2: the
    last stages of an ImageNet network on 32x32 images). Where the output of a stride is smaller
    than the kernel (3x3 at stride 2 from 4x4 to 2x2), the gradient by the input is a convolution
    for each phase of the input and not of a map that is mostly zeros; that case has no forward-mode
    derivative (``jax.jvp``) but that of a gradient.
    """

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    dilations = {*options["lhs_dilation"], *options["rhs_dilation"]}
    if options["feature_group_count"] != 1 or dilations != {1}:
        return plain(x, kernel)
    if _exceeds(kernel, x.shape[1:3]):
        return _over_taps(x, kernel, strides, padding, options.get("precision"))
    sizes = [
        (n + sum(p) - k) // stride + 1
        for n, k, p, stride in zip(x.shape[1:3], kernel.shape, padding, strides, strict=False)
    ]
    if not (_exceeds(kernel, sizes) and 1 < max(strides) <= min(kernel.shape[:2])):
        return plain(x, kernel)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
        return plain(x, kernel), (x, kernel)

    def backward(operands: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = operands
        by_kernel = jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](dy)[0]
        return _input_gradient_by_phase(x, kernel, dy, strides, padding, options), by_kernel

    convolution = jax.custom_vjp(plain)
    convolution.defvjp(forward, backward)
    return convolution(x, kernel)


def _exceeds(kernel: jax.Array, sizes: Sequence[int]) -> bool:
    """Whether a kernel (h, w, C, K) is larger than a map of these sizes, height or width."""
    return any(k > n for k, n in zip(kernel.shape[:2], sizes, strict=True))


def _input_gradient_by_phase(
    x: jax.Array,
    kernel: jax.Array,
    dy: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    options: Mapping[str, Any],
) -> jax.Array:
    """The gradient of a strided convolution by its input.

    A phase is every ``stride``-th row and column of the input: it has products with the same taps
    of the kernel, and with no others.
    """
    sizes = [-(-n // stride) for n, stride in zip(x.shape[1:3], strides, strict=True)]

    def phase(*first: int) -> jax.Array:
        taps, around = kernel, []
        for axis in range(2):
            ahead, start = divmod(first[axis] + padding[axis][0], strides[axis])
            taps = lax.slice_in_dim(taps, start, None, strides[axis], axis)
            before = taps.shape[axis] - 1 - ahead
            around.append((before, sizes[axis] + ahead - dy.shape[1 + axis]))
        turned = taps[::-1, ::-1].swapaxes(2, 3)
        return lax.conv_general_dilated(dy, turned, (1, 1), around, **options)

    rows = [
        jnp.stack([phase(row, column) for column in range(strides[1])], axis=3)
        for row in range(strides[0])
    ]
    whole = jnp.stack(rows, axis=2)  # (N, rows, phases, columns, phases, C)
    whole = whole.reshape(len(x), sizes[0] * strides[0], sizes[1] * strides[1], x.shape[-1])
    return whole[:, : x.shape[1], : x.shape[2]]


def _over_taps(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    precision: Any,
) -> jax.Array:
    height, width = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (x.shape[1 + i] - kernel.shape[i]) // strides[i] * strides[i] + 1 for i in range(2)
    )
    taps = [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(taps, axis=-1)
    flat = kernel.reshape(-1, kernel.shape[-1])
    return jnp.matmul(patches, flat, precision=precision)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalisation by the batch, with a gradient of two sums and one pass over the map.

    By automatic differentiation those of mean and variance are sums of their own: Ioffe and
    Szegedy 2015, section 3, has them together.

    Args:
      x: (..., C).
      scale: (C,).
      bias: (C,).
      epsilon: added to the variance.

    Returns:
      (normalised, mean (C,), variance (C,)).
    """
    mean, var = _moments(x)
    return (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias, mean, var


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return mean, jnp.maximum(jnp.mean(jnp.square(x), axes) - jnp.square(mean), 0)


@batch_norm.defjvp
def _(epsilon: float, primals: Any, tangents: Any) -> Any:
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    y, mean, var = batch_norm(x, scale, bias, epsilon)
    axes = tuple(range(x.ndim - 1))
    inverse = lax.rsqrt(var + epsilon)
    centred = (x - mean) * inverse
    dmean = jnp.mean(dx, axes)
    along = jnp.mean(dx * centred, axes)  # of dx, what changes the deviation
    slope = inverse * scale
    dy = slope * dx + (dscale - slope * along) * centred + (dbias - slope * dmean)
    return (y, mean, var), (dy, dmean, 2 * along / inverse)
