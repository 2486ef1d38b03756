"""The exceptions that are one line, the check of a number, and the name that was meant."""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import numbers
import typing
from collections.abc import Iterable
from typing import Any

import numpy as np

# The least float above 0, as a bound.
POSITIVE = math.ulp(0.0)
KINDS: dict[type, tuple[str, Any]] = {
    bool: ("True or False", (bool, np.bool_)),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    str: ("text", str),
    type(None): ("None", type(None)),
}
"""{annotation: (what messages call it, classes of its values)}; a bool is no number."""


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
    return _is_a(float, value) and abs(value) < 1e30  # NaN is not


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, KINDS[kind][1]) and (kind is bool or not isinstance(value, bool))


def check_types(owner: Any, prefix: str = "") -> None:
    """Raises UserError for a field whose value is of no type that its annotation names.

    Args:
      owner: a dataclass; fields annotated with other than bool, int, float, str and None are left.
      prefix: what messages put before a field's name, such as "data.".
    """
    for name, hint in typing.get_type_hints(type(owner)).items():
        kinds = typing.get_args(hint) or (hint,)
        value = getattr(owner, name)
        if {*kinds} <= KINDS.keys() and not any(_is_a(kind, value) for kind in kinds):
            expected = " or ".join(KINDS[kind][0] for kind in kinds)
            raise UserError(f"{prefix}{name}={value!r:.60}: expected {expected}")


def check_choices(owner: Any, prefix: str = "") -> None:
    """Raises UserError where a field annotated as a Literal holds none of its values."""
    for name, allowed in _choices(type(owner)).items():  # type: ignore[arg-type]
        value = getattr(owner, name)
        if value not in allowed:
            near = did_you_mean(str(value), [a for a in allowed if isinstance(a, str)])
            values = ", ".join(map(repr, allowed))
            raise UserError(f"{prefix}{name}={value!r:.60}: expected one of {values}{near}")


@functools.cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """{field: its values} of the fields that are a Literal, or one or None."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                none = [None] if type(None) in typing.get_args(hint) else []
                found[name] = (*typing.get_args(part), *none)
    return found


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ``" (did you mean 'x'?)"`` for the nearest option, or an empty string."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
