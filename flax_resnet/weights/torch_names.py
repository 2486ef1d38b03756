"""A ResNet's variables under torch's names and in torch's layout, and the network that they fit.

One naming is at the centre, torchvision's (``layer1.0.conv1.weight``), with timm's names for
what torchvision has not (``se.fc1``, the deep stem's ``conv1.0``); those of others are turned
into it first, by ``trees``.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_resnet import models
from flax_resnet.errors import UserError

_BLOCK = re.compile(r"layer(\d{1,4})\.(\d{1,6})\.")
_STEM_MODULES = {"stem_conv": "conv1", "stem_norm": "bn1", "final_norm": "bn", "head": "fc"}
_DEEP_STEM = {"stem_conv1": "conv1.0", "stem_norm1": "conv1.1", "stem_conv2": "conv1.3",
              "stem_norm2": "conv1.4", "stem_conv": "conv1.6"}  # fmt: skip
# (three convolutions, normalised before the first): the block.
_BLOCK_CLASSES = {
    (False, False): models.BasicBlock,
    (False, True): models.PreActBasicBlock,
    (True, False): models.BottleneckBlock,
    (True, True): models.PreActBottleneckBlock,
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias",
           "mean": "running_mean", "var": "running_var"}  # fmt: skip


def torch_name(module: models.ResNet, path: tuple[str, ...]) -> str:
    """torchvision's name of a variable: ("params", "stage1_block1", "conv1", "kernel"), say."""
    names = dict(_STEM_MODULES)
    if module.stem == "deep":
        names |= _DEEP_STEM
    first = 1 if module.shortcut == "D" else 0  # timm's averages are downsample.0
    names |= {
        "shortcut_conv": f"downsample.{first}",
        "shortcut_norm": f"downsample.{first + 1}",
        "reduce": "fc1",
        "expand": "fc2",
    }
    parts = []
    for part in path[1:-1]:
        if part.startswith("stage"):
            stage, block = part.removeprefix("stage").split("_block")
            part = f"layer{stage}.{int(block) - 1}"
        elif part.startswith("norm"):
            part = part.replace("norm", "bn")
        parts.append(names.get(part, part))
    return ".".join([*parts, _LEAVES[path[-1]]])


