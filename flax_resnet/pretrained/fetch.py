"""Published weights on this machine: from the cache, or downloaded into it and verified."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flax_resnet.errors import UserError
from flax_resnet.pretrained.download import (
    Unavailable,
    address,
    check_online,
    locate,
    persist,
    size_of,
    transfer,
)
from flax_resnet.pretrained.published import Checksum, Published

LOG = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where downloads are kept: $FLAX_RESNET_CACHE, else flax_resnet in the user's cache.

    The user's cache is $XDG_CACHE_HOME or ~/.cache. Weights are in the sub-folder ``weights``.
    """
    if own := os.environ.get("FLAX_RESNET_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_resnet"


def fetch(published: Published) -> Path:
    """The file of published weights, downloaded where it is not in the cache yet.

    It is verified whenever it is asked for. A download that breaks off is resumed, by a later
    process too; processes that want the same file at once wait for the first of them.
    $HF_ENDPOINT stands for the Hugging Face hub, which alone is shown $HF_TOKEN; with
    $FLAX_RESNET_OFFLINE or $HF_HUB_OFFLINE set to 1 nothing is asked of the network.

    Raises:
      UserError: it cannot be downloaded or written, or is not the file that was published.
    """
    path = cache_dir() / "weights" / published.filename
    try:
        if not path.is_file():
            check_online()
            path.parent.mkdir(parents=True, exist_ok=True)
            with _partial(path) as file:
                if file is not None:
                    _download(published, path, file)
                    return path
        _check_kept(published, path)
    except Unavailable as error:
        raise UserError(
            f"weights {published.tag!r} of {published.network} are not on this machine and "
            f"{address(published)} cannot be downloaded ({error}): get it elsewhere and save it "
            f"as {path}, or give the path of a file"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read or written ({error}): free space there, or set "
            "FLAX_RESNET_CACHE to another directory"
        ) from error
    return path


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[BinaryIO | None]:
    """The unfinished file, this process's alone; None: meanwhile another one has finished it."""
    partial = _beside(path, "partial")

    def current(file: BinaryIO) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(partial.stat(), os.fstat(file.fileno()))
        return False

    while True:
        with partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                LOG.warning("waiting for another process to download %s", path)
                fcntl.flock(file, fcntl.LOCK_EX)
            # Its holder until now has moved it into place, or removed it as wrong.
            if not path.is_file() and not current(file):
                continue
            try:
                yield None if path.is_file() else file
            finally:
                if current(file) and (path.is_file() or not size_of(file)):
                    partial.unlink()
                    _beside(path, "partial.validator").unlink(missing_ok=True)
            return


def _download(published: Published, path: Path, file: BinaryIO) -> None:
    """From wherever ``file`` ends to the whole, verified, in its place."""
    import requests

    partial, validator = _beside(path, "partial"), _beside(path, "partial.validator")
    with requests.Session() as session, _progress_bar(path.name) as show:
        source = persist(lambda: locate(session, published), file)
        persist(lambda: transfer(session, source, file, validator, show), file)
    file.flush()
    validator.unlink(missing_ok=True)
    if (digest := _mismatch(partial, source.checksum)) is not None:
        partial.unlink()
        raise UserError(
            f"{source.url} gave a file of {_wrong(source.checksum, digest)}: it was removed; try "
            "again, or give the path of a file"
        )
    if published.checksum is None:
        _beside(path, "sha256").write_text(source.checksum.value)
    partial.replace(path)


@contextlib.contextmanager
def _progress_bar(name: str) -> Iterator[Callable[[int, int | None], Any]]:
    """Yields what shows (bytes so far, of how many), on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _check_kept(published: Published, path: Path) -> None:
    """Verifies a file in the cache, whoever put it there."""
    record = _beside(path, "sha256")
    checksum = published.checksum
    if checksum is None and record.is_file():
        checksum = Checksum("sha256", record.read_text().strip())
    if checksum is None:
        import requests

        try:
            check_online()
            with requests.Session() as session:
                checksum = locate(session, published).checksum
        except Unavailable as error:
            LOG.warning(
                "%s is used unverified: %s would say its sha256 (%s)",
                path,
                address(published),
                error,
            )
            return
    if (digest := _mismatch(path, checksum)) is not None:
        raise UserError(
            f"{path} is of {_wrong(checksum, digest)}: it was altered or cut short; delete it and "
            f"it is downloaded again, or save {address(published)} there"
        )
    if published.checksum is None and not record.is_file():
        with contextlib.suppress(OSError):  # a cache that is only read
            record.write_text(checksum.value)


def _mismatch(path: Path, checksum: Checksum) -> str | None:
    """The file's digest unless it is the one wanted."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, checksum.algorithm).hexdigest()
    return None if digest.startswith(checksum.value) else digest


def _wrong(checksum: Checksum, digest: str) -> str:
    rest = "..." if len(checksum.value) < len(digest) else ""
    return f"{checksum.algorithm} {digest}, not {checksum.value}{rest}"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
