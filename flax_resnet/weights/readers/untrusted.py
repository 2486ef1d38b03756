"""What the readers of files that nobody vouches for share: texts in messages, ZIP directories."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Mapping
from typing import NamedTuple

MAX_RANK = 8
MAX_DIRECTORY = 8 * 2**20
"""Bytes of a ZIP's directory; its objects take up to 15 times as many."""


class LimitedFile(io.BufferedReader):
    """A file that is read in pieces of ``most`` bytes at the most."""

    most: float = math.inf

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads up to ``size`` bytes, or all where it is None."""
        if size is not None and size > self.most:
            raise ValueError(f"a directory of {size} bytes")
        return super().read(size)


def open_zip(file: LimitedFile) -> zipfile.ZipFile:
    """The archive in a file, whose directory zipfile reads in one piece."""
    file.most = MAX_DIRECTORY
    archive = zipfile.ZipFile(file)
    file.most = math.inf
    return archive


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
    if isinstance(value, int) and value.bit_length() <= 128:
        return str(value)
    return f"a {type(value).__name__}"
