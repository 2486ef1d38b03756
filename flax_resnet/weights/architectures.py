"""Networks that are like a ResNet and compute something else: known by tensors' names or a name.

Some leave no trace in names and shapes (blur pooling has no parameters): their name tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flax_resnet.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
_BLOCK = r"(?:^|\.)layer\d+\.\d+\."
_TENSORS = {
    rf"{_BLOCK}(?:se|eca|attn)\.conv\.weight$": "efficient channel attention (ECA)",
    rf"{_BLOCK}(?:se|eca|attn)\.fc\.weight$": "effective squeeze-and-excitation (ESE)",
    rf"{_BLOCK}conv\d\.(?:paths|attn)\.": "selective kernels (SKNet)",
    rf"{_BLOCK}conv2\.(?:conv|fc1|bn0)\.": "split attention (ResNeSt)",
    rf"{_BLOCK}convs\.\d": "a chain of small convolutions (Res2Net)",
    rf"{_BLOCK}\w+\.(?:channel|spatial)\.|{_BLOCK}(?:cbam|ca|sa)\.": "CBAM's attention",
    rf"{_BLOCK}\w+\.(?:conv_attn|conv_mask|mlp_add|channel_add_conv)\.": "global context attention",
    rf"{_BLOCK}se_module\.": "Caffe's SE-ResNet (its strides, and a max-pool without padding)",
    rf"{_BLOCK}se\.bn\.|{_BLOCK}se\.fc\.\d": "another squeeze-and-excitation (not se.fc1, se.fc2)",
    rf"{_BLOCK}bn\d\.(?:IN|BN)\.": "instance normalisation (IBN-Net)",
    rf"{_BLOCK}(?:scale|bias\d[ab])$": "Fixup's scales in place of norms",
    r"(?:^|\.)filt$": "blur pooling",
    r"(?:^|\.)maxpool\.\d+\.weight$": "a convolution in place of the stem's max-pool (ResNet-RS)",
    r"(?:^|\.)attn_?pool\.": "attention pooling (CLIP)",
    r"(?:^|\.)res2\.0\.conv1\.": "detectron2's names (a backbone with strides in the first 1x1)",
    r"(?:^|\.)stages\.0\.(?:blocks\.)?0\.": "another family's names (timm's ResNetV2 or ByobNet)",
}
"""{a name of a tensor: what the network has}."""
_NAMES = {
    r"resne[xs]?t(?:blur|aa)\d": "blur pooling, which has no parameters",
    r"resnet\d+\w*_lpf\d": "blur pooling",
}
_CAFFE = re.compile(r"(?:^|[^a-z])resne[xt]t?\d+\w*(?:caffe|msra)", re.IGNORECASE)


def check_name(name: str) -> None:
    """Raises UserError for a name of a file or a network that stands for another block."""
    for pattern, difference in _NAMES.items():
        if re.search(rf"(?:^|[^a-z])(?:se|eca|gc|sk)?{pattern}", name.lower()):
            raise _other(f"by its name, {name:.80}", difference)


def fields_of(name: str) -> dict[str, Any]:
    """Fields of a network that a file's name tells: Caffe's ResNets stride in the first 1x1."""
    return {"stride_conv": "1x1"} if _CAFFE.search(name) else {}


def check_shapes(shapes: Shapes) -> None:
    """Raises UserError where tensors, under any prefix, are of another block.

    Args:
      shapes: of all tensors of a file, by name.
    """
    for name in shapes:
        for pattern, difference in _TENSORS.items():
            if re.search(pattern, name):
                raise _other(f"as {name!r:.90} tells", difference)
    ends = {name.rpartition(".")[2] for name in shapes}
    if "running_mean" not in ends and any(re.search(_BLOCK + r"bn1\.weight$", n) for n in shapes):
        raise _other("as no tensor is called running_mean", "group or layer normalisation")
    for name in shapes:
        if found := re.fullmatch(r"(|.*\.)conv1\.0\.weight", name):
            widths = [shapes.get(f"{found[1]}conv1.{i}.weight", (0,))[0] for i in (0, 3, 6)]
            if all(widths) and not widths[0] == widths[1] == widths[2] // 2:
                raise _other(f"as the widths of its stem tell, {widths}", "a stem that widens from "
                             "the first layer on (timm's t nets)")  # fmt: skip
    squeezes = {
        shape[1]: shape[0]
        for name, shape in shapes.items()
        if re.search(_BLOCK + r"se\.fc1\.weight$", name) and len(shape) > 1 and shape[0]
    }
    widest = max(squeezes, default=0)
    reduction = widest // squeezes.get(widest, 1)
    if any(inner != max(1, c // reduction) for c, inner in squeezes.items() if reduction):
        raise _other(f"as its squeezes tell, {{channels: inner width}} {squeezes}",
                     "inner widths of squeeze-and-excitation that are rounded up to 8")  # fmt: skip


def _other(how: str, difference: str) -> UserError:
    return UserError(
        f"the network is no plain ResNet, {how}: it has {difference}, which no network here has; "
        "give weights of a ResNet, ResNeXt, Wide-ResNet, ResNet-D or SE-ResNet"
    )
