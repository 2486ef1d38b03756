"""What the CIFAR-10 speed runs alone need: a network, a schedule, a rule for the stem's bias.

K. Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498 (airbench).
After a convolution that whitens 2x2 patches, and stays as it is, each stage is a convolution, a
max-pool and one or two convolutions more, each with a norm and GELU. Kernels start as identities in
part, norms have no scale, and the logits are scaled down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from flax_resnet import SGD
from flax_resnet.errors import POSITIVE, check_range
from flax_resnet.models.arguments import Dtype, as_dtype, check_images, whole_numbers
from flax_resnet.models.layers import InitKind, Layers, convolve, lecun_third_uniform, max_pool
from flax_resnet.optim.schedules import Shape, check_shares

# Images whose patches are summed at a time.
CHUNK = 256


class Whitening(nn.Module):
    """A convolution of all k x k patches, without padding, to twice as many filters as they have.

    Attributes:
      kernel_size: k.
      frozen: the kernel gets no gradient.
      layers: says the dtypes.
    """

    kernel_size: int = 2
    frozen: bool = True
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to (N, H - k + 1, W - k + 1, 2 k k C)."""
        size, channels, kind = self.kernel_size, x.shape[-1], as_dtype(self.layers.param_dtype)
        filters = 2 * size**2 * channels
        kernel = self.param("kernel", lecun_third_uniform, (size, size, channels, filters), kind)
        bias = self.param("bias", nn.initializers.zeros, (filters,), kind)
        kernel = jax.lax.stop_gradient(kernel) if self.frozen else kernel
        x, kernel, bias = nn.dtypes.promote_dtype(
            x, kernel, bias, dtype=as_dtype(self.layers.dtype)
        )
        out = convolve(
            x,
            kernel,
            (1, 1),
            ((0, 0), (0, 0)),
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=1,
        )
        return out + bias


def whitening_kernel(images: np.ndarray, kernel_size: int = 2, epsilon: float = 5e-4) -> np.ndarray:
    """Filters whose answers to the patches of ``images`` have unit variance and do not correlate.

    They are the eigenvectors of the patches' second moments about zero over the roots of the
    eigenvalues, the largest first; then the same with the other sign (section 3.2).

    Images are normalised, (N, H, W, C); ``epsilon`` is added to the eigenvalues. Returns float32
    (k, k, C, 2 k k C).
    """
    _, height, width, channels = images.shape
    rows, columns = height - kernel_size + 1, width - kernel_size + 1
    taps = [divmod(tap, kernel_size) for tap in range(kernel_size**2)]
    moments, count = np.zeros((len(taps) * channels,) * 2), 0
    for start in range(0, len(images), CHUNK):
        part = np.asarray(images[start : start + CHUNK], np.float64)
        patches = np.concatenate([part[:, i : i + rows, j : j + columns] for i, j in taps], -1)
        patches = patches.reshape(-1, len(moments))
        moments += patches.T @ patches
        count += len(patches)
    values, vectors = np.linalg.eigh(moments / count)
    filters = (vectors / np.sqrt(values + epsilon))[:, ::-1]
    kernel = np.concatenate([filters, -filters], axis=1)
    return kernel.reshape(kernel_size, kernel_size, channels, -1).astype(np.float32)


