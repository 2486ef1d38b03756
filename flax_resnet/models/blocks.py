"""The residual blocks: one skeleton, post- and pre-activated, of one, two or three convolutions.

A block is a list of convolutions (``convs``) and the order of norm, ReLU and convolution
(``preactivation``); all else is a field. A new block overrides ``convs`` or ``branch``.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.errors import UserError, check_types
from flax_resnet.models.layers import Layers, ShortcutKind, average_pool_2, shortcut_a
from flax_resnet.models.regularize import DropBlock, Rate, drop_path, is_zero

Connection = Literal["residual", "plain", "highway"]
StrideConv = Literal["1x1", "3x3"]


class ConvSpec(NamedTuple):
    """One convolution of a block's branch."""

    filters: int
    kernel_size: int
    strides: int = 1
    dilation: int = 1
    groups: int = 1


class SqueezeExcite(nn.Module):
    """Channel gates from the global average (Hu et al. 2018, section 3).

    Attributes:
      reduction: inner width is the channels over this.
      layers: makes the layers.
    """

    reduction: int = 16
    layers: Layers = Layers()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (N, H, W, C) to the same shape."""
        channels = x.shape[-1]
        squeezed = jnp.mean(x, axis=(1, 2))
        inner = nn.relu(
            self.layers.dense(max(1, channels // self.reduction), name="reduce")(squeezed)
        )
        gates = nn.sigmoid(self.layers.dense(channels, name="expand")(inner))
        return x * gates[:, None, None, :]


class Block(nn.Module):
    """What all blocks share: branch, shortcut, and how the two meet.

    Attributes:
      filters: base width; ``filters * expansion`` channels leave the block.
      strides: stride of one convolution of the branch, and of the shortcut.
      first_dilation: dilation of the convolutions before the stride and of the strided one.
      dilation: dilation of those after it.
      layers: makes convolutions and norms.
      shortcut: "A" pads new channels with zeros, "B" projects where the shape changes, "C"
        projects in every block (He et al. 2016, section 4.1), "D" is B with 2x2 averages in
        place of the projection's stride (He et al. 2019, section 4.2).
      connection: "residual" adds the shortcut, "plain" has none, "highway" mixes branch and
        shortcut by a learned gate (Srivastava et al. 2015).
      gate_bias: start of a highway gate's bias; negative lets the input through.
      stride_conv: where a three-layer block strides: "3x3" (v1.5) or the first "1x1" (v1).
      groups: channel groups of the 3x3 convolution (Xie et al. 2017).
      width_per_group: channels of one group for each 64 filters (torchvision's field).
      se_reduction: squeeze-and-excite the branch with this reduction; None: not at all.
      zero_init_last: start the branch at zero, by the last norm's scale (Goyal et al. 2017,
        section 5.1) or, where the branch ends with a convolution, by its kernel.
      dropout_rate: dropout before the last convolution (Zagoruyko and Komodakis 2016).
      dropblock_size: side of DropBlock's blocks.
    """

    filters: int
    strides: int = 1
    first_dilation: int = 1
    dilation: int = 1
    layers: Layers = Layers()
    shortcut: ShortcutKind = "B"
    connection: Connection = "residual"
    gate_bias: float = -2.0
    stride_conv: StrideConv = "3x3"
    groups: int = 1
    width_per_group: int = 64
    se_reduction: int | None = None
    zero_init_last: bool = False
    dropout_rate: float = 0.0
    dropblock_size: int = 7

    expansion: ClassVar[int] = 1
    """Channels out for each filter."""
    grouped: ClassVar[bool] = False
    """Takes ``groups`` and ``width_per_group``."""
    preactivation: ClassVar[bool] = False
    """Norm and ReLU before each convolution rather than after."""

    def convs(self) -> tuple[ConvSpec, ...]:
        """The convolutions of the branch, in order.

        Those with a kernel above 1x1 take ``first_dilation`` up to the strided one and with
        it, ``dilation`` after it, or ``output_stride`` has no effect on them.
        """
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        drop_path_rate: Rate = 0.0,
        dropblock_rate: Rate = 0.0,
    ) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / strides), ceil(W / strides), filters * expansion)."""
        self._check()
        source = x
        if self.preactivation:
            source = nn.relu(self.layers.norm(train, name="norm1")(x))
        h = self.branch(source, train, dropblock_rate)
        if self.se_reduction:
            h = SqueezeExcite(self.se_reduction, self.layers, name="se")(h)
        if train and not is_zero(drop_path_rate):
            h = drop_path(self.make_rng("dropout"), h, drop_path_rate)
        last = (lambda y: y) if self.preactivation else nn.relu
        if self.connection == "plain":
            return last(h)
        carried = self._drop_block(self._shortcut(x, source, train), train, dropblock_rate)
        if self.connection == "residual":
            return last(h + carried)
        gate = self._gate(x)
        return gate * last(h) + (1 - gate) * carried

    def branch(self, h: jax.Array, train: bool, dropblock_rate: Rate) -> jax.Array:
        """The convolutions with their norms; with ``preactivation`` the first is done already."""
        specs, layers = self.convs(), self.layers
        zero_kernel = self.zero_init_last and (self.preactivation or layers.norm_kind == "none")
        for i, spec in enumerate(specs, start=1):
            ends = i == len(specs)
            if self.preactivation and i > 1:
                h = nn.relu(layers.norm(train, name=f"norm{i}")(h))
            if ends and self.dropout_rate:
                h = nn.Dropout(self.dropout_rate, deterministic=not train)(h)
            h = layers.conv(
                spec.filters,
                spec.kernel_size,
                spec.strides,
                dilation=spec.dilation,
                groups=spec.groups,
                normed=not (self.preactivation and ends),
                zero=zero_kernel and ends,
                name=f"conv{i}",
            )(h)
            if not self.preactivation:
                h = layers.norm(train, name=f"norm{i}", zero=self.zero_init_last and ends)(h)
            h = self._drop_block(h, train, dropblock_rate)
            if not self.preactivation and not ends:
                h = nn.relu(h)
        return h

    def _shortcut(self, x: jax.Array, source: jax.Array, train: bool) -> jax.Array:
        """What is carried past the branch; a projection sees what the branch sees (``source``)."""
        width, kind, strides = self.filters * self.expansion, self.shortcut, self.strides
        changes = strides != 1 or x.shape[-1] != width
        if kind == "A" or not (changes or kind == "C"):
            return shortcut_a(x, width, strides) if changes else x
        if kind == "D" and (strides != 1 or self.dilation != self.first_dilation):
            # Where the stride has become dilation, the averages are taken at every pixel.
            source, strides = average_pool_2(source, strides, self.first_dilation), 1
        normed = not self.preactivation
        h = self.layers.conv(width, 1, strides, normed=normed, name="shortcut_conv")(source)
        if normed:
            h = self.layers.norm(train, name="shortcut_norm")(h)
        return h

    def _gate(self, x: jax.Array) -> jax.Array:
        """The transform gate, a convolution shaped like the block's first (section 2)."""
        first = self.convs()[0]
        width, kernel_size = self.filters * self.expansion, first.kernel_size
        conv = self.layers.conv(width, kernel_size, self.strides, name="gate", bias=self.gate_bias)
        return nn.sigmoid(conv(x))

    def _drop_block(self, h: jax.Array, train: bool, rate: Rate) -> jax.Array:
        return DropBlock(self.dropblock_size)(h, rate, train)

    def _check(self) -> None:
        check_types(self)
        for spec in self.convs():
            if spec.filters < 1:
                raise UserError(
                    f"{type(self).__name__} with filters={self.filters}, width_per_group="
                    f"{self.width_per_group}: a convolution is left without channels; use more"
                )
        if not self.grouped and (self.groups, self.width_per_group) != (1, 64):
            raise UserError(
                f"{type(self).__name__} with groups={self.groups}, width_per_group="
                f"{self.width_per_group}: it has no inner width; expected 1 and 64, or a "
                "bottleneck block"
            )


