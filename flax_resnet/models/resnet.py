"""Post-activation residual networks (He et al. 2016, "Deep Residual Learning").

One skeleton: a stem, stages of equal blocks, a global average and a dense head. What differs
between members of the family is the block class and a handful of fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from flax_resnet.layers import (
    Dtype,
    ShortcutKind,
    as_dtype,
    batch_norm,
    conv,
    shortcut_a,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut (section 3.3, figure 2, and figure 5 left).

    Attributes:
      filters: output channels.
      strides: stride of the first convolution and of the shortcut.
      shortcut: "A" pads new channels with zeros, "B" projects where the shape changes, "C"
        projects in every block.
      zero_init_last: start the last BatchNorm scale at zero, so that the block starts as
        its shortcut (Goyal et al. 2017, section 5.1).
      bn_momentum: share of the running statistics kept at each step.
      bn_epsilon: added to the variance.
      dtype: computation dtype.
      param_dtype: storage dtype of the parameters.
      axis_name: mapped axis to share batch statistics over, under jax.pmap only.
    """

    filters: int
    strides: int = 1
    shortcut: ShortcutKind = "B"
    zero_init_last: bool = False
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps (N, H, W, C) to (N, ceil(H / strides), ceil(W / strides), filters)."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(h: jax.Array, name: str, **kwargs: Any) -> jax.Array:
            return batch_norm(
                train=train,
                momentum=self.bn_momentum,
                epsilon=self.bn_epsilon,
                axis_name=self.axis_name,
                name=name,
                **dtypes,
                **kwargs,
            )(h)

        h = conv(self.filters, 3, self.strides, name="conv1", **dtypes)(x)
        h = nn.relu(norm(h, "norm1"))
        h = conv(self.filters, 3, name="conv2", **dtypes)(h)
        last_scale = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones
        h = norm(h, "norm2", scale_init=last_scale)

        changes = self.strides != 1 or x.shape[-1] != self.filters
        if self.shortcut == "C" or (self.shortcut == "B" and changes):
            x = conv(self.filters, 1, self.strides, name="shortcut_conv", **dtypes)(x)
            x = norm(x, "shortcut_norm")
        elif changes:
            x = shortcut_a(x, self.filters, self.strides)
        return nn.relu(h + x)


class ResNet(nn.Module):
    """A residual network: stem, stages of ``block_cls``, global average, dense head.

    Attributes:
      stage_sizes: blocks in each stage; every stage after the first halves the map.
      block_cls: the block, called as ``block_cls(filters, strides=..., shortcut=..., ...)``.
      num_classes: width of the output.
      num_filters: channels of the first stage, doubled with each later one.
      stem: "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2;
        "cifar" a 3x3 convolution (section 4.2).
      shortcut: "A", "B" or "C" of section 3.3.
      zero_init_last: start each block's last BatchNorm scale at zero.
      bn_momentum: share of the running statistics kept at each step (torch's 0.1 is 0.9 here).
      bn_epsilon: added to the variance.
      dtype: computation dtype; "bfloat16" keeps statistics, parameters and loss in float32.
      param_dtype: storage dtype of the parameters.
      axis_name: mapped axis to share batch statistics over, under jax.pmap only.
    """

    stage_sizes: Sequence[int]
    block_cls: type[nn.Module] = BasicBlock
    num_classes: int = 1000
    num_filters: int = 64
    stem: Literal["imagenet", "cifar"] = "imagenet"
    shortcut: ShortcutKind = "B"
    zero_init_last: bool = False
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (N, H, W, C) to logits (N, num_classes)."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm_fields = {
            "bn_momentum": self.bn_momentum,
            "bn_epsilon": self.bn_epsilon,
            "axis_name": self.axis_name,
        }
        kernel_size, strides = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = conv(self.num_filters, kernel_size, strides, name="stem_conv", **dtypes)(x)
        x = batch_norm(
            train=train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            axis_name=self.axis_name,
            name="stem_norm",
            **dtypes,
        )(x)
        x = nn.relu(x)
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = self.block_cls(
                    self.num_filters * 2**stage,
                    strides=2 if stage > 0 and block == 0 else 1,
                    shortcut=self.shortcut,
                    zero_init_last=self.zero_init_last,
                    name=f"stage{stage + 1}_block{block + 1}",
                    **norm_fields,
                    **dtypes,
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(
            self.num_classes,
            name="head",
            dtype=as_dtype(self.dtype),
            param_dtype=as_dtype(self.param_dtype),
        )(x)


def cifar_resnet(depth: int, **fields: Any) -> ResNet:
    """The CIFAR network of section 4.2: three stages of n blocks, depth = 6n + 2, shortcut A.

    Args:
      depth: weighted layers: 20, 32, 44, 56, 110, 1202 in the paper.
      **fields: any field of ResNet, over the paper's.

    Raises:
      ValueError: ``depth`` is not 6n + 2.
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        near = max(1, round((depth - 2) / 6)) * 6 + 2
        raise ValueError(f"depth {depth} is not 6n + 2; the nearest that is: {near}")
    paper = {"num_filters": 16, "num_classes": 10, "stem": "cifar", "shortcut": "A"}
    return ResNet(stage_sizes=(n, n, n), **{**paper, **fields})
