"""The exceptions that are one line, the check of a number, and the name that was meant."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# The least float above 0, as a bound.
POSITIVE = math.ulp(0.0)
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text",
         tuple[float, ...]: "a tuple of numbers", type(None): "None"}  # fmt: skip
"""Types as messages call them."""


class UserError(ValueError):
    """Bad input: one line with the value, what was expected, and what to do.

    The command line prints it without a traceback and exits with ``status``.
    """

    status = 2
    """Of the command: the same one ends so again."""

    def __init__(self, message: str):
        lines = (line.strip() for line in message.expandtabs(1).splitlines())
        super().__init__(" ".join(filter(None, lines)))


class TryAgain(UserError):
    """Nothing is wrong with the command: it may do better later, or on another machine."""

    status = 1
    """As of a process that has died: launchers start it again a few times."""


class Note(UserWarning):
    """What was done with the input that its owner may not expect.

    The command line prints it as one line, ``note: ...``; in Python it is a warning.
    """


def import_extra(package: str, extra: str) -> Any:
    """A package that ``pip install 'flax_resnet[EXTRA]'`` brings; UserError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{package} is not installed ({error}): pip install 'flax_resnet[{extra}]'"
        ) from error


def check_range(name: str, value: float | None, least: float, below: float = math.inf) -> None:
    """Raises UserError unless ``value`` is None or least <= value < below; NaN never is."""
    if value is not None and not least <= value < below:
        low = "more than 0" if least == POSITIVE else f"{least} or more"
        high = "" if below == math.inf else f", below {below}"
        raise UserError(f"{name}={value}: expected {low}{high}")


def is_number(value: Any) -> bool:
    """True for a finite int or float."""
    return _fits(value, float) and abs(value) < 1e30  # NaN is not


def check_types(owner: Any, prefix: str = "") -> None:
    """Raises UserError for a field whose value is none that its annotation allows.

    Args:
      owner: a dataclass or a linen module. Numbers may be numpy's, and a tuple a list.
      prefix: what messages put before a field's name, such as "data.".
    """
    for name, hint in _hints(type(owner)).items():  # type: ignore[arg-type]
        value = getattr(owner, name)
        if not _fits(value, hint):
            raise UserError(f"{prefix}{name}={value!r:.60}: expected {_expected(value, hint)}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _kinds(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """False where an annotation rules a value out; sequences, callables and Any rule none out."""
    if len(kinds := _kinds(hint)) > 1:
        return any(_fits(value, kind) for kind in kinds)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(x, arguments[0]) for x in value)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is Any or origin is not None or not isinstance(hint, type):
        return True
    return isinstance(value, (bool, np.bool_) if hint is bool else hint)


def _expected(value: Any, hint: Any) -> str:
    kinds = _kinds(hint)
    values = [x for kind in kinds if typing.get_origin(kind) is typing.Literal
              for x in typing.get_args(kind)]  # fmt: skip
    if not values:
        return " or ".join(WORDS.get(kind) or kind.__name__ for kind in kinds)
    values += [None] * (type(None) in kinds)
    near = did_you_mean(str(value), [x for x in values if isinstance(x, str)])
    return f"one of {', '.join(map(repr, values))}{near}"


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the nearest option, or an empty string."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def first_few(items: Sequence[str], count: int = 8) -> str:
    """The first items, and how many more there are."""
    more = f", and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more
