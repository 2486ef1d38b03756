"""Forms of a network's operations that XLA's CPU backend runs fast, and how to compile for it.

Each computes what the plain form does, in another order of summation at most; on other backends the
plain form is what runs. What they are worth: `python -m experiments.benchmarks.cpu_forms`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

YNN = "xla_cpu_experimental_ynn_fusion_type"
# By default XLA gives convolutions to YNNPACK, which has no fast gradient of a kernel, and sums
# over the batch to its own loops; the other way round both are faster.
FUSION_TYPES = "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"

# Of a convolution's input, when the gradient of its kernel is computed in parts.
PART_BYTES = 2**21
LEAST_IMAGES = 8

Convolution = Callable[[jax.Array, jax.Array], jax.Array]
"""Of input and kernel."""
Gradient = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Of input, kernel and the output's cotangent."""


_for_others: ContextVar[bool] = ContextVar("for_others", default=False)


def is_backend() -> bool:
    """Whether programs are compiled for a CPU alone."""
    return jax.default_backend() == "cpu" and not _for_others.get()


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """What is traced within is for any backend: it has the plain forms.

    A function under ``jax.jit`` must be a new one: a trace from outside is found in its cache.
    """
    token = _for_others.set(True)
    try:
        yield
    finally:
        _for_others.reset(token)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compiler_options() -> dict[str, Any] | None:
    """What to give ``jax.jit(..., compiler_options=...)``: options for a CPU, None elsewhere.

    A choice in $XLA_FLAGS stands.
    """
    if not is_backend() or YNN in os.environ.get("XLA_FLAGS", ""):
        return None
    return {YNN: FUSION_TYPES}


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

    Like XLA's, but for four cases (jax 0.10.2). On a map that is smaller than the kernel its
    convolution is 10 to 70 times slower than one matrix product over the taps (3x3 kernels on maps
    of 1x1 to 3x2: the last stages of an ImageNet network on 32x32 images). The gradient of a kernel
    it computes as a convolution over the batch, and turns both operands round first: on a large map
    that is done in parts of the batch that stay in a core's cache, and for a 1x1 kernel a matrix
    product does without. The gradient by the input of a stride it computes as a convolution of a
    map that is mostly zeros, at four times the multiply-adds for a stride of 2, and where the
    output is smaller than the kernel 60 times slower than need be: there and on a large map every
    phase of the input is a convolution by its own taps, and a 1x1 kernel is given the rows and
    columns that it reads. In these cases there is no forward-mode derivative (``jax.jvp``) but
    that of a gradient.
    """
    height, width = kernel.shape[:2]
    dense = options["feature_group_count"] == 1
    dense = dense and {*options["lhs_dilation"], *options["rhs_dilation"]} == {1}
    if dense and _exceeds(kernel, x.shape[1:3]):
        return _over_taps(x, kernel, strides, padding, options.get("precision"))
    pointwise = dense and (height, width) == (1, 1) and not any(map(any, padding))
    if pointwise:
        x, strides = x[:, :: strides[0], :: strides[1]], (1, 1)

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    strided = dense and max(strides) > 1
    sizes = [
        (n + sum(p) - k) // stride + 1
        for n, k, p, stride in zip(x.shape[1:3], (height, width), padding, strides, strict=True)
    ]
    if not (is_large(x.shape, x.dtype.itemsize) or (strided and _exceeds(kernel, sizes))):
        return plain(x, kernel)
    by_kernel = _kernel_gradient_1x1 if pointwise else _in_parts(plain)
    by_input = _input_gradient(plain)
    if strided:
        by_input = _input_gradient_by_phase(strides, padding, options)
    return _with_gradients(plain, by_input, by_kernel)(x, kernel)


def _exceeds(kernel: jax.Array, sizes: Sequence[int]) -> bool:
    """Whether a kernel (h, w, C, K) is larger than a map of these sizes, height or width."""
    return any(k > n for k, n in zip(kernel.shape[:2], sizes, strict=True))


def is_large(shape: Sequence[int], itemsize: int) -> bool:
    """Whether a map (N, H, W, C) does not stay in a core's cache."""
    return math.prod(shape) * itemsize > PART_BYTES


