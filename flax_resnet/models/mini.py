"""The CIFAR-10 tutorial's "MiniModel": 12 pre-activation units with max-pool branches.

The unit is the full pre-activation of He et al. 2016, "Identity Mappings in Deep Residual
Networks", figure 4(e), with the tutorial's own way to halve the map: the branch is max-pooled
and the shortcut is a strided 1x1 convolution of the unpooled input. Convolutions carry biases,
and initialisation and normalisation constants are the Keras defaults (Glorot uniform,
momentum 0.99, epsilon 1e-3), so that the network is the tutorial's to the last parameter:
4,368,714 at ten classes and three input channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.errors import check_range, check_types
from flax_resnet.models.arguments import Dtype, check_images, whole_numbers
from flax_resnet.models.layers import KERAS_DEFAULTS, Layers, max_pool


class ResidualUnit(nn.Module):
    """BN, ReLU, 3x3 convolution, twice; then the sum with the shortcut.

    Attributes:
      filters: output channels; without ``pool`` they must equal the input's.
      pool: halve height and width: 2x2 max-pool on the branch, 1x1 convolution of
        stride 2 on the shortcut.
      residual: False leaves the shortcut out, the plain unit that the tutorial compares with.
      layers: makes convolutions and norms.
    """

    filters: int
    pool: bool = False
    residual: bool = True
    layers: Layers = KERAS_DEFAULTS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to (N, H', W', filters), H' = H // 2 with ``pool`` and H without."""
        if self.residual and not self.pool and x.shape[-1] != self.filters:
            raise ValueError(
                f"a unit without pool adds its input of {x.shape[-1]} channels to "
                f"{self.filters} filters; set pool=True or filters={x.shape[-1]}"
            )
        shortcut, h = x, x
        if self.pool:
            h = max_pool(x, 2, 2)
            if self.residual:
                # 'VALID', as Keras computes a strided 1x1 convolution of an even map.
                even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
                shortcut = self.layers.conv(self.filters, 1, 2, name="shortcut")(even)
        for i in (1, 2):
            h = nn.relu(self.layers.norm(train, name=f"norm{i}")(h))
            h = self.layers.conv(self.filters, 3, name=f"conv{i}")(h)
        return h + shortcut if self.residual else h


class MiniModel(nn.Module):
    """The tutorial's network: a convolution, twelve units in four stages, a dense head.

    The tutorial's 4x4 average pool covers the whole 4x4 map of a 32x32 input; here it is the
    global average, the same numbers there and defined for every input of 8x8 and more.

    Attributes:
      num_classes: width of the output.
      stage_sizes: units in each stage; every stage after the first starts with a pooling unit.
      num_filters: channels of the first stage, doubled with each later one.
      dropout_rate: share of the ReLU'd final map set to zero in training.
      residual: False gives the plain network of the tutorial's comparison.
      dtype: computation dtype; "bfloat16" keeps statistics, parameters and loss in float32.
      param_dtype: storage dtype of the parameters.
      axis_name: mapped axis to share batch statistics over, under jax.pmap only.
    """

    num_classes: int = 10
    stage_sizes: Sequence[int] = (3, 3, 3, 3)
    num_filters: int = 32
    dropout_rate: float = 0.25
    residual: bool = True
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    axis_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self)
        object.__setattr__(self, "stage_sizes", whole_numbers("stage_sizes", self.stage_sizes))
        check_range("num_classes", self.num_classes, 1)

    @property
    def layers(self) -> Layers:
        """What makes this network's convolutions, norms and dense layers."""
        return KERAS_DEFAULTS.with_fields_of(self)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, C) to logits (N, num_classes)."""
        layers = self.layers
        least = 2 ** (len(self.stage_sizes) - 1)
        check_images(x, least, "fewer stages")
        x = layers.conv(self.num_filters, 3, name="stem_conv")(x)
        for stage, num_units in enumerate(self.stage_sizes):
            for unit in range(num_units):
                x = ResidualUnit(
                    self.num_filters * 2**stage,
                    pool=stage > 0 and unit == 0,
                    residual=self.residual,
                    layers=layers,
                    name=f"stage{stage + 1}_unit{unit + 1}",
                )(x, train)
        x = nn.relu(layers.norm(train, name="final_norm")(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return layers.dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))
