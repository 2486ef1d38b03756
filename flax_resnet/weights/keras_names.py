"""Keras's residual networks: its layers' names and order, and the network that a file fits."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from flax_resnet.errors import UserError
from flax_resnet.models import ResNet, keras_resnet

Version = Literal["v1", "v2"]
Tensors = Mapping[str, np.ndarray]

_MODULES = {
    "stem_conv": "conv1_conv",
    "stem_norm": "conv1_bn",
    "final_norm": "post_bn",
    "head": "predictions",
    "conv1": "1_conv",
    "conv2": "2_conv",
    "conv3": "3_conv",
    "shortcut_conv": "0_conv",
    "shortcut_norm": "0_bn",
}
_NORMS = {
    "v1": {"norm1": "1_bn", "norm2": "2_bn", "norm3": "3_bn"},
    "v2": {"norm1": "preact_bn", "norm2": "1_bn", "norm3": "2_bn"},
}
_BLOCK = re.compile(r"conv(\d+)_block\d+_1_conv/0")
# Weights of before 2019 have these names, and BatchNorm's default epsilon.
_OLD = re.compile(r"(res|bn)([2-5])([a-z])_branch(1|2a|2b|2c)")
_OLD_NAMES = {"conv1": "conv1_conv", "bn_conv1": "conv1_bn"}
OLD_EPSILON = 1e-3
_POSITIONS = {"kernel": 0, "scale": 0, "bias": 1, "mean": 2, "var": 3}
ALONE = (
    "save the ResNet alone in Keras: "
    "model.get_layer('resnet50').save_weights('resnet50.weights.h5')"
)
"""What to do where a model around a ResNet cannot be read."""


def version_of(module: ResNet) -> Version:
    """Keras's version of a network: "v2" where it is pre-activated."""
    return "v2" if module.block_cls.preactivation else "v1"


def keras_name(module: ResNet, path: tuple[str, ...]) -> str:
    """``LAYER/POSITION`` of a variable: ("params", "stem_conv", "kernel") is conv1_conv/0."""
    *blocks, part, leaf = path[1:]
    modules = _MODULES | _NORMS[version_of(module)]
    modules |= {f"hidden{i}": f"hidden{i}" for i in range(1, len(module.hidden_units) + 1)}
    if part not in modules:
        raise UserError(
            f"{'/'.join(path[1:])} has no place in Keras's ResNet: write .safetensors instead"
        )
    layer = modules[part]
    if blocks:
        stage, block = blocks[0].removeprefix("stage").split("_block")
        layer = f"conv{int(stage) + 1}_block{block}_{layer}"
    return f"{layer}/{_POSITIONS[leaf]}"


def layer_order(stage_sizes: Sequence[int], version: Version) -> list[str]:
    """Keras's layers with weights, in the order of ``model.layers``, the head last."""
    names = ["conv1_conv", *(["conv1_bn"] if version == "v1" else [])]
    for stage, blocks in enumerate(stage_sizes, start=2):
        for block in range(1, blocks + 1):
            convs = ["1", "2", *(["0"] if block == 1 else []), "3"]
            layers = [f"{i}_conv" for i in convs]
            layers += [f"{i}_bn" for i in convs] if version == "v1" else []
            layers += ["preact_bn", "1_bn", "2_bn"] if version == "v2" else []
            names += [f"conv{stage}_block{block}_{layer}" for layer in layers]
    return [*names, *(["post_bn"] if version == "v2" else []), "predictions"]


def weights_groups(layers: Sequence[str]) -> dict[str, str]:
    """{layer: its group below "layers" in a .weights.h5}, which counts layers of each class."""
    found: dict[str, str] = {}
    counts = Counter[str]()
    for layer in layers:
        kind = "conv2d" if layer.endswith("conv") else "batch_normalization"
        kind = "dense" if layer == "predictions" else kind
        found[layer] = f"{kind}_{counts[kind]}" if counts[kind] else kind
        counts[kind] += 1
    return found


def keras_layers(tensors: Tensors, kind: Literal["keras_h5", "keras_weights"]) -> Tensors:
    """The tensors of either file format under Keras's layers' names, as ``keras_name`` has them.

    The ResNet may be a layer of the file's model. Dense layers become hidden1, ..., predictions.
    """
    layers = {name.rpartition("/")[0] for name in tensors}
    if kind == "keras_h5":
        renamed = {layer: _modern(layer) for layer in layers}
    else:
        networks = {n.removesuffix("conv2d") for n in layers if re.fullmatch("(.*/)?conv2d", n)}
        below = min(networks, default="")
        convs, norms = (_counted(tensors, below + k) for k in ("conv2d", "batch_normalization"))
        if len(networks) != 1 or any(kernel.ndim != 4 for kernel in convs):
            raise _not_keras(tensors)
        order = layer_order(_shape_of(convs), "v2" if len(norms) < len(convs) else "v1")
        renamed = {below + group: layer for layer, group in weights_groups(order).items()}
    renamed |= _dense_layers(tensors)
    places = {name: name.rpartition("/") for name in tensors}
    return {f"{renamed.get(g, g)}/{position}": tensors[n] for n, (g, _, position) in places.items()}


