"""Which tensors of a torch file are the network's, and torchvision's names of them.

A checkpoint holds a network below any prefix, with optimizers, queues and other heads beside it.
The names and shapes alone decide, before a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax_resnet.errors import UserError
from flax_resnet.weights.architectures import check_tensors

Shapes = Mapping[str, tuple[int, ...]]

# What FSDP, activation checkpointing and torch.compile put between the parts of a name.
_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# The first block of a network: torchvision's, Hugging Face's, and as a child of nn.Sequential.
_PREFIX = r"(|.*\.)"
_FIRST_BLOCK = re.compile(
    _PREFIX + r"(?:layer1\.0\.conv1|encoder\.stages\.0\.layers\.0\.layer\.0\.convolution)\.weight"
)
_CHILD = re.compile(_PREFIX + r"(\d{1,4})\.0\.conv1\.weight")
# Names of Hugging Face's ResNet and of CIFAR codes, as torchvision would say them.
_SPELLINGS: list[tuple[str, Any]] = [
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d{1,6})\.layers\.(\d+)\.",
     lambda found: f"layer{int(found[1]) + 1}.{found[2]}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(\d{1,6})\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d{1,6})\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
    (r"\.shortcut\.", ".downsample."),
    (r"^final_bn\.", "bn."),
]  # fmt: skip
_HEAD = re.compile(r"(?:fc|linear|classifier|head|last_linear|cls_head)\.(?:fc\.)?")
_NETWORK = re.compile(r"(?:layer|conv|bn|norm|fc|hidden)\w*\..*")
_LAST_CONV = re.compile(r"layer(\d{1,4})\.\d+\.conv(\d)\.weight")
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?)(?:[._]|$)")


class Tree(NamedTuple):
    """A network in a file."""

    names: dict[str, str]
    """torchvision's name of each of its tensors, by the name in the file."""
    notes: tuple[str, ...]
    """What the file's owner may not expect, a phrase each."""


def split(address: str | Path) -> tuple[str, str | None]:
    """(path, name of the network in it or None) of a path, or of PATH#NAME."""
    text = str(address)
    path, mark, name = text.rpartition("#")
    return (path, name) if mark and not Path(text).expanduser().exists() else (text, None)


def find(shapes: Shapes, path: object, name: str | None = None) -> Tree:
    """The network among a file's tensors.

    Args:
      shapes: of all tensors, by name.
      path: of the file, for messages.
      name: a part of the prefix of the network, where the file holds several.

    Raises:
      UserError: there is none, or several and no name that tells them apart.
    """
    check_tensors(shapes)
    plain = {key: _WRAPPERS.sub("", key) for key in shapes}
    prefixes = _prefixes({plain[key]: shape for key, shape in shapes.items()})
    if not prefixes:
        raise no_network(plain.values())
    prefix, notes = _chosen(prefixes, str(path), name)
    inner = [p for p in prefixes if p != prefix and p.startswith(prefix)]
    names: dict[str, str] = {}
    outside: list[str] = []
    for key, full in plain.items():
        if not full.startswith(prefix) or any(full.startswith(p) for p in inner):
            outside.append(key)
        else:
            names[key] = full.removeprefix(prefix)
    names = _spelled(names, shapes)
    if not any(_HEAD.match(new) for new in names.values()):
        names |= _head_outside(prefix, {key: plain[key] for key in outside}, names, shapes)
    names, dense = _with_head(names, shapes)
    for key, new in [*names.items()]:  # a kernel beside the stages may be a part of the network
        if not (_NETWORK.fullmatch(new) or (new.endswith(".weight") and len(shapes[key]) == 4)):
            del names[key]
    if len(set(names.values())) < len(names):
        twice = next(key for key, new in names.items() if [*names.values()].count(new) > 1)
        raise UserError(f"the weights have {twice!r:.200} under another name too: keep one of them")
    said = [p for p in prefixes if notes and p != prefix]
    beside = [plain[key] for key in shapes if key not in names]
    beside = [full for full in beside if not any(full.startswith(p) for p in said)]
    if left := _summary(prefix, beside):
        under = f"read under {prefix[:-1]!r:.80}; " if prefix and not notes else ""
        notes = [*notes, f"{under}left out: {left}"]
    return Tree(names, (*notes, *dense))


