"""Which checkpoints of a directory are whole: the seal of each, a file that lists its other files.

Each checkpoint is a directory named by its step. Its seal has the size and the hash of every file
and is written last.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from flax_resnet.errors import UserError
from flax_resnet.records.files import replacing

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


def open_directory(directory: epath.PathLike) -> epath.Path:
    """The absolute path of a directory, or the one of a bucket that orbax can write to.

    Raises:
      UserError: orbax cannot write there.
    """
    if not is_remote(directory):
        return epath.Path(directory).resolve()
    if not str(directory).startswith("gs://"):
        raise UserError(
            f"{directory}: expected a path or gs://BUCKET/PATH, where orbax can write: mount "
            "another bucket, and give the path of the mount"
        )
    import fsspec

    # Other processes write there too, and so does orbax, not through gcsfs.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(directory)


def take(directory: epath.Path, scores: dict[str, float] | None = None) -> Seal:
    """Hashes every file of a directory."""
    names = sorted(_names(directory))
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(lambda name: _hash(directory / name), names)
        return Seal(dict(zip(names, hashes, strict=True)), scores)


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
    """The seal of a directory: None where there is none, ``DAMAGED`` where it is damaged."""
    try:
        record = json.loads((directory / SEAL).read_text())
        is_whole = hashlib.sha256(record["sealed"].encode()).hexdigest() == record["sha256"]
        return Seal(**json.loads(record["sealed"])) if is_whole else DAMAGED
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return DAMAGED


def problem(directory: epath.Path, seal: Seal) -> str | None:
    """The first difference between a directory and its seal, or None."""
    if seal is DAMAGED:
        return f"{SEAL} is not as it was written"
    try:
        files = take(directory).files
    except OSError as error:
        if is_remote(directory) or isinstance(error, FileNotFoundError):
            raise
        return f"it cannot be read: {error.strerror}"
    for name in sorted(files.keys() | seal.files.keys()):
        if files.get(name) != seal.files.get(name):
            return f"{name} is not as it was written"
    return None


def steps(directory: epath.Path) -> dict[int, Seal]:
    """The steps in a directory that were written to the end, with their seals."""
    seals = {int(p.name): read(p) for p in _entries(directory) if p.name.isdecimal()}
    return {step: seal for step, seal in seals.items() if seal is not None}


def _entries(directory: epath.Path) -> list[epath.Path]:
    # Not by glob(), in which epath takes the directory for a part of the pattern.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return list(directory.iterdir())
    return []


def by_top1(steps: Mapping[int, Seal]) -> list[int]:
    """The steps that were evaluated, the highest top-1 first; of equal ones the newest."""
    rated = [(seal.scores["top1"], step) for step, seal in steps.items() if seal.scores]
    return [step for _, step in sorted(rated, reverse=True)]


def remove(directory: epath.Path) -> None:
    """Removes a sealed directory, the seal first: what a kill leaves is no checkpoint."""
    (directory / SEAL).unlink(missing_ok=True)
    directory.rmtree(missing_ok=True)


def prune(directory: epath.Path, keep_last: int, keep_best: int) -> None:
    """Removes all steps of a directory but the newest and the best."""
    sealed = steps(directory)
    kept = {*sorted(sealed)[-keep_last:], *by_top1(sealed)[:keep_best]}
    for step in sealed.keys() - kept:
        remove(directory / str(step))


def tidy(directory: epath.Path, newest: float) -> list[str]:
    """Makes a directory ready for a run that goes on from its step ``newest``.

    Steps that were not finished are removed, and their names returned. What is newer, or has a
    damaged seal, is set aside as ``STEP.damaged``; in a bucket, which cannot rename, it is removed.
    """
    if not is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)
    sealed, removed = steps(directory), []
    for path in _entries(directory):
        seal = sealed.get(int(path.name)) if path.name.isdecimal() else None
        if seal is not None and (int(path.name) > newest or seal is DAMAGED):
            aside = path.with_name(f"{path.name}.damaged")
            aside.rmtree(missing_ok=True)
            path.rmtree() if is_remote(path) else path.rename(aside)
        elif seal is None and (path.name.isdecimal() or ".orbax-checkpoint-tmp" in path.name):
            path.rmtree()
            removed.append(path.name)
    return sorted(removed)
