"""Convolution, normalisation and shortcut pieces that every network here is built from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.errors import UserError, check_range, check_types
from flax_resnet.models import cpu_forms
from flax_resnet.models.arguments import Dtype, as_dtype, check_bn_group
from flax_resnet.xla import backend

ShortcutKind = Literal["A", "B", "C", "D"]
NormKind = Literal["batch", "frozen", "none"]
BiasKind = Literal["none", "unnormalized", "all"]
InitKind = Literal["he_normal", "glorot_uniform", "identity"]

# He et al. 2015, "Delving Deep into Rectifiers", section 2.2, the backward (fan-out) form.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
glorot_uniform = nn.initializers.xavier_uniform()
# Kernels drawn evenly from +- 1 / sqrt(fan in), as torch starts its convolutions and linear layers.
lecun_third_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def partial_identity(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """A kernel (k, k, I, O), k odd, whose first I filters hand their channel on; others are drawn.

    K. Jordan 2024, arXiv:2404.00498, section 3.3; the others are ``lecun_third_uniform``.
    """
    height, width, inputs, outputs = shape
    same = min(inputs, outputs)
    hands_on = jnp.zeros((height, width, inputs, same), dtype)
    hands_on = hands_on.at[height // 2, width // 2].set(jnp.eye(inputs, same, dtype=dtype))
    return lecun_third_uniform(key, shape, dtype).at[..., :same].set(hands_on)


_KERNEL_INITS = {
    "he_normal": he_normal_fan_out,
    "glorot_uniform": glorot_uniform,
    "identity": partial_identity,
}
_DENSE_INITS = {
    "he_normal": nn.initializers.lecun_normal(),
    "glorot_uniform": glorot_uniform,
    "identity": lecun_third_uniform,
}


@dataclasses.dataclass(frozen=True)
class Layers:
    """Makes a network's convolutions, norms and dense layers, all with the same constants.

    One bundle is handed from a network to its blocks, so that what holds for every layer is
    said once.

    Attributes:
      norm_kind: "batch"; "frozen" normalises by the running statistics in training too, and
        leaves them as they are (scale and offset train); "none" is without normalisation.
      bn_momentum: share of the running statistics kept at each step (torch's 0.1 is 0.9 here).
      bn_epsilon: added to the variance.
      bn_scale: norms have a scale that trains; False: an offset alone.
      bn_group: images in a row that are normalised together in training, 32 in Goyal et al. 2017,
        section 2.3 (Hoffer et al. 2017, section 4); None: the whole batch, over all devices.
      conv_bias: convolutions with a bias: "none", "unnormalized" (those whose output no norm
        takes directly) or "all". Without normalisation all have one.
      kernel_init: "he_normal" (fan-out; dense layers LeCun normal), "glorot_uniform" (Keras) or
        "identity" (``partial_identity``).
      dtype: computation dtype; None keeps the promotion of input and parameters.
      param_dtype: storage dtype of the parameters.
      axis_name: mapped axis to share batch statistics over, under jax.pmap only.
    """

    norm_kind: NormKind = "batch"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    bn_scale: bool = True
    bn_group: int | None = None
    conv_bias: BiasKind = "none"
    kernel_init: InitKind = "he_normal"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    axis_name: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range("bn_group", self.bn_group, 1)
        if self.bn_group is not None and self.axis_name is not None:
            raise UserError(
                f"bn_group={self.bn_group} with axis_name={self.axis_name!r}: one normalises parts "
                "of a device's batch, the other the batches of all devices; leave one out"
            )

    def with_fields_of(self, network: nn.Module) -> Layers:
        """A copy with the values of the network's fields that have the names of fields here."""
        names = (f.name for f in dataclasses.fields(self) if hasattr(network, f.name))
        return dataclasses.replace(self, **{name: getattr(network, name) for name in names})

    def conv(
        self,
        filters: int,
        kernel_size: int,
        strides: int = 1,
        *,
        name: str | None = None,
        normed: bool = True,
        groups: int = 1,
        dilation: int = 1,
        zero: bool = False,
        bias: float | None = None,
    ) -> nn.Conv:
        """A square convolution with explicit symmetric padding of ``dilation * (k // 2)``.

        At stride 2 this is what torch and the papers compute; ``'SAME'`` has the same output
        shape there and other numbers, since it pads only at the far edge of an even input.

        Args:
          filters: output channels.
          kernel_size: height and width k of the kernel, odd.
          strides: step in both directions.
          name: submodule name.
          normed: a norm takes the output directly; ``conv_bias`` goes by it.
          groups: channel groups that do not see each other.
          dilation: distance between the taps of the kernel.
          zero: start the kernel at zero.
          bias: have a bias whatever ``conv_bias`` says, and start it here.
        """
        pad = dilation * (kernel_size // 2)
        biased = {"none": False, "unnormalized": not normed, "all": True}[self.conv_bias]
        return nn.Conv(
            filters,
            (kernel_size, kernel_size),
            strides=(strides, strides),
            padding=((pad, pad), (pad, pad)),
            kernel_dilation=(dilation, dilation),
            feature_group_count=groups,
            use_bias=biased or self.norm_kind == "none" or bias is not None,
            kernel_init=nn.initializers.zeros if zero else _KERNEL_INITS[self.kernel_init],
            bias_init=nn.initializers.constant(bias or 0.0),
            conv_general_dilated=convolve,
            dtype=as_dtype(self.dtype),
            param_dtype=as_dtype(self.param_dtype),
            name=name,
        )

    def norm(
        self, train: bool, *, name: str | None = None, zero: bool = False
    ) -> Callable[[jax.Array], jax.Array]:
        """Batch normalisation (Ioffe and Szegedy 2015) over every axis but the channels.

        Statistics are computed in at least float32 whatever ``dtype`` is. Under ``jax.jit``
        with a sharded batch they cover the global batch; ``axis_name`` asks for the same
        under ``jax.pmap``, and ``bn_group`` for those of parts of the batch.

        Args:
          train: normalise by the batch and update the running statistics; else by these.
          name: submodule name.
          zero: start the scale at zero.
        """
        if self.norm_kind == "none":
            return lambda x: x
        train = train and self.norm_kind != "frozen"
        kind: Callable[..., nn.BatchNorm] = nn.BatchNorm
        if train and (self.bn_group is not None or (backend.is_cpu() and not self.axis_name)):
            kind = functools.partial(BatchNorm, group=self.bn_group)
        return kind(
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            use_scale=self.bn_scale,
            scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
            axis_name=self.axis_name if train else None,
            dtype=as_dtype(self.dtype),
            param_dtype=as_dtype(self.param_dtype),
            name=name,
        )

    def dense(self, features: int, *, name: str | None = None, bias: bool = True) -> nn.Dense:
        """A dense layer of ``features`` outputs, by default with a bias."""
        return nn.Dense(
            features,
            use_bias=bias,
            kernel_init=_DENSE_INITS[self.kernel_init],
            dtype=as_dtype(self.dtype),
            param_dtype=as_dtype(self.param_dtype),
            name=name,
        )


class BatchNorm(nn.BatchNorm):
    """nn.BatchNorm in training, its variables the same, of a batch or of parts of it.

    Of parts it is ghost batch normalisation (Hoffer et al. 2017, "Train longer, generalize better",
    section 4). The running statistics move by the mean over the groups of their means and of their
    variances, as where every device has its own and these are averaged.

    Attributes:
      group: images in a row that are normalised together; None: all.
    """

    group: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Maps (N, ..., C) to the same shape."""
        if self.is_initializing():  # with one image, as a rule
            return super().__call__(x)
        check_bn_group(self.group, len(x))
        scale = jnp.ones(x.shape[-1:], self.param_dtype)
        if self.use_scale:
            scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", self.bias_init, x.shape[-1:], self.param_dtype)
        dtype = jnp.result_type(x, scale, bias) if self.dtype is None else self.dtype
        wide = x.astype(jnp.promote_types(dtype, jnp.float32))
        normalize = functools.partial(cpu_forms.batch_norm, epsilon=self.epsilon)
        if self.group is None:
            y, mean, var = normalize(wide, scale, bias)
        else:
            # Devices hold runs of rows: whole groups of one device stay there.
            groups = wide.reshape(-1, self.group, *x.shape[1:])
            y, means, variances = jax.vmap(normalize, (0, None, None))(groups, scale, bias)
            mean, var = jnp.mean(means, 0), jnp.mean(variances, 0)
        for name, found, start in (("mean", mean, jnp.zeros), ("var", var, jnp.ones)):
            kept = self.variable("batch_stats", name, start, x.shape[-1:], jnp.float32)
            kept.value = self.momentum * kept.value + (1 - self.momentum) * found
        return y.astype(dtype).reshape(x.shape)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """``lax.conv_general_dilated`` in the form that the backend runs fast."""
    form = cpu_forms.convolve if backend.is_cpu() else jax.lax.conv_general_dilated
    return form(x, kernel, strides, padding, **options)


# Keras's own: convolutions with biases, Glorot, and its BatchNorm's constants.
KERAS_DEFAULTS = Layers(
    bn_momentum=0.99, bn_epsilon=1e-3, conv_bias="all", kernel_init="glorot_uniform"
)


def max_pool(x: jax.Array, window: int, strides: int, pad: int | Literal["SAME"] = 0) -> jax.Array:
    """Square max-pool; ``pad`` rows and columns of minus infinity on each side.

    "SAME" is TensorFlow's padding: at stride 2 of an even map, at the far edges only.
    """
    square, steps = (window, window), (strides, strides)
    padding: Any = ((pad, pad), (pad, pad))
    if isinstance(pad, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], square, steps, pad)
    if backend.is_cpu():
        return cpu_forms.max_pool(x, window, strides, padding)
    return nn.max_pool(x, square, strides=steps, padding=padding)


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


def average_pool_2(x: jax.Array, strides: int = 2, dilation: int = 1) -> jax.Array:
    """2x2 averages; at the far edges, of the pixels that are there.

    Args:
      x: (N, H, W, C).
      strides: step in both directions.
      dilation: distance between the pixels that are averaged.

    Returns:
      (N, ceil(H / strides), ceil(W / strides), C).
    """
    for axis in (1, 2):
        size = x.shape[axis]
        near = jax.lax.slice_in_dim(x, 0, size, strides, axis)
        far = jnp.pad(x, [(0, dilation if a == axis else 0) for a in range(4)])
        far = jax.lax.slice_in_dim(far, dilation, dilation + size, strides, axis)
        count = 1 + (jnp.arange(0, size, strides) + dilation < size)
        x = (near + far) / jnp.expand_dims(count, [a for a in range(4) if a != axis]).astype(
            x.dtype
        )
    return x
