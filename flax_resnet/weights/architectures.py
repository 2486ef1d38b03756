"""Networks that are like a ResNet and compute something else: known by tensors' names or a name.

Some leave no trace in names and shapes (blur pooling has no parameters): their name tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from flax_resnet.errors import UserError

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
    rf"{_BLOCK}bn\d\.(?:IN|BN)\.": "instance normalisation (IBN-Net)",
    r"(?:^|\.)filt$": "blur pooling",
    r"(?:^|\.)maxpool\.\d+\.weight$": "a convolution in place of the stem's max-pool (ResNet-RS)",
    r"(?:^|\.)attn_?pool\.": "attention pooling (CLIP)",
    r"(?:^|\.)res2\.0\.conv1\.": "detectron2's names (a backbone with strides in the first 1x1)",
    r"(?:^|\.)stages\.0\.(?:blocks\.)?0\.": "another family's names (timm's ResNetV2 or ByobNet)",
}
"""{a name of a tensor: what the network has}."""
_BLUR = re.compile(r"(?:^|[^a-z])(?:se|eca|gc|sk)?resne[xs]?t(?:(?:blur|aa)\d|\d+\w*_lpf\d)")
_CAFFE = re.compile(r"(?:^|[^a-z])resne[xt]t?\d+\w*(?:caffe|msra)", re.IGNORECASE)


def check_name(name: str) -> None:
    """Raises UserError for a name of a file or a network that stands for another block."""
    if _BLUR.search(name.lower()):
        raise _other(f"by its name, {name:.80}", "blur pooling, which has no parameters")


def fields_of(name: str) -> dict[str, Any]:
    """Fields of a network that a file's name tells: Caffe's ResNets stride in the first 1x1."""
    return {"stride_conv": "1x1"} if _CAFFE.search(name) else {}


def check_tensors(names: Iterable[str]) -> None:
    """Raises UserError where tensors of these names, under any prefix, are of another block."""
    for name in names:
        for pattern, difference in _TENSORS.items():
            if re.search(pattern, name):
                raise _other(f"as {name!r:.90} tells", difference)


def _other(how: str, difference: str) -> UserError:
    return UserError(
        f"the network is no plain ResNet, {how}: it has {difference}, which no network here has; "
        "give weights of a ResNet, ResNeXt, Wide-ResNet, ResNet-D or SE-ResNet"
    )
