"""Grids of configs: named variants of one, each with several seeds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from flax_resnet.errors import UserError, did_you_mean
from flax_resnet.records.configs import module_fields
from flax_resnet.training.config import TrainConfig

RESERVED = ("table.csv", "table.md", "together", "failures")
LONGEST = 200
"""Bytes of a variant's name."""
Options = Sequence[Any] | Mapping[str, Any]
"""Values of a field, or {label: value}."""


def grid(
    base: TrainConfig, axes: Mapping[str, Options], seeds: int | Sequence[int] = 1
) -> dict[str, TrainConfig]:
    """Every combination of some fields' values, each with every seed.

    Args:
      base: what all else is taken from.
      axes: dotted field, such as "model.shortcut", "optimizer.learning_rate" or "model", to its
        values; of {label: value} the labels name the variants alone. "" is a field of no name:
        its values are {dotted field: value}, set together, and need labels.
      seeds: how many, counted from 0, or which.

    Returns:
      {"shortcut=A,learning_rate=0.1/seed0": config}. Dicts of several grids join by ``|``.

    Raises:
      UserError: an unknown field, no values, two variants of one name, or a value that the config
        refuses.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(f"seeds={seeds}: expected one or more, each once")
    configs: dict[str, TrainConfig] = {}
    for combination in itertools.product(*itertools.starmap(_choices, axes.items())):
        changed = base
        for _, changes in combination:
            for field, value in changes.items():
                if field == "seed":
                    raise UserError("the axis seed: seeds are the runs of a variant, seeds=")
                changed = replaced(changed, field, value)
        variant = check_name(",".join(label for label, _ in combination) or "base")
        for seed in numbers:
            name = f"{variant}/seed{seed}"
            if name in configs:
                raise UserError(f"two variants are called {variant!r}: give them labels")
            configs[name] = replaced(changed, "seed", seed)
    return configs


def _choices(field: str, options: Options) -> list[tuple[str, dict[str, Any]]]:
    """(label, {field: value}) of each value of one axis."""
    if isinstance(options, str) or not len(options):
        raise UserError(f"{field}={options!r}: expected some values, in a tuple or a dict by label")
    if isinstance(options, Mapping):
        labelled = [(check_name(str(label)), value) for label, value in options.items()]
    else:
        short = field.rpartition(".")[2]
        labelled = [(check_name(f"{short}={_text(value)}"), value) for value in options]
    if field:
        return [(label, {field: value}) for label, value in labelled]
    if not all(isinstance(value, Mapping) for _, value in labelled):
        raise UserError('the axis "": expected {label: {dotted field: value}}')
    return labelled


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "x".join(map(str, value))
    return value.__name__ if isinstance(value, type) else " ".join(str(value).split())


def check_name(label: str) -> str:
    """A label, or a whole variant's name, that can be a directory's."""
    odd = set(label) & set("/\\\n\r\0") or label.startswith(".") or label in RESERVED
    if not label or odd or len(label.encode()) > LONGEST:
        raise UserError(
            f"a variant would be called {label[:60]!r}, which is no name of a directory here: "
            "label its values briefly, {label: value}"
        )
    return label


def replaced(config: Any, field: str, value: Any) -> Any:
    """``config`` with one dotted field set, fields of the model too; else a UserError."""
    name, _, rest = field.partition(".")
    module = isinstance(config, nn.Module)
    names = [f.name for f in (module_fields(config) if module else dataclasses.fields(config))]
    if name not in names:
        near = did_you_mean(name, names)
        raise UserError(f"{type(config).__name__} has no field {name!r}{near}")
    if rest:
        inner = getattr(config, name)
        if not dataclasses.is_dataclass(inner):
            raise UserError(f"{name} has no fields, {field!r} names one: set {name!r} itself")
        value = replaced(inner, rest, value)
    change = config.clone if module else functools.partial(dataclasses.replace, config)
    try:
        return change(**{name: value})
    except TypeError as error:
        raise UserError(f"{field}={value!r:.60} does not fit: {error}") from error