def gradient_parts(shape: Sequence[int], itemsize: int) -> int:
    """Parts that a batch of images (N, H, W, C) is cut into for the gradient of a kernel.

    A power of two; each has the same number of images, LEAST_IMAGES or more.
    """
    parts, (images, *rest) = 1, shape
    while is_large((images // parts, *rest), itemsize) and images % (2 * parts * LEAST_IMAGES) == 0:
        parts *= 2
    return parts


def _with_gradients(plain: Convolution, by_input: Gradient, by_kernel: Gradient) -> Convolution:
    """A convolution with these gradients."""

    def forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
        return plain(x, kernel), (x, kernel)

    def backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, kernel = kept
        return by_input(x, kernel, dy), by_kernel(x, kernel, dy)

    convolution = jax.custom_vjp(plain)
    convolution.defvjp(forward, backward)
    return convolution


def _input_gradient(plain: Convolution) -> Gradient:
    return lambda x, kernel, dy: jax.vjp(lambda x: plain(x, kernel), x)[1](dy)[0]


def _input_gradient_by_phase(
    strides: Sequence[int], padding: Sequence[tuple[int, int]], options: Mapping[str, Any]
) -> Gradient:
    """Of a strided convolution.

    Every ``stride``-th row (column) of the input from one on has products with the same taps of the
    kernel, and with no other.
    """

    def gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        sizes = [-(-n // stride) for n, stride in zip(x.shape[1:3], strides, strict=True)]

        def phase(*at: int) -> jax.Array:
            taps, around = kernel, []
            for axis, (first, stride, (low, _)) in enumerate(
                zip(at, strides, padding, strict=True)
            ):
                ahead, start = divmod(first + low, stride)
                taps = lax.slice_in_dim(taps, min(start, taps.shape[axis]), None, stride, axis)
                before = taps.shape[axis] - 1 - ahead
                around.append((before, sizes[axis] + ahead - dy.shape[1 + axis]))
            if 0 in taps.shape:
                return jnp.zeros((len(x), *sizes, x.shape[-1]), dy.dtype)
            turned = taps[::-1, ::-1].swapaxes(2, 3)
            if _exceeds(turned, dy.shape[1:3]):
                return _over_taps(dy, turned, (1, 1), around, options.get("precision"))
            return lax.conv_general_dilated(dy, turned, (1, 1), around, **options)

        rows = [
            jnp.stack([phase(row, column) for column in range(strides[1])], axis=3)
            for row in range(strides[0])
        ]
        whole = jnp.stack(rows, axis=2)  # (N, rows, phases, columns, phases, C)
        whole = whole.reshape(len(x), sizes[0] * strides[0], sizes[1] * strides[1], x.shape[-1])
        return whole[:, : x.shape[1], : x.shape[2]]

    return gradient


def _kernel_gradient_1x1(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
    # In two dimensions: over three contracted ones XLA turns them round all the same.
    flat, by = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return jnp.matmul(flat.T, by).reshape(kernel.shape)


def _in_parts(plain: Convolution) -> Gradient:
    """The gradient by the kernel, summed over parts of the batch."""

    def gradient(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> jax.Array:
        parts = gradient_parts(x.shape, x.dtype.itemsize)
        # Every parts-th row, so that a batch split over devices is cut without moving a row.
        xs, dys = (a.reshape(-1, parts, *a.shape[1:]) for a in (x, dy))
        sums = [
            jax.vjp(lambda k, i=i: plain(xs[:, i], k), kernel)[1](dys[:, i])[0]
            for i in range(parts)
        ]
        return functools.reduce(jnp.add, sums)

    return gradient


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
