"""Files of a repository on the Hugging Face hub: downloaded, and compared with their hashes.

The client is huggingface_hub (the extra [hub]), with its cache, its token, its environment
variables and its messages. It compares no more than sizes, so hashes are compared here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError, import_extra
from flax_resnet.records.files import error_as_one_line
from flax_resnet.weights.config_files import CONFIG, PROCESSOR
from flax_resnet.weights.published_cache import offline

PREFIX = "hf://"
WEIGHTS = "model.safetensors"


def is_address(weights: Any) -> bool:
    """True for a text that begins with hf://."""
    return isinstance(weights, str) and weights.startswith(PREFIX)


def parse(address: str) -> tuple[str, str | None]:
    """(OWNER/NAME, REVISION or None) of OWNER/NAME[@REVISION], with hf:// before it or not."""
    parts = re.fullmatch(r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([^@\s]+))?", address)
    if parts is None:
        raise UserError(
            f"{address!r:.120}: expected OWNER/NAME of a repository on the hub, or "
            "OWNER/NAME@REVISION with a branch, a tag or a commit"
        )
    return parts[1], parts[2]


def client() -> Any:
    """An ``HfApi`` of huggingface_hub; UserError where that is not installed."""
    package = import_extra("huggingface_hub", "hub")
    if not sys.stderr.isatty():
        import_extra("huggingface_hub.utils", "hub").disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or None
    return package.HfApi(endpoint, library_name="flax_resnet")


def one_line(what: str) -> contextlib.AbstractContextManager[None]:
    """Turns whatever huggingface_hub raises into one line that begins with ``what``."""
    return error_as_one_line(lambda error: f"{what} ({type(error).__name__}): {error}")


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Without the warnings of huggingface_hub: what is wrong is said here, in one line."""
    logs = import_extra("huggingface_hub.utils.logging", "hub")
    before = logs.get_verbosity()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(before)


def fetch_folder(address: str, names: Sequence[str] = (WEIGHTS, CONFIG, PROCESSOR)) -> Path:
    """A folder in huggingface_hub's cache with those files that a repository has, of one commit.

    Without a network, and where $FLAX_RESNET_OFFLINE or $HF_HUB_OFFLINE is 1, they are those that
    the cache has of this revision. Their hashes are compared at every use.

    Args:
      address: hf://OWNER/NAME[@REVISION].
      names: of the files; the first must be there.
    """
    (name, revision), api, variable = parse(address), client(), offline()
    why = f", {variable} is set" if variable else ""
    with one_line(f"{address} cannot be downloaded{why}"), _unlogged():
        local = {"local_files_only": variable is not None, "allow_patterns": list(names)}
        folder = Path(api.snapshot_download(name, revision=revision, **local))
    if not (folder / names[0]).exists():
        raise UserError(f"{address} has no {names[0]}{why}: name a repository that has one")
    for path in (folder / name for name in names):
        if path.exists():
            _check_hash(address, path)
    return folder


def _check_hash(address: str, path: Path) -> None:
    """Raises UserError unless a file in the cache has the hash that the hub gave.

    ``path`` is a link to a file that the cache names by its hash: the sha256 of a large file,
    git's sha1 of a small one.
    """
    blob = path.resolve()
    data = blob.read_bytes()
    if len(blob.name) == 64:
        actual = hashlib.sha256(data).hexdigest()
    elif len(blob.name) == 40:
        actual = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:
        logging.getLogger(__name__).warning("%s is used unverified: there is no hash of it", path)
        return
    if actual != blob.name:
        path.unlink()
        blob.unlink()
        raise UserError(
            f"{address}: {path.name} has the hash {actual}, not {blob.name}: it was altered or cut "
            "short, and was removed from the cache; try again"
        )
