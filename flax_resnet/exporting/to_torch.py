"""Weights under torchvision's names, and what torch computes from such a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_resnet import convert
from flax_resnet.augment import normalize
from flax_resnet.classify import Classifier
from flax_resnet.exporting.source import Run, Source, in_float32, runner
from flax_resnet.models import BasicBlock, BottleneckBlock, ResNet
from flax_resnet.pretrained import open_weights


def write(source: Source, path: Path) -> str:
    """Writes the file, as ``convert`` does; returns what it is, in words."""
    convert.convert(source.opened, path)
    return "safetensors with torchvision's names"


def run(source: Source, path: Path) -> tuple[Run, str]:
    """The network in a file, by torch where that can be, and what computes it, in words."""
    reason = "torch is not installed"
    module: Any = source.opened.module
    if not computes(module):
        reason = "torchvision and CIFAR codes have no such network"
    else:
        try:
            import torch
            from safetensors.torch import load_file
        except ImportError:
            pass
        else:
            tensors, stats = load_file(path), source.classifier.stats

            def logits(images: np.ndarray) -> np.ndarray:
                x = np.asarray(normalize(jnp.asarray(images), stats)).transpose(0, 3, 1, 2)
                with torch.no_grad():
                    return forward(module, tensors, torch.tensor(x)).numpy()

            return logits, f"torch {torch.__version__}"
    read = Classifier.of(in_float32(open_weights(path)))
    return runner(read), f"read back into jax, for {reason}"


def computes(module: Any) -> bool:
    """Whether ``forward`` does: torchvision's ResNets, and those of CIFAR codes."""
    if not isinstance(module, ResNet) or module.block_cls not in (BasicBlock, BottleneckBlock):
        return False
    extras = (module.se_reduction, module.hidden_units, module.stem_pool_zeros)
    return (
        module.stem != "deep"
        and module.shortcut != "D"
        and module.connection != "highway"
        and module.norm_kind != "none"
        and not any(extras)
    )


def forward(module: ResNet, tensors: Mapping[str, Any], x: Any) -> Any:
    """A network's logits (N, classes) in torch, in evaluation.

    Args:
      module: one that ``computes``; its fields say strides, dilations and groups.
      tensors: torch's, by torchvision's names.
      x: (N, C, H, W), normalised.
    """
    from torch.nn import functional

    def conv(x: Any, name: str, strides: int = 1, dilation: int = 1, groups: int = 1) -> Any:
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        around = dilation * (weight.shape[-1] // 2)
        return functional.conv2d(x, weight, bias, strides, around, dilation, groups)

    def norm(x: Any, name: str) -> Any:
        moments = (tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"])
        affine = (tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias"))
        return functional.batch_norm(x, *moments, *affine, eps=module.bn_epsilon)

    def shortcut(x: Any, at: str, strides: int, width: int) -> Any:
        if f"{at}.downsample.0.weight" in tensors:
            return norm(conv(x, f"{at}.downsample.0", strides), f"{at}.downsample.1")
        new = width - x.shape[1]  # option A
        return functional.pad(x[:, :, ::strides, ::strides], (0,) * 4 + (new // 2, new - new // 2))

    x = norm(conv(x, "conv1", 1 if module.stem == "cifar" else 2), "bn1").relu()
    if module.stem == "imagenet":
        x = functional.max_pool2d(x, 3, 2, 1)
    for stage, size in enumerate(module.stage_sizes):
        for index in range(size):
            block, at, h = module.block(stage, index), f"layer{stage + 1}.{index}", x
            for i, spec in enumerate(block.convs(), start=1):
                h = h if i == 1 else h.relu()
                h = conv(h, f"{at}.conv{i}", spec.strides, spec.dilation, spec.groups)
                h = norm(h, f"{at}.bn{i}")
            if module.connection == "residual":
                h = h + shortcut(x, at, block.strides, h.shape[1])
            x = h.relu()
    return functional.linear(x.mean((2, 3)), tensors["fc.weight"], tensors["fc.bias"])
