"""Where checkpoints lie: a directory, or a bucket; and the noise of a save that fails.

Orbax writes to s3:// not at all, and to gs:// in ways of its own, with credentials of its own. So
a checkpoint for a bucket is put together in a local directory, and copied when it is whole, its
seal last; and it is read from a local copy.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import logging
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath
from etils.epath import backend

from flax_resnet.errors import UserError
from flax_resnet.seals import BLOCK_BYTES, THREADS
from flax_resnet.seals import is_remote as is_remote

NEEDS = {"gs": "gcsfs", "s3": "s3fs"}
LOGGERS = ("absl", "asyncio")
FULL = ("No space left on device", "Disk quota exceeded", "File too large")


def opened(directory: epath.PathLike) -> epath.Path:
    """The absolute path of a directory, or the one of a bucket's that can be used here.

    Raises:
      UserError: it is of no kind that there is, or what it needs is not installed.
    """
    if not is_remote(directory):
        return epath.Path(directory).resolve()
    scheme = str(directory).partition("://")[0]
    if scheme not in NEEDS:
        raise UserError(f"{directory}: expected a path, gs://BUCKET/PATH or s3://BUCKET/PATH")
    if importlib.util.find_spec(NEEDS[scheme]) is None:
        raise UserError(
            f"{directory}: {scheme}:// needs {NEEDS[scheme]}: pip install 'flax_resnet[remote]'"
        )
    path = epath.Path(directory)
    if importlib.util.find_spec("tensorflow") and os.environ.get("EPATH_USE_TF") not in ("0", "no"):
        raise UserError(
            f"{directory}: tensorflow is installed, and would be used for it instead of "
            f"{NEEDS[scheme]}: set EPATH_USE_TF=0 in the environment"
        )
    with reached(path):
        files = backend.fsspec_backend.fs(path)
        files.invalidate_cache()
        files.dircache.use_listings_cache = False  # others write there too
    return path


@contextlib.contextmanager
def one_line(line: Callable[[Exception], str]) -> Iterator[None]:
    """Turns whatever a library or the file system raises into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(line(error)) from error


def reached(directory: epath.Path) -> contextlib.AbstractContextManager[None]:
    """Turns whatever a client of a bucket raises into one line."""
    if not is_remote(directory):
        return contextlib.nullcontext()
    return one_line(
        lambda error: (
            f"{directory} cannot be used ({type(error).__name__}: {reason(error)}): is the bucket "
            "there, and do this machine's credentials open it?"
        )
    )


def prepare(directory: epath.Path) -> None:
    """Makes a directory; of a bucket's, makes sure that it can be written.

    Raises:
      UserError: the bucket cannot be written.
    """
    if not is_remote(directory):
        directory.mkdir(parents=True, exist_ok=True)
        return
    with reached(directory):  # no mkdir: s3fs would make a bucket that is not there
        trial = directory / f".{uuid.uuid4().hex[:8]}.trial"
        trial.write_text("")
        trial.unlink()


def copy(source: epath.Path, target: epath.Path, names: Iterable[str]) -> None:
    """Copies files, several at a time; one that is not there is left out."""

    def one(name: str) -> None:
        if not is_remote(target):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context((source / name).open("rb"))
            except FileNotFoundError:
                return
            shutil.copyfileobj(file, stack.enter_context((target / name).open("wb")), BLOCK_BYTES)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, names))


def reason(error: BaseException) -> str:
    """An error on one line, short; what a full disk is called comes first."""
    text = " ".join((str(error) or type(error).__name__).split())
    return next((known for known in FULL if known in text), text[:200])


class _Hush(logging.Filter):
    """Keeps from stderr what is raised to us as well."""

    def __init__(self) -> None:
        super().__init__()
        self._lock, self._count = threading.Lock(), 0
        self._hook: Any = None

    def filter(self, record: logging.LogRecord) -> bool:
        return not any("/orbax/" in text for text in (record.pathname, record.getMessage()))

    def __call__(self, what: Any) -> None:
        """As sys.unraisablehook: tensorstore's writes that end after the first has failed."""
        if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
            (self._hook or sys.__unraisablehook__)(what)

    def begin(self) -> None:
        """May be called again before its ``end``, by another save."""
        with self._lock:
            self._count += 1
            if self._count == 1:
                for name in LOGGERS:
                    logging.getLogger(name).addFilter(self)
                self._hook, sys.unraisablehook = sys.unraisablehook, self

    def end(self) -> None:
        """After a save that went well: what one that failed has under way may still fail."""
        with self._lock:
            self._count -= 1
            if self._count == 0:
                for name in LOGGERS:
                    logging.getLogger(name).removeFilter(self)
                if sys.unraisablehook is self:
                    sys.unraisablehook = self._hook


hush = _Hush()
