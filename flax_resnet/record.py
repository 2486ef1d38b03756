"""Configs and networks as JSON values, and back."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from flax_resnet.errors import UserError, did_you_mean


def module_fields(module: nn.Module) -> list[dataclasses.Field]:
    """The fields of a linen module that are configuration (all but flax's parent and name)."""
    return [f for f in dataclasses.fields(module) if f.name not in ("parent", "name")]


def to_record(value: Any) -> Any:
    """A config, or a part of one, as JSON values; dataclasses and modules carry their class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = module_fields(value) if isinstance(value, nn.Module) else dataclasses.fields(value)
        return {
            "class": class_name(type(value)),
            **{f.name: to_record(getattr(value, f.name)) for f in fields},
        }
    if isinstance(value, type) and issubclass(value, nn.Module):
        return {"class_itself": class_name(value)}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [to_record(v) for v in value]
    try:
        return np.dtype(value).name
    except TypeError as error:
        raise UserError(
            f"config value {value!r} cannot be recorded: expected numbers, text, dtypes, modules "
            "or dataclasses of them"
        ) from error


def from_record(record: Any) -> Any:
    """Builds what ``to_record`` recorded.

    Raises:
      UserError: a class or a field is not known here; the line names the nearest.
    """
    if isinstance(record, list):
        return tuple(from_record(v) for v in record)
    if not isinstance(record, Mapping):
        return record
    if "class_itself" in record:
        return find_class(record["class_itself"])
    cls = find_class(record["class"])
    known = {f.name for f in dataclasses.fields(cls)}
    values = {name: from_record(value) for name, value in record.items() if name != "class"}
    for name in values:
        if name not in known:
            raise UserError(
                f"{record['class']} has no field {name!r}{did_you_mean(name, known)}: the record "
                "is of another version, or mistyped"
            )
    return cls(**values)


def untracked(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without its tracker, whose class only the program that trained may know."""
    return {name: value for name, value in record.items() if name != "tracking"}


def class_name(cls: type) -> str:
    """``module:Name`` of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(name: str) -> type:
    """The dataclass or linen module class that ``module:Name`` names.

    A record may come from anyone, so a name does not import arbitrary modules: only those of
    this library, and those that the program has imported itself.
    """
    module_name, _, qualname = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None and module_name.split(".")[0] == "flax_resnet":
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            module = None
    cls = getattr(module, qualname, None)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(
            f"class {name!r} is not known: expected one of flax_resnet, or one of a module that "
            "is imported already, as MODULE:NAME"
        )
    return cls


def flatten(record: Any, prefix: str = "") -> dict[str, Any]:
    """A record as {dotted field: value}, with a class under its own field's name."""
    if isinstance(record, Mapping) and "class" in record:
        flat = {prefix: record["class"].partition(":")[2]} if prefix else {}
        for name, value in record.items():
            if name != "class":
                flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
        return flat
    if isinstance(record, Mapping):
        record = record["class_itself"].partition(":")[2]
    return {prefix: record}


def varying_fields(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the fields in which flat records differ, in the records' order.

    A field that some of the records lack differs.
    """
    names = dict.fromkeys(name for record in records for name in record)
    return [
        name
        for name in names
        if any(name not in one or one[name] != records[0].get(name) for one in records)
    ]
