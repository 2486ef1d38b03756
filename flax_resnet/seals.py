"""A seal on a directory: its files with their sizes and hashes, in one file that is hashed too.

It is written last. So a directory with a seal was finished, and one whose files match their seal
is what was written.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

SEAL = "SEALED.json"
BLOCK_BYTES = 2**20
THREADS = 8  # hashing lets go of the interpreter, and so does waiting for a bucket


@dataclasses.dataclass(frozen=True)
class Seal:
    """What a seal says.

    Attributes:
      files: relative name to (bytes, sha256).
      scores: what the checkpoint was evaluated to, or None.
    """

    files: dict[str, tuple[int, str]]
    scores: dict[str, float] | None = None


def is_remote(directory: epath.PathLike) -> bool:
    """Whether it is a bucket's."""
    return "://" in str(directory)


def take(directory: epath.Path, scores: dict[str, float] | None = None) -> Seal:
    """Hashes every file of a directory."""
    return Seal(_hashes(directory, sorted(files(directory))), scores)


def write(directory: epath.Path, seal: Seal) -> None:
    """Puts a seal on a directory, in the place of one that is there, whole or not at all."""
    text = _text(seal)
    record = json.dumps({"sha256": _digest(text), "sealed": text})
    path = directory / SEAL
    if is_remote(directory):
        path.write_text(record)  # an object appears when it is whole
        return
    # Not files.replacing: that is for pathlib's paths.
    partial = directory / f"{SEAL}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.write_text(record)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def read(directory: epath.Path) -> Seal | None:
    """The seal of a directory; None where there is none, or it is damaged.

    Raises:
      OSError: a bucket did not answer.
    """
    try:
        text = (directory / SEAL).read_text()
    except FileNotFoundError:
        return None
    except ValueError:  # no UTF-8
        return None
    except OSError:
        if is_remote(directory):  # that says nothing of the seal
            raise
        return None
    try:
        record = json.loads(text)
        if record["sha256"] != _digest(record["sealed"]):
            return None
        sealed = json.loads(record["sealed"])
        files = {name: (int(size), str(sha)) for name, (size, sha) in sealed["files"].items()}
        return Seal(files, sealed["scores"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def exists(directory: epath.Path) -> bool:
    """Whether a directory has a seal, whole or not."""
    try:  # not Path.exists: it is False too where a bucket does not answer
        return any(path.name == SEAL for path in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False


def problem(directory: epath.Path, seal: Seal) -> str | None:
    """The first thing in which a directory is not what was sealed, or None."""
    try:
        found = set(files(directory))
        for name in sorted(found ^ seal.files.keys()):
            return f"{name} is " + ("missing" if name in seal.files else "not one of its files")
        hashes = _hashes(directory, seal.files)
    except OSError as error:  # it is being removed, or the disk is bad
        return f"it cannot be read: {error.strerror or error}"
    for name, (size, sha) in seal.files.items():
        have, hashed = hashes[name]
        if have != size:
            return f"{name} has {have} bytes of {size}"
        if hashed != sha:
            return f"{name} has other bytes than were written"
    return None


def files(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    """Relative names of all files of a directory but the seal."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from files(path, f"{prefix}{path.name}/")
        elif prefix or not path.name.startswith(SEAL):
            yield prefix + path.name


def remove(directory: epath.Path) -> None:
    """Removes a sealed directory, the seal first."""
    (directory / SEAL).unlink(missing_ok=True)
    directory.rmtree(missing_ok=True)


def _hashes(directory: epath.Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        names = list(names)
        hashed = pool.map(_hashed, [directory / name for name in names])
        return dict(zip(names, hashed, strict=True))


def _hashed(path: epath.Path) -> tuple[int, str]:
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            found.update(block)
            size += len(block)
    return size, found.hexdigest()


def _text(seal: Seal) -> str:
    return json.dumps(dataclasses.asdict(seal), sort_keys=True)


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()
