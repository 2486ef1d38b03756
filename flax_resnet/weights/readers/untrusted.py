"""What the readers of weight files share: texts of a file nobody vouches for, in messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

MAX_RANK = 8


class Info(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """numpy's name, or the file's word for a dtype that numpy lacks."""


Select = Callable[[Mapping[str, Info], Mapping[str, str]], Mapping[str, str]]
"""Tensors by name, and the kind of what else has a name, to new names of the tensors to read."""


def shown(value: object, length: int = 80) -> str:
    """``value`` from a file as it may stand in a message: short, one line, plain ASCII.

    A file's own text could otherwise fill the screen, or carry a terminal's control codes.
    """
    if isinstance(value, str):
        return ascii(value[:length]) + ("..." if len(value) > length else "")
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else "a number of more than 128 bits"
    return f"a {type(value).__name__}"
