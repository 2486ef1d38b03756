"""Files written whole or not at all, the cache, errors as one line, a hash of arrays."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shlex
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from flax_resnet.errors import TryAgain, UserError

# Errors of a disk that is full, a quota that is used up, and a file larger than is allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
def replacing_tree(path: Path) -> Iterator[Path]:
    """Yields a path of the same name for a file or a directory, which takes ``path``'s place, even
    a directory's, when the block ends without error."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        partial, before = Path(directory) / path.name, Path(directory) / f"{path.name}.before"
        yield partial
        if path.is_dir():
            path.replace(before)
        try:
            partial.replace(path)
        except OSError:
            if before.exists():
                before.replace(path)
            raise


@contextlib.contextmanager
def os_error_as_one_line(place: str | Path) -> Iterator[None]:
    """Turns an OSError into a UserError that says that ``place`` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def error_as_one_line(line: Callable[[Exception], str], num_processes: int = 1) -> Iterator[None]:
    """Turns whatever a library or the file system raises into a UserError of ``line`` of it.

    With several processes it is a TryAgain, as of another's death, unless a disk is full.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = reason(error) in map(os.strerror, FULL)
        kind = TryAgain if num_processes > 1 and not full else UserError
        raise kind(line(error)) from error


def reason(error: BaseException) -> str:
    """An error on one line, short; a full disk is named as the system names it."""
    text = " ".join((str(error) or type(error).__name__).split())
    return next((name for name in map(os.strerror, FULL) if name in text), text[:200])


def shown(text: str | Path) -> str:
    """A text that can be printed: bytes of a file's name that are no UTF-8 are escaped, \\xe9."""
    try:
        return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return ascii(str(text))[1:-1]


def quoted(word: str | Path) -> str:
    """A word of a shell command that is printed; bash and zsh read $'...' with escapes too."""
    if str(word).isprintable():
        return shlex.quote(str(word))
    escaped = (
        f"\\x{b:02x}" if b < 32 or b > 126 or b in b"'\\" else chr(b) for b in os.fsencode(word)
    )
    return f"$'{''.join(escaped)}'"


def cache_dir() -> Path:
    """Where downloads are kept: $FLAX_RESNET_CACHE, or flax_resnet in $XDG_CACHE_HOME or ~/.cache;
    weights are in its ``weights``."""
    if own := os.environ.get("FLAX_RESNET_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_resnet"


def digest(parts: Iterable[np.ndarray | bytes | str]) -> str:
    """sha256 of arrays (their dtypes, shapes and values), bytes and texts, in order."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape} ".encode())
            found.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            found.update(f"{len(data)} ".encode())
            found.update(data)
    return found.hexdigest()