def no_network(names: Iterable[str]) -> UserError:
    """The error of a file without a residual network."""
    some = ", ".join(repr(name) for name in list(names)[:3])
    return UserError(
        f"the weights are no residual network's: expected names like 'layer1.0.conv1.weight', "
        f"found {some:.200}; give the weights of a ResNet, or convert the names first"
    )


def _prefixes(shapes: Shapes) -> list[str]:
    """The prefixes under which there is a network, each with its last dot."""
    found = {match[1]: None for name in shapes if (match := _FIRST_BLOCK.fullmatch(name))}
    for match in filter(None, map(_CHILD.fullmatch, shapes)):
        stems = (f"{match[1]}{stem}.weight" for stem in ("0", "0.0"))
        if int(match[2]) > 1 and any(len(shapes.get(stem, ())) == 4 for stem in stems):
            found[match[1]] = None
    statistics = [name for name in shapes if name.endswith(".running_var")]
    # Without them a tree beside others is a copy of parameters: an optimizer's, an average's.
    return [p for p in found if any(name.startswith(p) for name in statistics)] or list(found)


def _chosen(prefixes: list[str], path: str, name: str | None) -> tuple[str, list[str]]:
    """(the prefix that is meant, notes)."""

    def named(name: str) -> list[str]:
        inside = [p for p in prefixes if f".{name}." in f".{p}"] if name else []
        return [p for p in prefixes if p == f"{name}." or p == name] or inside

    def label(prefix: str) -> str:
        parts = [part for part in prefix[:-1].split(".") if named(part) == [prefix]]
        return [*parts, prefix[:-1]][0]

    ways = ", ".join(f"{path}#{label(prefix):.80}" for prefix in prefixes[:8])
    if name is not None:
        if len(chosen := named(name)) != 1:
            raise UserError(f"{len(chosen)} of the networks here are named {name!r}: give {ways}")
        return chosen[0], []
    averages = [prefix for prefix in prefixes if _AVERAGE.search(prefix)]
    if len(prefixes) == 2 and len(averages) == 1:
        other = next(prefix for prefix in prefixes if prefix not in averages)
        read, left = averages[0][:-1], other[:-1]
        way = f"{path}#{label(other)} reads {left!r:.80}"
        return averages[0], [f"the averaged weights were read, {read!r:.80}; {way}"]
    if len(prefixes) > 1:
        raise UserError(f"it holds {len(prefixes)} networks: say which, by {ways}")
    return prefixes[0], []


def _spelled(names: dict[str, str], shapes: Shapes) -> dict[str, str]:
    """Names below the prefix as torchvision spells them."""
    firsts = filter(None, map(_CHILD.fullmatch, names.values()))
    stages = [int(match[2]) for match in firsts if not match[1]]
    children = {"0": "conv1", "1": "bn1"}
    if stages and "layer1.0.conv1.weight" not in names.values():
        first, last = min(stages), max(stages)
        children |= {str(n): f"layer{n - first + 1}" for n in range(first, last + 1)}
        children |= {str(n): f"fc.{n}" for n in range(last + 1, last + 10)}
        parts = {key: name.partition(".") for key, name in names.items()}
        names = {k: children.get(top, top) + dot + rest for k, (top, dot, rest) in parts.items()}
    for pattern, replacement in _SPELLINGS:
        names = {key: re.sub(pattern, replacement, name) for key, name in names.items()}
    sizes = {name: shapes[key] for key, name in names.items()}
    if "bn1.weight" in sizes and "layer1.0.bn1.weight" in sizes and "bn.weight" not in sizes:
        first_norm = sizes["layer1.0.bn1.weight"] == sizes["bn1.weight"]
        stems = [sizes[n][:1] for n in ("conv1.weight", "conv1.6.weight") if n in sizes]
        if not first_norm and sizes["bn1.weight"] not in stems:
            # Wide-ResNet codes call the last norm bn1: they have none after the stem.
            names = {key: re.sub(r"^bn1\.", "bn.", name) for key, name in names.items()}
    return names


