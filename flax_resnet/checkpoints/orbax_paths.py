"""What orbax needs from its caller: a path that it can take, a quiet import, arrays by name."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from flax_resnet.checkpoints.seals import is_remote
from flax_resnet.errors import UserError

# Orbax uses the whole path as a glob pattern, and tensorstore reads it as UTF-8.
PLAIN_PATH = re.compile(r"[\w ./,=+@:-]*", re.ASCII)


def plain_path(directory: epath.Path, stack: contextlib.ExitStack) -> epath.Path:
    """The path to give to orbax: a symbolic link to ``directory`` if its name has other characters.

    The link is removed with ``stack``. Several processes may have links of different names.

    Raises:
      UserError: no link can be made.
    """
    if is_remote(directory) or PLAIN_PATH.fullmatch(str(directory)):
        return directory
    try:
        place = tempfile.gettempdir()
        temporary = tempfile.TemporaryDirectory(
            prefix="flax_resnet-", dir=place if PLAIN_PATH.fullmatch(place) else "/tmp"
        )
        link = Path(stack.enter_context(temporary)) / "checkpoints"
        link.symlink_to(directory)
    except OSError as error:
        raise UserError(
            f"checkpoints in {directory}: orbax needs a path of letters, digits and ./,=+@:-_ "
            f"alone, and no link to this one can be made ({error}): name another directory"
        ) from error
    return epath.Path(link)


def signatures(tree: Any) -> dict[str, tuple[Any, str]]:
    """(shape, dtype) of each array by its path, such as params/head/kernel."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (x.shape, str(x.dtype))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@functools.cache
def orbax() -> Any:
    """The package orbax.checkpoint, whose threads do not print what the caller is told."""
    # Importing it takes as long as much of the rest: at the first save, not before the first step.
    import orbax.checkpoint

    def is_not_of_orbax(record: logging.LogRecord) -> bool:
        texts = record.pathname + record.getMessage()
        return record.levelno < logging.ERROR or "/orbax/" not in texts

    def report_unraisable(unraisable: Any, report: Callable[..., Any] = sys.unraisablehook) -> None:
        # Of tensorstore's writes that end after another has failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    # Its threads report the error of a failed save on stderr as well as to the caller.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_not_of_orbax)
    sys.unraisablehook = report_unraisable
    return orbax.checkpoint
