"""Convolution, normalisation and shortcut pieces that every network here is built from."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

Dtype = Any  # a numpy dtype, or its name: "float32", "bfloat16", "float64"
ShortcutKind = Literal["A", "B", "C"]

# He et al. 2015, "Delving Deep into Rectifiers", section 2.2, the backward (fan-out) form.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    filters: int,
    kernel_size: int,
    strides: int = 1,
    *,
    use_bias: bool = False,
    kernel_init: nn.initializers.Initializer = he_normal_fan_out,
    dtype: Dtype = None,
    param_dtype: Dtype = "float32",
    name: str | None = None,
) -> nn.Conv:
    """A square 2-D convolution with explicit symmetric padding of ``kernel_size // 2``.

    At stride 2 this is what torch and the papers compute; ``'SAME'`` has the same output
    shape there and other numbers, since it pads only at the far edge of an even input.

    Args:
      filters: output channels.
      kernel_size: height and width of the kernel, odd.
      strides: step in both directions.
      use_bias: add one bias a channel.
      kernel_init: initialiser of the (k, k, in, filters) kernel.
      dtype: computation dtype; None keeps the promotion of input and parameters.
      param_dtype: storage dtype of kernel and bias.
      name: submodule name.
    """
    pad = kernel_size // 2
    return nn.Conv(
        filters,
        (kernel_size, kernel_size),
        strides=(strides, strides),
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        kernel_init=kernel_init,
        dtype=as_dtype(dtype),
        param_dtype=as_dtype(param_dtype),
        name=name,
    )


def batch_norm(
    *,
    train: bool,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    scale_init: nn.initializers.Initializer = nn.initializers.ones,
    axis_name: str | None = None,
    dtype: Dtype = None,
    param_dtype: Dtype = "float32",
    name: str | None = None,
) -> nn.BatchNorm:
    """Batch normalisation (Ioffe and Szegedy 2015) over every axis but the channels.

    ``momentum`` is the share of the running statistic that is kept, so 0.9 here is 0.1 in
    torch. Statistics are computed in at least float32 whatever ``dtype`` is. Under
    ``jax.jit`` with a sharded batch they cover the global batch; ``axis_name`` asks for
    the same under ``jax.pmap``.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=epsilon,
        scale_init=scale_init,
        axis_name=axis_name if train else None,
        dtype=as_dtype(dtype),
        param_dtype=as_dtype(param_dtype),
        name=name,
    )


def shortcut_a(x: jax.Array, filters: int, strides: int) -> jax.Array:
    """The parameter-free shortcut, option A of He et al. 2016, section 3.3.

    Args:
      x: (N, H, W, C) with C at most ``filters``.
      filters: channels wanted; the new ones are zero, split evenly before and after.
      strides: keep every ``strides``-th row and column.

    Returns:
      (N, ceil(H / strides), ceil(W / strides), filters).
    """
    missing = filters - x.shape[-1]
    if missing < 0:
        raise ValueError(f"shortcut A cannot shrink {x.shape[-1]} channels to {filters}; use B")
    x = x[:, ::strides, ::strides, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


def as_dtype(dtype: Dtype) -> Any:
    """The dtype that ``dtype`` (a dtype, its name, or None) stands for."""
    return None if dtype is None else jnp.dtype(dtype)