def to_torch(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """Kernels (H, W, in, out) as (out, in, H, W), dense ones transposed; the rest as it is."""
    if path[-1] != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T[:, :, None, None] if "se" in path else value.T  # timm's gates are convolutions


def from_torch(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """The inverse of ``to_torch``; gates may be dense layers too."""
    if path[-1] != "kernel":
        return value
    if "se" in path and value.ndim == 4 and value.shape[2:] == (1, 1):
        value = value[:, :, 0, 0]
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def with_biases(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors, and zeros as the biases of dense layers that have none."""
    dense = [name for name in tensors if re.fullmatch(r"(fc|hidden\d+)\.weight", name)]
    zeros = {f"{n[:-6]}bias": np.zeros(tensors[n].shape[:1], tensors[n].dtype) for n in dense}
    return {**zeros, **tensors}


def infer_resnet(tensors: Mapping[str, np.ndarray], **fields: Any) -> models.ResNet:
    """The network of tensors under torchvision's names, with ``fields`` over what is inferred.

    Where a bottleneck strides is not to be seen: the 3x3 is taken, as torchvision and timm have
    it; ``stride_conv="1x1"`` says otherwise. A net without projections has shortcut A.
    """
    stages, (stem, stem_conv) = _stage_sizes(tensors), _stem(tensors)
    head = {name for name in tensors if name.startswith("fc.")}
    if fields.get("include_top", True) and (parts := sorted(head - {"fc.weight", "fc.bias"})):
        raise UserError(
            f"the head ({', '.join(parts):.200}) is no chain of dense layers on the features, with "
            "ReLU between: in Python read_weights with include_top=False reads the network without "
        )
    size = functools.partial(_size, tensors)
    conv2, conv3 = (f"layer1.0.conv{number}.weight" for number in (2, 3))
    bottleneck = conv3 in tensors
    preact = "bn1.weight" not in tensors and "layer1.0.bn1.weight" in tensors
    normed = any("bn" in name for name in tensors)
    outputs, stem_filters = size(conv3 if bottleneck else conv2, 0), size(stem_conv, 0)
    filters = outputs // 4 if bottleneck else outputs
    names = (f"hidden{number}.weight" for number in itertools.count(1))
    found: dict[str, Any] = {
        "stage_sizes": stages,
        "block_cls": _BLOCK_CLASSES[bottleneck, preact],
        "num_filters": filters,
        "stem": stem,
        "stem_filters": None if stem_filters == filters else stem_filters,
        "shortcut": _shortcut(tensors, stages, stem_filters == outputs),
        "norm_kind": "batch" if normed else "none",
        "include_top": bool(head),
        "hidden_units": tuple(size(n, 0) for n in itertools.takewhile(tensors.__contains__, names)),
    }
    if bottleneck and filters:
        width = size(conv2, 0)
        found["groups"] = width // size(conv2, 1)
        found["width_per_group"] = width * 64 // (filters * max(1, found["groups"]))
    if "fc.weight" in tensors:
        found["num_classes"] = size("fc.weight", 0)
    if "layer1.0.se.fc1.weight" in tensors:
        found["se_reduction"] = outputs // size("layer1.0.se.fc1.weight", 0)
    if normed and "layer1.0.conv1.bias" in tensors:
        found["conv_bias"] = "all"
    elif normed and "conv1.bias" in tensors:
        found["conv_bias"] = "unnormalized"
    return models.ResNet(**{**found, **fields})


def input_channels(tensors: Mapping[str, np.ndarray]) -> int:
    """Channels of the images."""
    name = "conv1.0.weight" if "conv1.0.weight" in tensors else "conv1.weight"
    return _size(tensors, name, 1)


def _stage_sizes(tensors: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """Blocks in each stage; what is beyond a gap is left over when names are compared."""
    blocks = {found.groups() for name in tensors if (found := _BLOCK.match(name))}
    stages = Counter(int(stage) for stage, _ in blocks)
    sizes = tuple(stages[n] for n in itertools.takewhile(stages.__contains__, itertools.count(1)))
    if too_many(sum(sizes), len(tensors)):
        raise UserError(f"the weights have {sum(sizes)} blocks and {len(tensors)} tensors: too few")
    return sizes


def too_many(blocks: int, tensors: int) -> bool:
    """True for more blocks than tensors make or anyone trains, which would take long to trace."""
    return blocks > 2000 or 4 * blocks > tensors + 8


def _stem(tensors: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """(kind of the stem, name of its last convolution)."""
    if "conv1.0.weight" in tensors:
        return "deep", "conv1.6.weight"
    kernel = _size(tensors, "conv1.weight", 2)
    if kernel not in (3, 7):
        raise UserError(f"the weights' conv1 is {kernel}x{kernel}: expected 7x7, 3x3, or conv1.0")
    return ("imagenet" if kernel == 7 else "cifar"), "conv1.weight"


def _shortcut(tensors: Mapping[str, np.ndarray], stages: tuple[int, ...], same: bool) -> str:
    """Kind of the shortcuts; ``same``: the first block has as many channels in as out."""
    if any(t.ndim == 4 for name, t in tensors.items() if name.endswith(".downsample.1.weight")):
        return "D"
    projected = sum(name.endswith(".downsample.0.weight") for name in tensors)
    if not projected:
        return "A"
    every = projected == sum(stages) and (projected > len(stages) or same)
    return "C" if every else "B"


def _size(tensors: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    """Length of one axis of a kernel."""
    if name not in tensors:
        raise UserError(f"the weights have no {name!r}: the file is cut or of another kind")
    tensor = tensors[name]
    if tensor.ndim != 4 and not (tensor.ndim == 2 and name.startswith(("fc.", "hidden", "layer"))):
        raise UserError(
            f"the weights' {name!r} has shape {tensor.shape}: expected a kernel of 4 axes, output "
            "channels first"
        )
    return tensor.shape[axis]
