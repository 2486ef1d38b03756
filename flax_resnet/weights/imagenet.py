"""What the 1000 outputs of a network trained on ImageNet stand for."""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from pathlib import Path

from flax_resnet.records.files import shown


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """One name a class, each once, in the order of the outputs: by WordNet's number.

    A first name that two classes share gives way to the second one: "crane bird" and
    "construction crane", "maillot" and "tank suit".
    """
    rows = [names.split(", ") for _, names in _rows()]
    shared = collections.Counter(names[0] for names in rows)
    return tuple(names[1 if shared[names[0]] > 1 and len(names) > 1 else 0] for names in rows)


def as_imagenet(names: Sequence[str]) -> tuple[str, ...]:
    """``imagenet_classes()`` for the same classes by WordNet's ids or by all their names."""
    columns = zip(*_rows(), strict=True)
    return imagenet_classes() if tuple(names) in columns else tuple(names)


def imagenet_ids() -> tuple[str, ...]:
    """WordNet's id of each class, in the order of the outputs."""
    return tuple(wordnet_id for wordnet_id, _ in _rows())


def class_name(names: Sequence[str] | None, index: int) -> str:
    """What to call the class of an output; a network may have more outputs than classes."""
    return shown(names[index]) if names and index < len(names) else f"class {index}"


def _rows() -> list[list[str]]:
    """[WordNet's id, all names] of each class."""
    text = Path(__file__).with_name("imagenet_classes.txt").read_text("utf-8")
    return [line.split("\t") for line in text.splitlines()]
