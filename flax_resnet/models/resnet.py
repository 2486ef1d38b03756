"""The residual network: stem, stages of blocks, pooling, head.

He et al. 2016, "Deep Residual Learning", and what came after it. Members of the family differ
by the block class and by fields; ``models.zoo`` has those with a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.errors import UserError, check_range, check_types
from flax_resnet.models.arguments import Dtype, check_images, whole_numbers
from flax_resnet.models.blocks import BasicBlock, Block, Connection, StrideConv
from flax_resnet.models.layers import BiasKind, InitKind, Layers, NormKind, ShortcutKind, max_pool
from flax_resnet.models.regularize import Rate, is_zero
from flax_resnet.models.stages import Feature, block_name, blocks_name

StemKind = Literal["imagenet", "deep", "cifar"]


class ResNet(nn.Module):
    """A residual network: stem, stages of ``block_cls``, global average, dense head.

    Blocks are named ``stageI_blockJ``; with ``scan_blocks`` the equal ones of a stage are one
    ``stageI_blocks`` with a leading axis. ``models.variables`` converts between the two.

    Attributes:
      stage_sizes: blocks in each stage; every stage after the first halves the map.
      block_cls: the block, a subclass of models.blocks.Block.
      num_classes: width of the output.
      num_filters: base width of the first stage, doubled with each later one.
      stem: "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2; "deep"
        has three 3x3 in place of the 7x7 (He et al. 2019, section 4.2); "cifar" is one 3x3.
      stem_filters: channels of the stem; None: num_filters.
      stem_pool_zeros: pad the stem's max-pool with zeros, as Keras V2 does, not minus infinity.
      shortcut: "A" zero-pads, "B" projects where the shape changes, "C" projects in every
        block, "D" is B after 2x2 averages.
      connection: "residual", "plain" (no shortcuts), or "highway" (a learned gate).
      gate_bias: start of a highway gate's bias; negative lets the input through.
      stride_conv: where a bottleneck strides, in the "3x3" (v1.5) or the first "1x1" (v1).
      stride_block: where a stage halves the map, in its "first" block, or in the "last" one of
        the stage before (Keras V2).
      groups: channel groups of a bottleneck's 3x3 (ResNeXt's cardinality).
      width_per_group: a bottleneck's channels in one group for each 64 filters.
      se_reduction: squeeze-and-excitation with this reduction, 16 in the paper; None: none.
      zero_init_last: start each branch at zero.
      norm_kind: "batch"; "frozen", whose statistics stay those that the network was given; or
        "none" (convolutions have biases then).
      bn_momentum: share of the running statistics kept at each step (torch's 0.1 is 0.9 here).
      bn_epsilon: added to the variance.
      bn_group: images in a row that are normalised together in training, 32 in Goyal et al. 2017,
        section 2.3 (Hoffer et al. 2017, section 4); None: the whole batch, over all devices.
      conv_bias: convolutions with a bias: "none", "unnormalized" (no norm follows) or "all".
      kernel_init: "he_normal" (fan-out), "glorot_uniform" (Keras) or "identity" (the first filters
        of a convolution hand their channel on).
      dropout_rate: dropout before each block's last convolution.
      drop_path_rate: stochastic depth: chance to drop the last of L branches; that of branch
        l is l / L of it (Huang et al. 2016, section 3).
      dropblock_rate: share of zeros by DropBlock in the last stage, a quarter of it in the
        stage before (Ghiasi et al. 2018, section 4.1).
      dropblock_size: side of DropBlock's blocks.
      hidden_units: widths of dense layers with ReLU between the global average and the head.
      include_top: end with the head; without it, with ``pooling``.
      pooling: without the top: None gives the last map, "avg" or "max" its global pool.
      output_stride: dilate in place of striding once the map is this much smaller than the
        input (for dense prediction); None: stride everywhere.
      frozen_stages: leading parts that do not train: -1 none, 0 the stem, k the stem and k
        stages. Their statistics stay, and no gradient is computed below them.
      scan_blocks: compile the equal blocks of a stage once (flax's scan).
      remat: keep only the blocks' inputs for the backward pass, and compute the rest again.
      dtype: computation dtype; "bfloat16" keeps statistics, parameters and loss in float32.
      param_dtype: storage dtype of the parameters.
      axis_name: mapped axis to share batch statistics over, under jax.pmap only.
    """

    stage_sizes: Sequence[int]
    block_cls: type[Block] = BasicBlock
    num_classes: int = 1000
    num_filters: int = 64
    stem: StemKind = "imagenet"
    stem_filters: int | None = None
    stem_pool_zeros: bool = False
    shortcut: ShortcutKind = "B"
    connection: Connection = "residual"
    gate_bias: float = -2.0
    stride_conv: StrideConv = "3x3"
    stride_block: Literal["first", "last"] = "first"
    groups: int = 1
    width_per_group: int = 64
    se_reduction: int | None = None
    zero_init_last: bool = False
    norm_kind: NormKind = "batch"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    bn_group: int | None = None
    conv_bias: BiasKind = "none"
    kernel_init: InitKind = "he_normal"
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dropblock_rate: float = 0.0
    dropblock_size: int = 7
    hidden_units: Sequence[int] = ()
    include_top: bool = True
    pooling: Literal["avg", "max"] | None = None
    output_stride: int | None = None
    frozen_stages: int = -1
    scan_blocks: bool = False
    remat: bool = False
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    axis_name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = whole_numbers("stage_sizes", self.stage_sizes)
        object.__setattr__(self, "stage_sizes", sizes)  # a list would not hash
        hidden = self.hidden_units and whole_numbers("hidden_units", self.hidden_units)
        object.__setattr__(self, "hidden_units", tuple(hidden))
        stages = len(sizes)
        check_types(self)
        if not (isinstance(self.block_cls, type) and issubclass(self.block_cls, Block)):
            raise UserError(
                f"block_cls={self.block_cls}: expected a subclass of Block, such as BasicBlock"
            )
        if self.stride_block == "last" and min(sizes) < 2:
            raise UserError(
                f"stage_sizes={sizes}: with stride_block='last' a stage needs 2 blocks or more, "
                "one to widen and one to stride"
            )
        if self.frozen_stages not in range(-1, stages + 1):
            raise UserError(f"frozen_stages={self.frozen_stages}: expected -1 to {stages}")
        strides = [self.stem_stride * 2**k for k in range(stages)]
        if self.output_stride is not None and self.output_stride not in strides:
            raise UserError(
                f"output_stride={self.output_stride}: expected None or one of {strides}"
            )
        if self.connection == "plain" and self.drop_path_rate:
            raise UserError(
                f"drop_path_rate={self.drop_path_rate} with connection='plain': nothing would be "
                "left of a dropped block; use 0, or another connection"
            )
        for name in ("dropout_rate", "drop_path_rate", "dropblock_rate", "bn_momentum"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("num_classes", "num_filters", "stem_filters", "groups", "width_per_group",
                     "se_reduction", "dropblock_size"):  # fmt: skip
            check_range(name, getattr(self, name), 1)
        _ = self.layers  # checks bn_group

    @property
    def layers(self) -> Layers:
        """What makes this network's convolutions, norms and dense layers."""
        return Layers().with_fields_of(self)

    @property
    def stem_stride(self) -> int:
        """Stride of the stem, its pool included."""
        return 1 if self.stem == "cifar" else 4

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return self.num_filters * 2 ** (len(self.stage_sizes) - 1) * self.block_cls.expansion

    def __call__(
        self, x: jax.Array, train: bool = False, *, dropblock_rate: Rate | None = None
    ) -> jax.Array:
        """Maps images (N, H, W, C) to logits (N, num_classes); without the top, to features.

        Args:
          x: images.
          train: normalise by the batch, update running statistics, drop what rates say; a
            rate other than 0 needs a "dropout" random stream.
          dropblock_rate: in place of the field's; may be traced, so that annealing it never
            compiles again.

        Raises:
          UserError: the input is too small, or its channels are not those of the weights.
        """
        return self._forward(x, train, dropblock_rate, self.include_top)[1]

    def features(
        self, x: jax.Array, train: bool = False, *, dropblock_rate: Rate | None = None
    ) -> tuple[Feature, ...]:
        """Each stage's map, as ``module.apply(variables, x, method="features")``.

        A pre-activated network's last map is taken after the final norm and ReLU, the others
        are its unnormalised sums.
        """
        return self._forward(x, train, dropblock_rate, False)[0]

    @nn.nowrap
    def block(self, stage: int, index: int, name: str | None = None) -> Block:
        """Block ``index`` of ``stage``, both counted from 0, as a module of its own.

        Outside the network it can be applied alone, to ``params[block_name(stage, index)]``.
        """
        strides, before, after, _ = self._geometry(stage)
        last = self.stage_sizes[stage] - 1
        at = 0 if self.stride_block == "first" else last
        # A late stride finds the channels widened already: what is left is to subsample, which
        # is what Keras's max-pool of window 1 does.
        subsamples = self.stride_block == "last" and index == last
        return self.block_cls(
            filters=self.num_filters * 2**stage,
            strides=strides if index == at else 1,
            first_dilation=before if index <= at else after,
            dilation=before if index < at else after,
            layers=self.layers,
            shortcut="A" if subsamples else self.shortcut,
            connection=self.connection,
            gate_bias=self.gate_bias,
            stride_conv=self.stride_conv,
            groups=self.groups,
            width_per_group=self.width_per_group,
            se_reduction=self.se_reduction,
            zero_init_last=self.zero_init_last,
            dropout_rate=self.dropout_rate,
            dropblock_size=self.dropblock_size,
            name=name or block_name(stage, index),
        )

    @nn.nowrap
    def equal_blocks(self, stage: int) -> range:
        """Indices of the blocks that ``scan_blocks`` makes one: all but those that change shape."""
        return range(1, self.stage_sizes[stage] - (self.stride_block == "last"))

    @nn.nowrap
    def _geometry(self, stage: int) -> tuple[int, int, int, int]:
        """(stride of the stage's striding block, dilation before it, after it, stride so far)."""
        stride, dilation = self.stem_stride, 1
        for s in range(stage + 1):
            halves = s > 0 if self.stride_block == "first" else s < len(self.stage_sizes) - 1
            before, here = dilation, 1
            if halves and self.output_stride is not None and stride >= self.output_stride:
                dilation *= 2
            elif halves:
                here = 2
                stride *= 2
        return here, before, dilation, stride

    def classify(self, features: jax.Array, train: bool = False) -> jax.Array:
        """The top alone, as ``module.apply(variables, features, method="classify")``.

        Args:
          features: (N, num_features), what ``include_top=False, pooling="avg"`` gives.
          train: changes nothing; the loop that trains a top on features says it.

        Returns:
          Logits (N, num_classes).
        """
        return self._forward(features, train, None, True)[1]

    @nn.compact
    def _forward(
        self, x: jax.Array, train: bool, dropblock_rate: Rate | None, top: bool
    ) -> tuple[tuple[Feature, ...], jax.Array]:
        """(every stage's features, output); pooled features (N, C) go to the top at once."""
        if x.ndim == 2 and x.shape[1] == self.num_features:
            return (), self._top(x)
        self._check_input(x)
        stages, found = len(self.stage_sizes), []
        x = self._freeze(self._stem(x, train and self.frozen_stages < 0), 0)
        for stage in range(stages):
            x = self._stage(x, stage, train and stage + 1 > self.frozen_stages, dropblock_rate)
            if stage + 1 == stages and self.block_cls.preactivation:
                trains = train and stages > self.frozen_stages
                x = nn.relu(self.layers.norm(trains, name="final_norm")(x))
            x = self._freeze(x, stage + 1)
            stride = self._geometry(stage)[-1]
            found.append(Feature(x, f"stage{stage + 1}", stride, x.shape[-1]))
        if top:
            x = self._top(jnp.mean(x, axis=(1, 2)))
        elif self.pooling is not None:
            x = (jnp.max if self.pooling == "max" else jnp.mean)(x, axis=(1, 2))
        return tuple(found), x

    def _top(self, x: jax.Array) -> jax.Array:
        for i, width in enumerate(self.hidden_units, start=1):
            x = nn.relu(self.layers.dense(width, name=f"hidden{i}")(x))
        return self.layers.dense(self.num_classes, name="head")(x)

    def _freeze(self, x: jax.Array, part: int) -> jax.Array:
        return jax.lax.stop_gradient(x) if part == self.frozen_stages else x

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        width = self.stem_filters or self.num_filters
        normed = not self.block_cls.preactivation
        strides = 1 if self.stem == "cifar" else 2
        if self.stem == "deep":
            for i, stride in ((1, 2), (2, 1)):
                x = self.layers.conv(width // 2, 3, stride, name=f"stem_conv{i}")(x)
                x = nn.relu(self.layers.norm(train, name=f"stem_norm{i}")(x))
            strides = 1
        kernel_size = 7 if self.stem == "imagenet" else 3
        x = self.layers.conv(width, kernel_size, strides, normed=normed, name="stem_conv")(x)
        if normed:
            x = nn.relu(self.layers.norm(train, name="stem_norm")(x))
        if self.stem == "cifar":
            return x
        if self.stem_pool_zeros:
            return max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2)
        return max_pool(x, 3, 2, pad=1)

    def _stage(
        self, x: jax.Array, stage: int, train: bool, dropblock_rate: Rate | None
    ) -> jax.Array:
        """The blocks of one stage, the equal ones scanned where that is asked for."""
        first, total = sum(self.stage_sizes[:stage]), sum(self.stage_sizes)
        base = self.dropblock_rate if dropblock_rate is None else dropblock_rate
        share = {len(self.stage_sizes): 1.0, len(self.stage_sizes) - 1: 0.25}.get(stage + 1)
        dropped = {} if share is None or is_zero(base) else {"dropblock_rate": base * share}

        def run(block: Block, x: jax.Array, rates: dict[str, Rate]) -> tuple[jax.Array, None]:
            return block(x, train, **rates, **dropped), None

        def rates(index: int) -> dict[str, Rate]:
            if not self.drop_path_rate:
                return {}
            return {"drop_path_rate": self.drop_path_rate * (first + index + 1) / total}

        equal = self.equal_blocks(stage)
        step = nn.remat(run) if self.remat else run
        for index in range(self.stage_sizes[stage]):
            if not (self.scan_blocks and index in equal):
                x, _ = step(self.block(stage, index), x, rates(index))
            elif index == equal[0]:
                scan = nn.scan(
                    nn.remat(run, prevent_cse=False) if self.remat else run,
                    variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
                    split_rngs={"params": True, "dropout": True},
                    length=len(equal),
                )
                each = jax.tree.map(lambda *r: jnp.asarray(r, jnp.float32), *map(rates, equal))
                x, _ = scan(self.block(stage, index, blocks_name(stage)), x, each)
        return x

    def _check_input(self, x: jax.Array) -> None:
        least = self.stem_stride * 2 ** (len(self.stage_sizes) - 1)
        first = "stem_conv1" if self.stem == "deep" else "stem_conv"
        kernel = self.variables.get("params", {}).get(first, {}).get("kernel")
        check_images(x, least, "stem='cifar' or fewer stages", kernel)
