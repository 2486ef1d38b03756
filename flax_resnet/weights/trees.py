"""Which tensors of a torch file are the network's, and torchvision's names of them.

A checkpoint holds a network below any prefix, with optimizers, queues and other heads beside it.
The names and shapes alone decide, before a tensor is read.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError, first_few
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


def split(address: str | Path) -> tuple[str, str | None]:
    """(path, name of the network in it or None) of a path, or of PATH#NAME."""
    text = str(address)
    path, mark, name = text.rpartition("#")
    return (path, name) if mark and not Path(text).expanduser().exists() else (text, None)


def find(shapes: Shapes, path: object, name: str | None = None) -> tuple[dict[str, str], list[str]]:
    """(torchvision's names of a network's tensors, by the names in the file; notes).

    UserError where there is no network, or several and ``name``, which is a part of the prefix of
    one, does not tell them apart.
    """
    check_tensors(shapes)
    plain = {key: _WRAPPERS.sub("", key) for key in shapes}
    prefixes = _prefixes({plain[key]: shape for key, shape in shapes.items()})
    if not prefixes:
        some = first_few([repr(name) for name in plain.values()], 3)
        raise UserError(
            "the weights are no residual network's: expected names like 'layer1.0.conv1.weight', "
            f"found {some:.200}; give the weights of a ResNet, or convert the names first"
        )
    prefix, how = _chosen(prefixes, str(path), name)
    inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    names = {key: full.removeprefix(prefix) for key, full in plain.items()
             if full.startswith(prefix) and not full.startswith(inner)}  # fmt: skip
    names = _spelled(names, shapes)
    if not any(map(_HEAD.match, names.values())):
        outside = {key: full for key, full in plain.items() if key not in names}
        names |= _head_outside(prefix, outside, names, shapes)
    names, dense = _with_head(names, shapes)
    # A kernel of 4 axes beside the stages may be a part of the network.
    names = {key: new for key, new in names.items() if _NETWORK.fullmatch(new)
             or (new.endswith(".weight") and len(shapes[key]) == 4)}  # fmt: skip
    for new, count in Counter(names.values()).items():
        if count > 1:
            raise UserError(f"the weights have {new!r:.200} under another name too: keep one")
    left = _summary(prefix, [full for key, full in plain.items() if key not in names])
    notes = [f"{how}left out: {left}"] if left else []
    if dense[1:]:
        notes.append(f"{', '.join(dense)} are read as dense layers with ReLU between")
    return names, notes


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


def _chosen(prefixes: list[str], path: str, name: str | None) -> tuple[str, str]:
    """(the prefix that is meant, the start of a note on it)."""
    ways = first_few([f"{path}#{prefix[:-1]:.80}" for prefix in prefixes])
    if name is not None:
        chosen = [p for p in prefixes if p[:-1] == name]
        chosen = chosen or [p for p in prefixes if f".{name}." in f".{p}"]
        if len(chosen) != 1:
            raise UserError(f"{len(chosen)} of the networks here are named {name!r}: give {ways}")
        prefixes = chosen
    averages = [prefix for prefix in prefixes if _AVERAGE.search(prefix)]
    if len(prefixes) == 2 and len(averages) == 1:
        read, other = averages[0], next(p for p in prefixes if p not in averages)[:-1]
        way = f"{path}#{other:.80} reads {other!r:.80}"
        return read, f"the averaged weights were read, {read[:-1]!r:.80}; {way}; "
    if len(prefixes) > 1:
        raise UserError(f"it holds {len(prefixes)} networks: say which, by {ways}")
    return prefixes[0], f"read under {prefixes[0][:-1]!r:.80}; " if prefixes[0] else ""