class BasicBlock(Block):
    """Two 3x3 convolutions (He et al. 2016, section 3.3 and figure 5 left)."""

    def convs(self) -> tuple[ConvSpec, ...]:
        """3x3 with the stride, 3x3."""
        return (
            ConvSpec(self.filters, 3, self.strides, self.first_dilation),
            ConvSpec(self.filters, 3, 1, self.dilation),
        )


class BottleneckBlock(Block):
    """1x1, 3x3 and 1x1 convolutions (He et al. 2016, figure 5 right)."""

    expansion: ClassVar[int] = 4
    grouped: ClassVar[bool] = True

    def convs(self) -> tuple[ConvSpec, ...]:
        """1x1 to the inner width, 3x3 in groups, 1x1 to four times the filters."""
        width = self.filters * self.width_per_group // 64 * self.groups
        early = self.stride_conv == "1x1"
        dilation = self.dilation if early else self.first_dilation
        return (
            ConvSpec(width, 1, self.strides if early else 1),
            ConvSpec(width, 3, 1 if early else self.strides, dilation, self.groups),
            ConvSpec(self.filters * self.expansion, 1),
        )


class PreActBasicBlock(BasicBlock):
    """BasicBlock with full pre-activation (He et al. 2016b, "Identity Mappings", figure 4e)."""

    preactivation: ClassVar[bool] = True


class PreActBottleneckBlock(BottleneckBlock):
    """BottleneckBlock with full pre-activation (He et al. 2016b, figure 4e)."""

    preactivation: ClassVar[bool] = True