def _head_outside(
    prefix: str, outside: Mapping[str, str], names: Mapping[str, str], shapes: Shapes
) -> dict[str, str]:
    """The dense layers of a classifier whose trunk is a part of it, under the nearest prefix."""
    parts = prefix[:-1].split(".")
    for count in range(len(parts) - 1, -1, -1):
        above = "".join(f"{part}." for part in parts[:count])
        tops = {k: n.removeprefix(above) for k, n in outside.items() if n.startswith(above)}
        tops = {key: name for key, name in tops.items() if _HEAD.match(name)}
        if tops and "fc.weight" in _with_head({**names, **tops}, shapes)[0].values():
            return tops
    return {}


def _with_head(names: dict[str, str], shapes: Shapes) -> tuple[dict[str, str], tuple[str, ...]]:
    """``names`` with the head's dense layers as hidden1, ..., fc; and a note where there are some.

    A head that is no chain of dense layers keeps the names of its parts, behind "fc.".
    """
    heads = {key: f"fc.{name[found.end():]}" for key, name in names.items()
             if (found := _HEAD.match(name))}  # fmt: skip
    names = {**names, **heads}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, name in heads.items():
        layer, _, leaf = name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = shapes[key]
    places = {layer: layer.rpartition(".")[2] for layer in layers}
    order, numbers = list(layers), [int(n) for n in places.values() if n.isdecimal()]
    if len(numbers) == len(order):  # places in an nn.Sequential
        order.sort(key=lambda layer: int(places[layer]))
        if any(number + 1 in numbers for number in numbers):
            return names, ()  # with nothing between them
    width = _num_features(names, shapes)
    for layer in order:
        kernel = layers[layer].get("weight", ())
        if len(kernel) != 2 or layers[layer].keys() > {"weight", "bias"} or kernel[1] != width:
            return names, ()
        width = kernel[0]
    new = {layer: f"hidden{i}" for i, layer in enumerate(order, start=1)}
    new |= dict.fromkeys(order[-1:], "fc")
    for key, name in heads.items():
        layer, _, leaf = name.rpartition(".")
        names[key] = f"{new[layer]}.{leaf}"
    some = ", ".join(order)
    return names, (f"{some} are read as dense layers with ReLU between",) if order[1:] else ()


def _num_features(names: Mapping[str, str], shapes: Shapes) -> int:
    """Channels of the last stage."""
    convs = [(int(match[1]), int(match[2]), shapes[key][:1])
             for key, name in names.items() if (match := _LAST_CONV.fullmatch(name))]  # fmt: skip
    return next(iter(max(convs)[2]), 0) if convs else 0


def _summary(prefix: str, names: Iterable[str]) -> str:
    """Names beside a network, those of one part together: "optimizer (60 tensors), queue"."""
    parts = prefix.split(".")
    groups: dict[str, list[str]] = {}
    for name in names:
        own = name.split(".")
        pairs = enumerate(zip(own, parts, strict=False))
        apart = next((i for i, (here, there) in pairs if here != there), len(parts) - 1)
        groups.setdefault(".".join(own[: apart + 1]), []).append(name)
    some = [f"{g:.80} ({len(n)} tensors)" if n[1:] else f"{n[0]:.80}" for g, n in groups.items()]
    return ", ".join(some[:8]) + (f", and {len(some) - 8} more" if len(some) > 8 else "")
