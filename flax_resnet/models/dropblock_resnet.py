"""The CIFAR-100 tutorial's network: four wide residual blocks, DropBlock, two wide dense layers.

A block is two units of BN, ReLU, 3x3 convolution, BN, ReLU, 3x3 convolution, the first taken
through a ReLU, the second added to it: h1 = ReLU(unit1(x)), h = ReLU(h1 + unit2(h1)). Then
DropBlock (Ghiasi et al. 2018) with blocks of 5, and a 3x3 max-pool of stride 2, padded as
TensorFlow does for "SAME". The tutorial
normalises the input before the network; here the training step does.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from flax_resnet.errors import check_range, check_types
from flax_resnet.models.arguments import Dtype, check_images, whole_numbers
from flax_resnet.models.layers import KERAS_DEFAULTS, Layers, max_pool
from flax_resnet.models.regularize import DropBlock, Rate


class ConvUnit(nn.Module):
    """BN, ReLU, 3x3 convolution, twice.

    Attributes:
      filters: output channels.
      layers: makes convolutions and norms.
    """

    filters: int
    layers: Layers = KERAS_DEFAULTS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to (N, H, W, filters)."""
        for i in (1, 2):
            x = nn.relu(self.layers.norm(train, name=f"norm{i}")(x))
            x = self.layers.conv(self.filters, 3, name=f"conv{i}")(x)
        return x


class DropBlockResNet(nn.Module):
    """The tutorial's network, for 32x32 images unless trained on another size.

    Attributes:
      num_classes: width of the output.
      stage_filters: channels of each residual block; each halves the map after it.
      dense_features: widths of the hidden dense layers.
      dropblock_rate: share of zeros by DropBlock; the tutorial's keep probability of 0.80 is 0.2.
      dropblock_size: side of DropBlock's blocks.
      dropblock_clamp: shrink the block on a map smaller than it. The tutorial's code leaves the
        last map, 4x4, as it is: False.
      dropout_rate: dropout after each hidden dense layer.
      dtype: computation dtype; "bfloat16" keeps statistics, parameters and loss in float32.
      param_dtype: storage dtype of the parameters.
      axis_name: mapped axis to share batch statistics over, under jax.pmap only.
    """

    num_classes: int = 100
    stage_filters: Sequence[int] = (128, 256, 512, 1024)
    dense_features: Sequence[int] = (4096, 4096)
    dropblock_rate: float = 0.2
    dropblock_size: int = 5
    dropblock_clamp: bool = True
    dropout_rate: float = 0.5
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    axis_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_types(self)
        for name in ("stage_filters", "dense_features"):
            object.__setattr__(self, name, whole_numbers(name, getattr(self, name)))
        check_range("num_classes", self.num_classes, 1)
        check_range("dropblock_size", self.dropblock_size, 1)

    @property
    def layers(self) -> Layers:
        """What makes this network's convolutions, norms and dense layers."""
        return KERAS_DEFAULTS.with_fields_of(self)

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, *, dropblock_rate: Rate | None = None
    ) -> jax.Array:
        """Maps images (N, H, W, C) to logits (N, num_classes).

        Args:
          x: images of at least 2^stages on a side.
          train: normalise by the batch, update running statistics, drop; needs a "dropout"
            random stream.
          dropblock_rate: in place of the field's; may be traced, so that annealing it never
            compiles again.
        """
        least = 2 ** len(self.stage_filters)
        check_images(x, least, "fewer stage_filters")
        layers = self.layers
        rate = self.dropblock_rate if dropblock_rate is None else dropblock_rate
        for stage, filters in enumerate(self.stage_filters, start=1):
            h = nn.relu(ConvUnit(filters, layers, name=f"stage{stage}_unit1")(x, train))
            x = nn.relu(h + ConvUnit(filters, layers, name=f"stage{stage}_unit2")(h, train))
            x = DropBlock(self.dropblock_size, self.dropblock_clamp)(x, rate, train)
            x = max_pool(x, 3, 2, pad="SAME")
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.dense_features, start=1):
            x = nn.relu(layers.dense(width, name=f"dense{i}")(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return layers.dense(self.num_classes, name="head")(x)
