"""Writing a file whole or not at all, and a hash of arrays."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from flax_resnet.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to; it takes ``path``'s place when the block ends without error."""
    # A name of its own: two processes may be writing the same file.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def room(place: Path, advice: str) -> Iterator[None]:
    """Turns a disk or a quota that is full into one line.

    Args:
      place: where it is written.
      advice: what to do, after the reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(f"{place} cannot be written ({error.strerror}): {advice}") from error


def digest(parts: Iterable[np.ndarray | bytes | str]) -> str:
    """sha256 of arrays (their dtypes, shapes and values), bytes and texts, in order."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape} ".encode())
            found.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            data = part.encode() if isinstance(part, str) else part
            found.update(f"{len(data)} ".encode())
            found.update(data)
    return found.hexdigest()
