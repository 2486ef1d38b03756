"""Files of a repository on the Hugging Face hub: named, downloaded and compared with their hashes.

The client is huggingface_hub (the extra [hub]), with its cache, its token, its variables and its
messages. It compares no more than sizes, so hashes are compared here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.files import error_as_one_line
from flax_resnet.pretrained.fetch import offline

LOG = logging.getLogger(__name__)
PREFIX = "hf://"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHA256_DIGITS, SHA1_DIGITS = 64, 40
_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]*"


@dataclasses.dataclass(frozen=True)
class Repo:
    """A repository of a model on the hub, at a revision."""

    name: str
    """OWNER/NAME."""
    revision: str | None = None
    """A branch, a tag or a commit; None: what the branch main has now."""

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_address(weights: Any) -> bool:
    """True for a text that begins with hf://."""
    return isinstance(weights, str) and weights.startswith(PREFIX)


def parse(address: str) -> Repo:
    """The repository that OWNER/NAME or OWNER/NAME@REVISION names, with hf:// before it or not.

    Raises:
      UserError: it names none.
    """
    parts = re.fullmatch(f"(?:{PREFIX})?({_PART}/{_PART})(?:@([^@\\s]+))?", str(address))
    if parts is None or any(bad in parts[1] for bad in ("--", "..")):
        raise UserError(
            f"{str(address)!r:.120}: expected OWNER/NAME of a repository on the hub, or "
            "OWNER/NAME@REVISION with a branch, a tag or a commit"
        )
    return Repo(parts[1], parts[2])


def client() -> Any:
    """An ``HfApi`` of huggingface_hub, for the hub that $HF_ENDPOINT names.

    Raises:
      UserError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError as error:
        raise UserError(
            f"the Hugging Face hub needs huggingface_hub ({error}): pip install 'flax_resnet[hub]'"
        ) from error
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or None
    return huggingface_hub.HfApi(endpoint=endpoint, library_name="flax_resnet")


def one_line(what: str) -> contextlib.AbstractContextManager[None]:
    """Turns whatever huggingface_hub raises into one line that begins with ``what``."""
    return error_as_one_line(lambda error: f"{what} ({type(error).__name__}): {error}")


def fetch_folder(repo: Repo, names: Sequence[str] = (WEIGHTS, CONFIG)) -> Path:
    """A folder with those files of a repository that it has, all of one commit.

    It lies in huggingface_hub's cache. Without a network, and where $FLAX_RESNET_OFFLINE or
    $HF_HUB_OFFLINE is 1, the files are those that the cache has of this revision. Their hashes
    are compared at every use.

    Raises:
      UserError: the files cannot be had, are not what the hub says they are, or the weights were
        asked for and there are none.
    """
    api, variable = client(), offline()
    why = f", {variable} is set" if variable else ""
    with one_line(f"{repo} cannot be downloaded{why}"):
        folder = Path(
            api.snapshot_download(
                repo.name,
                revision=repo.revision,
                allow_patterns=list(names),
                local_files_only=variable is not None,
            )
        )
        files = [folder / name for name in names if (folder / name).exists()]
        for path in files:
            _check_hash(repo, path)
    if WEIGHTS in names and folder / WEIGHTS not in files:
        raise UserError(f"{repo} has no {WEIGHTS}{why}: name a repository that has one")
    return folder


def _check_hash(repo: Repo, path: Path) -> None:
    """Raises UserError unless a file in the cache has the hash that the hub gave.

    The cache keeps it as the name of the file that the link ``path`` leads to: the sha256 of a
    large file, git's sha1 of a small one.
    """
    blob = path.resolve()
    expected = blob.name
    with blob.open("rb") as file:
        if len(expected) == SHA256_DIGITS:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        elif len(expected) == SHA1_DIGITS:
            data = file.read()
            actual = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        else:
            LOG.warning("%s is used unverified: the cache has no hash of it", path)
            return
    if actual != expected:
        path.unlink()
        blob.unlink()
        raise UserError(
            f"{repo}: {path.name} has the hash {actual}, not {expected}: it was altered or cut "
            "short, and was removed from the cache; try again"
        )