def _spelled(names: dict[str, str], shapes: Shapes) -> dict[str, str]:
    """Names below the prefix as torchvision spells them."""
    firsts = filter(None, map(_CHILD.fullmatch, names.values()))
    stages = [int(match[2]) for match in firsts if not match[1]]
    if stages and "layer1.0.conv1.weight" not in names.values():
        first, last = min(stages), max(stages)
        children = {"0": "conv1", "1": "bn1"}
        children |= {str(n): f"layer{n - first + 1}" for n in range(first, last + 1)}
        children |= {str(n): f"fc.{n}" for n in range(last + 1, last + 10)}
        parts = {key: name.partition(".") for key, name in names.items()}
        names = {k: children.get(top, top) + dot + rest for k, (top, dot, rest) in parts.items()}
    for pattern, replacement in _SPELLINGS:
        names = {key: re.sub(pattern, replacement, name) for key, name in names.items()}
    sizes = {name: shapes[key][:1] for key, name in names.items()}
    stems = [sizes.get(f"{stem}.weight") for stem in ("conv1", "conv1.6")]
    if sizes.get("bn1.weight") not in (None, *stems):
        # Wide-ResNet codes call the last norm bn1: they have none after the stem.
        names = {key: re.sub(r"^bn1\.", "bn.", name) for key, name in names.items()}
    return names


def _head_outside(
    prefix: str, outside: Mapping[str, str], names: Mapping[str, str], shapes: Shapes
) -> dict[str, str]:
    """The dense layers of a classifier whose trunk is a part of it, under the nearest prefix."""
    parts = prefix.split(".")[:-1]
    for count in reversed(range(len(parts))):
        above = "".join(f"{part}." for part in parts[:count])
        tops = {key: full.removeprefix(above) for key, full in outside.items()
                if full.startswith(above) and _HEAD.match(full, len(above))}  # fmt: skip
        if _with_head({**names, **tops}, shapes)[1]:
            return tops
    return {}


def _with_head(names: Mapping[str, str], shapes: Shapes) -> tuple[dict[str, str], list[str]]:
    """(``names`` with the head's dense layers as hidden1, ..., fc; these, as they were called).

    A head that is no chain of dense layers keeps the names of its parts, behind "fc.".
    """
    heads = {key: f"fc.{name[found.end():]}" for key, name in names.items()
             if (found := _HEAD.match(name))}  # fmt: skip
    layers: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, name in heads.items():
        layer, _, leaf = name.rpartition(".")
        layers[layer][leaf] = shapes[key]
    order, ends = list(layers), {layer: layer.rpartition(".")[2] for layer in layers}
    is_chain = True
    if all(map(str.isdecimal, ends.values())):  # places in an nn.Sequential
        order.sort(key=lambda layer: int(ends[layer]))
        places = [int(ends[layer]) for layer in order]
        is_chain = not any(place + 1 in places for place in places)  # something is between them
    convs = [(int(match[1]), int(match[2]), *shapes[key][:1])
             for key, name in names.items() if (match := _LAST_CONV.fullmatch(name))]  # fmt: skip
    width = max(convs, default=(0,))[-1]
    for layer in order:
        kernel = layers[layer].get("weight", ())
        is_dense = len(kernel) == 2 and layers[layer].keys() <= {"weight", "bias"}
        is_chain = is_chain and is_dense and kernel[1] == width
        width = kernel[0] if kernel else 0
    if not is_chain:
        return {**names, **heads}, []
    new = {layer: f"hidden{i}" for i, layer in enumerate(order, start=1)}
    new |= dict.fromkeys(order[-1:], "fc")
    for key, name in heads.items():
        layer, _, leaf = name.rpartition(".")
        heads[key] = f"{new[layer]}.{leaf}"
    return {**names, **heads}, order


def _summary(prefix: str, names: Iterable[str]) -> str:
    """Names beside a network, those of one part together: "optimizer (60 tensors), queue"."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        pairs = zip(parts, prefix.split("."), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        groups[".".join(parts[: shared + 1])].append(name)
    return first_few([f"{group:.80} ({len(inside)} tensors)" if inside[1:] else f"{inside[0]:.80}"
                      for group, inside in groups.items()])  # fmt: skip