def _dense_layers(tensors: Tensors) -> dict[str, str]:
    """{dense layer: hidden1, ..., predictions}, each as wide as the next one's kernel is high.

    Where they are no such chain from the last convolution on, they keep their names.
    """
    kernels = {name.removesuffix("/0"): t for name, t in tensors.items() if t.ndim == 2}
    waiting = sorted(kernels, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    width = max((t.shape[-1] for t in tensors.values() if t.ndim == 4), default=0)
    chain: list[str] = []
    while fits := [name for name in waiting if kernels[name].shape[0] == width]:
        square = [name for name in fits if kernels[name].shape[1] == width]
        chain.append((square or fits)[0])
        waiting.remove(chain[-1])
        width = kernels[chain[-1]].shape[1]
    if len(kernels) == 1:  # what does not fit is said as the head's shape
        return dict.fromkeys(kernels, "predictions")
    if waiting or not chain:
        return {}
    *hidden, head = chain
    return {name: f"hidden{i}" for i, name in enumerate(hidden, 1)} | {head: "predictions"}


def _modern(layer: str) -> str:
    if (found := _OLD.fullmatch(layer)) is None:
        return _OLD_NAMES.get(layer, layer)
    kind, stage, block, branch = found.groups()
    number = {"1": 0, "2a": 1, "2b": 2, "2c": 3}[branch]
    kind = "conv" if kind == "res" else "bn"
    return f"conv{stage}_block{ord(block) - ord('a') + 1}_{number}_{kind}"


def infer_keras(layers: Tensors, names: Iterable[str], **fields: Any) -> ResNet:
    """The network of tensors named as ``keras_layers`` names them.

    Args:
      layers: the tensors.
      names: of the tensors in the file; those of before 2019 mean another epsilon.
      **fields: of the network, over what is inferred.
    """
    if not {"conv1_conv/0", "conv2_block1_1_conv/0"} <= layers.keys():
        raise _not_keras(layers)
    blocks = Counter(found[1] for name in layers if (found := _BLOCK.fullmatch(name)))
    stages = itertools.takewhile(blocks.__contains__, map(str, itertools.count(2)))
    hidden = itertools.takewhile(layers.__contains__, (f"hidden{i}/0" for i in itertools.count(1)))
    kernel = layers["conv2_block1_1_conv/0"]
    fits: dict[str, Any] = {
        "stage_sizes": tuple(blocks[stage] for stage in stages),
        "num_filters": kernel.shape[-1] if kernel.ndim == 4 else 0,
        "include_top": "predictions/0" in layers,
        "hidden_units": tuple(layers[name].shape[-1] for name in hidden),
    }
    if fits["include_top"]:
        fits["num_classes"] = layers["predictions/0"].shape[-1]
    if any(_OLD.match(name) for name in names):
        fits["bn_epsilon"] = OLD_EPSILON
    version: Version = "v2" if "post_bn/0" in layers else "v1"
    return keras_resnet(50, version, **{**fits, **fields})


def _counted(tensors: Tensors, kind: str) -> list[np.ndarray]:
    """The first weight of each layer of a kind, which Keras numbers: conv2d, conv2d_1, ..."""
    names = (f"{kind}_{i}/0" if i else f"{kind}/0" for i in itertools.count())
    return [tensors[name] for name in itertools.takewhile(tensors.__contains__, names)]


def _shape_of(kernels: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Blocks in each stage: a stage starts where the inner width changes, and projects there."""
    sizes: list[int] = []
    width, at = 0, 1
    while at < len(kernels):
        is_first = kernels[at].shape[-1] != width
        width = kernels[at].shape[-1]
        sizes = [*sizes, 1] if is_first else [*sizes[:-1], sizes[-1] + 1]
        at += 4 if is_first else 3
    return tuple(sizes)


def _not_keras(tensors: Tensors) -> UserError:
    some = ", ".join(repr(name) for name in list(tensors)[:3])
    return UserError(
        f"the weights are no ResNet of keras.applications: found layers like {some:.200}; expected "
        f"conv1_conv, conv2_block1_1_conv, ..., or the conv2d, conv2d_1, ... of one ResNet; {ALONE}"
    )
