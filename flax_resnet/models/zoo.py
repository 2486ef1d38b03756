"""The networks that have a name, and ``load``, which gives one with its variables."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from flax import linen as nn

from flax_resnet.errors import UserError, did_you_mean
from flax_resnet.models.arguments import check_dtype, whole_numbers
from flax_resnet.models.blocks import (
    BasicBlock,
    Block,
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
)
from flax_resnet.models.dropblock_resnet import DropBlockResNet
from flax_resnet.models.highway import highway_net
from flax_resnet.models.mini import MiniModel
from flax_resnet.models.resnet import ResNet

Variables = Mapping[str, Any]

IMAGENET_STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
LEAST_BOTTLENECK = 50
DEEPEST_BASIC_PREACT = 110


def imagenet_resnet(
    depth: int, version: Literal["v1", "v1.5", "v2"] = "v1.5", **fields: Any
) -> ResNet:
    """ResNet-18 to 200 (He et al. 2016, table 1; 200: He et al. 2016b).

    Args:
      depth: 18, 34, 50, 101, 152 or 200.
      version: "v1" strides in a bottleneck's first 1x1, "v1.5" in its 3x3, "v2" is v1.5
        pre-activated. Below 50 layers v1 and v1.5 are the same.
      **fields: any field of ResNet, over these.

    Raises:
      UserError: another depth, or version.
    """
    blocks: dict[str, tuple[type[Block], type[Block]]] = {
        "v1": (BasicBlock, BottleneckBlock),
        "v1.5": (BasicBlock, BottleneckBlock),
        "v2": (PreActBasicBlock, PreActBottleneckBlock),
    }
    if depth not in IMAGENET_STAGES or version not in blocks:
        raise UserError(
            f"depth {depth}, version {version!r}: expected a depth of "
            f"{', '.join(map(str, IMAGENET_STAGES))} and a version of {', '.join(blocks)}"
        )
    own = {
        "stage_sizes": IMAGENET_STAGES[depth],
        "block_cls": blocks[version][depth >= LEAST_BOTTLENECK],
        "stride_conv": "1x1" if version == "v1" else "3x3",
    }
    return ResNet(**{**own, **fields})


def keras_resnet(depth: int, version: Literal["v1", "v2"] = "v1", **fields: Any) -> ResNet:
    """The residual networks of keras.applications, to the last bias; the output is logits.

    V1 has a bias in every convolution and strides in the first 1x1. V2 strides in the last
    block of a stage, past which the input is max-pooled with a window of 1, pads its stem's
    pool with zeros, and has biases where no BatchNorm follows.

    Args:
      depth: 50, 101 or 152 in Keras.
      version: "v1" or "v2".
      **fields: any field of ResNet, over these.
    """
    own: dict[str, Any] = {"conv_bias": "all"}
    if version != "v1":
        own = {"conv_bias": "unnormalized", "stride_block": "last", "stem_pool_zeros": True}
    own |= {"bn_momentum": 0.99, "bn_epsilon": 1.001e-5, "kernel_init": "glorot_uniform"}
    return imagenet_resnet(depth, version, **{**own, **fields})


def cifar_resnet(depth: int, **fields: Any) -> ResNet:
    """The CIFAR network of He et al. 2016, section 4.2: three stages of n blocks, shortcut A.

    Args:
      depth: weighted layers, 6n + 2 with two convolutions in a block (20, 32, 44, 56, 110 and
        1202 in the paper), 9n + 2 with three (164 and 1001 in He et al. 2016b).
      **fields: any field of ResNet, over the paper's.

    Raises:
      UserError: ``depth`` does not fit the block.
    """
    paper = {"num_filters": 16, "num_classes": 10, "stem": "cifar", "shortcut": "A"}
    fields = {"block_cls": BasicBlock, **paper, **fields}
    blocks = _blocks_a_stage(depth, 2, fields["block_cls"])
    return ResNet(**{"stage_sizes": (blocks,) * 3, **fields})


def cifar_preact(depth: int, **fields: Any) -> ResNet:
    """The pre-activated CIFAR networks of He et al. 2016b: 110, and bottlenecked 164 and 1001.

    Bottlenecks stride in the first 1x1 and project where the shape changes, as in the
    paper's code; two-layer blocks have shortcut A. An identity shortcut of the very first block
    carries the stem's output as it is, as torch code commonly has it; the paper's appendix
    normalises and rectifies it first.

    Args:
      depth: to 110 of two-layer blocks, 6n + 2; deeper of bottlenecks, 9n + 2; another
        ``block_cls`` may be given at any depth.
      **fields: any field of ResNet, over the paper's.

    Raises:
      UserError: ``depth`` does not fit the block.
    """
    deep = PreActBottleneckBlock if depth > DEEPEST_BASIC_PREACT else PreActBasicBlock
    own = {"block_cls": deep, **fields}
    if issubclass(own["block_cls"], BottleneckBlock):
        own = {"shortcut": "B", "stride_conv": "1x1", **own}
    return cifar_resnet(depth, **own)


def wide_resnet(depth: int, width: int, **fields: Any) -> ResNet:
    """WRN-depth-width for CIFAR (Zagoruyko and Komodakis 2016, table 1).

    Args:
      depth: 6n + 4, as the paper counts (28 in WRN-28-10).
      width: widening factor k; stages have 16k, 32k and 64k channels.
      **fields: any field of ResNet, over the paper's.

    Raises:
      UserError: ``depth`` is not 6n + 4.
    """
    blocks = _blocks_a_stage(depth, 4, PreActBasicBlock)
    own = {
        "block_cls": PreActBasicBlock,
        "num_filters": 16 * width,
        "stem_filters": 16,
        "num_classes": 10,
        "stem": "cifar",
    }
    return ResNet(**{"stage_sizes": (blocks,) * 3, **own, **fields})


def _blocks_a_stage(depth: int, extra: int, block_cls: type[Block]) -> int:
    """Blocks in each of three stages of a network of ``depth`` layers, ``extra`` outside them."""
    period = 3 * len(block_cls(filters=64).convs())
    n, rest = divmod(depth - extra, period)
    if rest or n < 1:
        near = max(1, round((depth - extra) / period)) * period + extra
        raise UserError(
            f"depth {depth} is not {period}n + {extra}, as stages of {block_cls.__name__} make it; "
            f"the nearest that is: {near}"
        )
    return n


def _named() -> dict[str, Callable[..., nn.Module]]:
    """{name: what makes the network from fields}."""
    part = functools.partial
    found: dict[str, Callable[..., nn.Module]] = {}
    for depth in IMAGENET_STAGES:
        found[f"resnet{depth}"] = part(imagenet_resnet, depth)
        found[f"resnet{depth}_v1"] = part(imagenet_resnet, depth, "v1")
        found[f"resnet{depth}_v2"] = part(imagenet_resnet, depth, "v2")
        found[f"resnet{depth}d"] = part(imagenet_resnet, depth, stem="deep", shortcut="D")
        found[f"seresnet{depth}"] = part(imagenet_resnet, depth, se_reduction=16)
    for depth in (18, 34):
        found[f"plain{depth}"] = part(imagenet_resnet, depth, connection="plain")
    for depth in (50, 101, 152):
        found[f"ResNet{depth}"] = part(keras_resnet, depth, "v1")
        found[f"ResNet{depth}V2"] = part(keras_resnet, depth, "v2")
    for depth, groups, width in ((50, 32, 4), (101, 32, 8), (101, 64, 4)):
        found[f"resnext{depth}_{groups}x{width}d"] = part(
            imagenet_resnet, depth, groups=groups, width_per_group=width
        )
    for depth in (50, 101):
        found[f"wide_resnet{depth}_2"] = part(imagenet_resnet, depth, width_per_group=128)
    for depth in (20, 32, 44, 56, 110, 1202):
        found[f"resnet{depth}"] = part(cifar_resnet, depth)
        found[f"plain{depth}"] = part(cifar_resnet, depth, connection="plain")
    for depth in (110, 164, 1001):
        found[f"preresnet{depth}"] = part(cifar_preact, depth)
    for depth, width in ((16, 4), (16, 8), (28, 10), (40, 2), (40, 4)):
        found[f"wrn_{depth}_{width}"] = part(wide_resnet, depth, width)
    for depth in (19, 32):
        found[f"highway{depth}"] = part(highway_net, depth)
    return {**found, "mini": MiniModel, "dropblock_resnet": DropBlockResNet}


def names() -> tuple[str, ...]:
    """The names that ``create`` and ``load`` know.

    ``resnet50`` is torchvision's (v1.5), ``resnet50_v1`` and ``resnet50_v2`` the papers',
    ``ResNet50`` and ``ResNet50V2`` Keras's; the depths 20, 32, 44, 56, 110, 164, 1001 and 1202
    are CIFAR's.
    """
    return tuple(_named())


def create(name: str, **fields: Any) -> nn.Module:
    """The network called ``name``, with any of its fields set.

    Raises:
      UserError: the name or a field is not known; the line has the nearest.
    """
    known = _named()
    if name not in known:
        cases = [repr(n) for n in known if n.lower() == str(name).lower()]
        near = f" (did you mean {' or '.join(cases)}?)" if cases else did_you_mean(str(name), known)
        raise UserError(
            f"network {name!r} is not known{near}; python -m flax_resnet names lists them"
        )
    for field in ("dtype", "param_dtype"):
        check_dtype(fields.get(field, "float32"))
    allowed = inspect.signature(type(known[name]())).parameters
    for field in fields:
        if field not in allowed:
            raise UserError(f"{name} has no field {field!r}{did_you_mean(field, allowed)}")
    return known[name](**fields)


# What a ResNet computes in evaluation, but for its classes and the form of its output.
_ARCHITECTURE = ("stage_sizes", "block_cls", "num_filters", "stem", "stem_filters",
                 "stem_pool_zeros", "shortcut", "connection", "stride_conv", "stride_block",
                 "groups", "width_per_group", "se_reduction", "norm_kind", "bn_epsilon",
                 "conv_bias")  # fmt: skip


def architecture(module: ResNet) -> dict[str, Any]:
    """The fields that decide what published weights fit: all but the top and how it is run."""
    found = {name: getattr(module, name) for name in _ARCHITECTURE}
    found["stem_filters"] = found["stem_filters"] or module.num_filters
    if found["norm_kind"] == "frozen":  # the same weights, statistics kept
        found["norm_kind"] = "batch"
    if not module.block_cls.grouped:
        found["stride_conv"] = "3x3"  # there is no other place
    return found


def name_of(module: nn.Module) -> str | None:
    """The first of ``names()`` whose network computes what ``module`` does; None where none."""
    if not isinstance(module, ResNet):
        return next((name for name, cls in _named().items() if cls is type(module)), None)
    wanted = architecture(module)
    for name, build in _named().items():
        other = build()
        if isinstance(other, ResNet) and architecture(other) == wanted:
            return name
    return None


def network_name(module: nn.Module) -> str:
    """What to call a network: its name where it has one, else its class."""
    return name_of(module) or type(module).__name__


def default_shape(module: nn.Module) -> tuple[int, int, int]:
    """The image shape (H, W, C) that a network was made for."""
    imagenet = isinstance(module, ResNet) and module.stem != "cifar"
    return (224, 224, 3) if imagenet else (32, 32, 3)


def check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """``shape`` as (H, W, C); UserError unless it is three whole numbers above 0."""
    sizes = whole_numbers("input_shape", shape)
    if len(sizes) != 3:
        raise UserError(f"input_shape={sizes}: expected height, width and channels")
    height, width, channels = sizes
    return height, width, channels
