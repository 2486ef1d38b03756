"""Arguments of networks and their checks: dtypes, lists of sizes, the shape of images."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp

from flax_resnet.errors import UserError

Dtype = Any  # a numpy dtype, or its name: "float32", "bfloat16", "float64"


def check_bn_group(bn_group: int | None, batch_size: int, accum_steps: int = 1) -> None:
    """Raises UserError unless each of ``accum_steps`` parts of a batch is whole groups."""
    rows = batch_size // accum_steps
    if bn_group is None or rows % bn_group == 0:
        return
    below = max(n for n in range(1, min(bn_group, rows) + 1) if rows % n == 0)
    parts = f", each of accum_steps={accum_steps} parts of {batch_size}" if accum_steps > 1 else ""
    raise UserError(
        f"bn_group={bn_group} does not divide a batch of {rows} images{parts}: use {below}, None "
        "for all of them, or another batch"
    )


def check_images(
    x: jax.Array, least: int, remedy: str, stem_kernel: jax.Array | None = None
) -> None:
    """Raises UserError unless ``x`` is images (N, H, W, C) of ``least`` pixels or more a side.

    With ``stem_kernel`` (h, w, C, K) also unless the images have its channels.
    """
    if x.ndim != 4:
        raise UserError(f"input of shape {x.shape}: expected images (N, H, W, C)")
    if min(x.shape[1:3]) < least:
        raise UserError(
            f"input is {x.shape[1]}x{x.shape[2]}, the least for this network is {least}x{least}: "
            f"enlarge the images, or choose {remedy}"
        )
    if stem_kernel is not None and stem_kernel.shape[2] != x.shape[3]:
        raise UserError(
            f"input has {x.shape[3]} channels, the weights' stem takes {stem_kernel.shape[2]}: "
            "repeat or drop channels, or start from other weights"
        )


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """``values`` as a tuple of ints; UserError unless each is 1 or more, and there are some."""
    try:
        numbers = tuple(operator.index(n) for n in values)
    except TypeError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(f"{name}={values!r}: expected one or more whole numbers above 0")
    return numbers


def check_dtype(dtype: Dtype) -> Dtype:
    """``dtype``; UserError unless it is, or names, a floating-point dtype that this jax has."""
    try:
        floats = jnp.issubdtype(as_dtype(dtype), jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        raise UserError(f"dtype {dtype!r}: expected one such as float32 or bfloat16")
    if needs_x64(dtype):
        raise UserError(
            f"dtype {dtype!r} needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment"
        )
    return dtype


def needs_x64(dtype: Dtype) -> bool:
    """True for a dtype, or its name, that this jax would silently narrow."""
    return dtype is not None and jax.dtypes.canonicalize_dtype(as_dtype(dtype)) != as_dtype(dtype)


def as_dtype(dtype: Dtype) -> Any:
    """The dtype that ``dtype`` (a dtype, its name, or None) stands for."""
    return None if dtype is None else jnp.dtype(dtype)