class SpeedStage(nn.Module):
    """A convolution, a 2x2 max-pool, and ``convs - 1`` convolutions more, each normed and GELU'd.

    Attributes:
      filters: output channels.
      convs: 3x3 convolutions, 1 or more.
      residual: add the first one's output to the last one's norm, before its GELU.
      layers: makes convolutions and norms.
    """

    filters: int
    convs: int = 2
    residual: bool = False
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to (N, H // 2, W // 2, filters)."""
        first = x
        for number in range(1, self.convs + 1):
            x = self.layers.conv(self.filters, 3, name=f"conv{number}")(x)
            x = max_pool(x, 2, 2) if number == 1 else x
            x = self.layers.norm(train, name=f"norm{number}")(x)
            x = x + first if self.residual and number == self.convs > 1 else x
            x = nn.gelu(x, approximate=False)
            first = x if number == 1 else first
        return x


def _largest(x: jax.Array) -> jax.Array:
    """The largest of each map: (N, H, W, C) to (N, C).

    By its place: the gradient of ``jnp.max`` asks which values equal the maximum, and where XLA
    computes them twice, rounded otherwise, none does and it is 0 / 0.
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    place = jnp.argmax(jax.lax.stop_gradient(flat), axis=1, keepdims=True)
    return jnp.take_along_axis(flat, place, axis=1)[:, 0]


class SpeedNet(nn.Module):
    """The whitening stem, stages, a max-pool over the whole map, and a linear head.

    Attributes:
      num_classes: width of the output.
      stage_filters: channels of each stage.
      stage_convs: convolutions of each stage.
      residual: each stage adds its first convolution's output to its last one's.
      whiten: the stem is a whitening of the training images and its kernel does not train; False:
        an ordinary convolution of that shape.
      whiten_epsilon: added to the eigenvalues, in units of the normalised images' variance.
      kernel_init: of the stages: "identity" in part, "he_normal" or "glorot_uniform".
      logit_scale: what the logits are multiplied by.
      bn_momentum: share of the running statistics kept at each step.
      bn_epsilon: added to the variance.
      dtype: computation dtype; "bfloat16" keeps statistics, parameters and loss in float32.
      param_dtype: storage dtype of the parameters.
      axis_name: mapped axis to share batch statistics over, under jax.pmap only.
    """

    num_classes: int = 10
    stage_filters: Sequence[int] = (64, 256, 256)
    stage_convs: int = 2
    residual: bool = False
    whiten: bool = True
    whiten_epsilon: float = 5e-4
    kernel_init: InitKind = "identity"
    logit_scale: float = 1 / 9
    bn_momentum: float = 0.6
    bn_epsilon: float = 1e-12
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    axis_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = whole_numbers("stage_filters", self.stage_filters)
        object.__setattr__(self, "stage_filters", stages)
        for name, least in {
            "num_classes": 1,
            "stage_convs": 1,
            "whiten_epsilon": 0,
            "logit_scale": POSITIVE,
        }.items():
            check_range(name, getattr(self, name), least)

    @property
    def layers(self) -> Layers:
        """What makes this network's convolutions, norms and dense layers."""
        return Layers(bn_scale=False).with_fields_of(self)

    @property
    def frozen_parameters(self) -> tuple[str, ...]:
        """What ``trainable`` keeps from the optimizer."""
        return ("stem_conv/kernel",) if self.whiten else ()

    def from_images(self, params: Mapping[str, Any], images: np.ndarray) -> dict[str, Any]:
        """Fresh parameters with the stem made to whiten images (N, H, W, C), normalised."""
        if not self.whiten:
            return dict(params)
        stem = params["stem_conv"]
        kernel = whitening_kernel(images, stem["kernel"].shape[0], self.whiten_epsilon)
        kernel = kernel.astype(stem["kernel"].dtype)
        return {**params, "stem_conv": {**stem, "kernel": kernel}}

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, C) to logits (N, num_classes)."""
        check_images(x, 2 ** len(self.stage_filters) + 1, "fewer stages")
        layers = self.layers
        x = Whitening(frozen=self.whiten, layers=layers, name="stem_conv")(x)
        x = nn.gelu(x, approximate=False)
        for number, filters in enumerate(self.stage_filters, 1):
            stage = SpeedStage(
                filters, self.stage_convs, self.residual, layers, name=f"stage{number}_block1"
            )
            x = stage(x, train)
        logits = layers.dense(self.num_classes, name="head", bias=False)(_largest(x))
        return logits * self.logit_scale


@dataclasses.dataclass(frozen=True)
class Triangle(Shape):
    """Straight up to the peak and straight down (K. Jordan 2024, section 3.1)."""

    start: float = 0.2
    """The first rate, as a share of the peak."""
    rise: float = 0.23
    """Share of the run spent rising."""
    final: float = 0.07
    """The rate that the line ends at, one step past the run, as a share of the peak."""

    def __post_init__(self) -> None:
        check_shares("rise", [self.rise])

    def build(self, peak: float, num_steps: int) -> optax.Schedule:
        """The optax schedule, step (int) to learning rate, for a run of ``num_steps``."""
        top = int(self.rise * num_steps)
        fall = optax.linear_schedule(peak, self.final * peak, num_steps - top)
        rise = optax.linear_schedule(self.start * peak, peak, top)
        return optax.join_schedules([rise, fall], [top]) if top else fall


@dataclasses.dataclass(frozen=True)
class SpeedSGD(SGD):
    """SGD that stops updating the bias of the stem's convolution early."""

    stem_bias_until: float = 1.0
    """Share of the run after which the bias of the stem's convolution rests."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("optimizer.stem_bias_until", self.stem_bias_until, 0)

    def build(
        self, num_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
        """The transformation and the schedule, as SGD's."""
        tx, schedule = super().build(num_steps, steps_per_epoch)
        moves = round(self.stem_bias_until * num_steps)
        rest = optax.scale_by_schedule(lambda step: jnp.where(step < moves, 1.0, 0.0))
        parts = optax.chain(tx, optax.masked(rest, _stem_bias))
        return optax.with_extra_args_support(parts), schedule


def _stem_bias(params: Any) -> Any:
    """A tree of bools: True at the bias of the stem's convolution."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: [getattr(key, "key", "") for key in path[-2:]] == ["stem_conv", "bias"],
        params,
    )
