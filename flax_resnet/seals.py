"""The seal of a checkpoint directory: a file that lists every other file with its size and hash.

The seal is written last, so a directory with a seal was written to the end. A directory whose
files match its seal holds exactly the bytes that were written.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from flax_resnet.files import replacing

SEAL = "SEALED.json"
# Files hashed at a time: hashing releases the interpreter's lock, and so does waiting for storage.
THREADS = 8


@dataclasses.dataclass(frozen=True)
class Seal:
    """The content of a seal.

    Attributes:
      files: relative file name to [bytes, sha256].
      scores: evaluation of the checkpoint, or None.
    """

    files: dict[str, list[Any]]
    scores: dict[str, float] | None = None


# What ``read`` returns for a seal that is not as it was written.
DAMAGED = Seal({})


def is_remote(directory: epath.PathLike) -> bool:
    """Whether a directory is in a bucket."""
    return "://" in str(directory)


def take(directory: epath.Path, scores: dict[str, float] | None = None) -> Seal:
    """Hashes every file of a directory.

    Raises:
      OSError: a file cannot be read.
    """
    names = sorted(_names(directory))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(lambda name: _hash(directory / name), names)
        return Seal(dict(zip(names, hashes, strict=True)), scores)


def write(directory: epath.Path, seal: Seal) -> None:
    """Writes a seal, whole or not at all; it replaces the one that is there."""
    text = json.dumps(dataclasses.asdict(seal), sort_keys=True)
    record = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "sealed": text})
    if is_remote(directory):
        (directory / SEAL).write_text(record)  # an object appears when it is whole
    else:
        with replacing(Path(directory / SEAL)) as partial:
            partial.write_text(record)


def read(directory: epath.Path) -> Seal | None:
    """The seal of a directory; None where there is none, ``DAMAGED`` where it is damaged.

    Raises:
      OSError: a bucket did not answer.
    """
    try:
        record = json.loads((directory / SEAL).read_text())
        text = record["sealed"]
        if record["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            return DAMAGED
        return Seal(**json.loads(text))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return DAMAGED
    except OSError:
        if is_remote(directory):
            raise
        return DAMAGED


def problem(directory: epath.Path, seal: Seal) -> str | None:
    """The first difference between a directory and its seal, or None.

    Raises:
      OSError: a bucket did not answer.
    """
    if seal is DAMAGED:
        return f"{SEAL} is not as it was written"
    try:
        files = take(directory).files
    except OSError as error:
        if is_remote(directory) and not isinstance(error, FileNotFoundError):
            raise
        return f"it cannot be read: {error.strerror or error}"
    for name in sorted(files.keys() | seal.files.keys()):
        if name not in files:
            return f"{name} is missing"
        if name not in seal.files:
            return f"{name} is not one of its files"
        if files[name] != seal.files[name]:
            return f"{name} has other bytes than were written"
    return None


def remove(directory: epath.Path) -> None:
    """Removes a sealed directory, the seal first: what a kill leaves is no checkpoint."""
    (directory / SEAL).unlink(missing_ok=True)
    directory.rmtree(missing_ok=True)


def _names(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    """Relative names of all files of a directory except the seal."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        elif prefix or not path.name.startswith(SEAL):
            yield prefix + path.name


def _hash(path: epath.Path) -> list[Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), sha256]
