"""Configs and networks as JSON values, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from flax_resnet.errors import UserError, did_you_mean

REMOVED_FIELDS: dict[str, dict[str, Any]] = {
    "flax_resnet.augment:Augment": {"erasing": 0.0},
    "flax_resnet.guards:Guard": {"skips": 0},
    **{
        f"flax_resnet.optim:{name}": {"stem_bias_until": 1.0}
        for name in ("SGD", "Adam", "AdamW", "LARS", "LAMB", "Muon")
    },
}
"""{"module:Name" of a class: {field that the class no longer has: value that turned it off}}."""

ADDED_FIELDS: dict[str, dict[str, Any]] = {
    "flax_resnet.data.config:DataConfig": {"as_displayed": False},
    "flax_resnet.data.decode:Decoder": {"as_displayed": False},
}
"""{today's "module:Name": {field: what a record from before the field stands for}}."""

MOVED_MODULES: dict[str, str] = {
    "flax_resnet.augment": "flax_resnet.data.augment",
    "flax_resnet.checkpoint": "flax_resnet.checkpoints.checkpoints",
    "flax_resnet.config": "flax_resnet.training.config",
    "flax_resnet.data": "flax_resnet.data.config",
    "flax_resnet.datasets.decode": "flax_resnet.data.decode",
    "flax_resnet.guards": "flax_resnet.training.guards",
    "flax_resnet.layers": "flax_resnet.models.layers",
    "flax_resnet.optim": "flax_resnet.optim.optimizers",
    "flax_resnet.preprocess": "flax_resnet.data.preprocess",
    "flax_resnet.regularize": "flax_resnet.models.regularize",
    "flax_resnet.schedules": "flax_resnet.optim.schedules",
}
"""{module that older records name for its classes: the module that has them today}."""

MOVED_CLASSES: dict[str, str] = {
    "flax_resnet.models.speed:SpeedNet": "experiments.speedrun:SpeedNet",
    "flax_resnet.schedules:Triangle": "experiments.speedrun:Triangle",
    "flax_resnet.optim:SGD.stem_bias_until": "experiments.speedrun:SpeedSGD",
}
"""{"module:Name" that older records give a class: its "module:Name" today}.

A key "module:Name.field" is a field that only the class on the right still has.
"""


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
    fields = fields_of(record)
    of_field = (f"{record['class']}.{name}" for name in fields)
    cls = find_class(next((key for key in of_field if key in MOVED_CLASSES), record["class"]))
    added = ADDED_FIELDS.get(class_name(cls), {})
    values = {name: from_record(value) for name, value in {**added, **fields}.items()}
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values.keys() - known:
        advice = f"{did_you_mean(name, known)}: the record is of another version, or mistyped"
        if name in (removed := REMOVED_FIELDS.get(record["class"], {})):
            advice = (
                f" any more, and {values[name]!r} in the record: use the version that wrote it, or "
                f"write {removed[name]!r} there to go on without it"
            )
        raise UserError(f"{record['class']} has no field {name!r}{advice}")
    return cls(**values)


def fields_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a record of a class, but those of REMOVED_FIELDS that are turned off."""
    off = REMOVED_FIELDS.get(record["class"], {}).items()
    return {k: v for k, v in record.items() if k != "class" and (k, v) not in off}


def untracked(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without its tracker, whose class only the program that trained may know."""
    return {name: value for name, value in record.items() if name != "tracking"}


def class_name(cls: type) -> str:
    """``module:Name`` of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def todays_name(name: str) -> str:
    """``module:Name`` today of the class that a record names ``module:Name``."""
    module, colon, qualname = name.partition(":")
    return MOVED_CLASSES.get(name, f"{MOVED_MODULES.get(module, module)}{colon}{qualname}")


def find_class(name: str) -> type:
    """The dataclass or linen module class that ``module:Name`` names.

    A record may come from anyone: only modules of this library and of MOVED_CLASSES are imported.
    """
    today = todays_name(name)
    moved = today in MOVED_CLASSES.values()
    module_name, _, qualname = today.partition(":")
    module = sys.modules.get(module_name)
    if module is None and (moved or module_name.split(".")[0] == "flax_resnet"):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(module_name)
    cls = getattr(module, qualname, None)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls):
        return cls
    why = "not known: expected one of flax_resnet, or MODULE:NAME of a module imported already"
    if moved:
        why = f"in {module_name}, which cannot be imported: put the project on PYTHONPATH"
    raise UserError(f"class {name!r} is {why}")


def flatten(record: Any, prefix: str = "") -> dict[str, Any]:
    """A record as {dotted field: value}, with a class under its own field's name."""
    if isinstance(record, Mapping) and "class" in record:
        flat = {prefix: record["class"].partition(":")[2]} if prefix else {}
        for name, value in fields_of(record).items():
            flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
        return flat
    if isinstance(record, Mapping):
        record = record["class_itself"].partition(":")[2]
    return {prefix: record}


def varying_fields(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the fields in which flat records differ, or that some of them lack, in order."""
    names = dict.fromkeys(name for record in records for name in record)
    return [n for n in names if any(n not in r or r[n] != records[0].get(n) for r in records)]
