"""Files of a repository on the Hugging Face hub: named, downloaded, checked, and why they are not.

The client is huggingface_hub (the extra [hub]), with its cache, its token and its variables. It
compares sizes only, so what it gives is compared with its hash here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_resnet import files
from flax_resnet.errors import UserError
from flax_resnet.pretrained.download import Unavailable, check_online, endpoint

LOG = logging.getLogger(__name__)
PREFIX = "hf://"
WEIGHTS = "model.safetensors"
_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
_COMMIT = re.compile("[0-9a-f]{40}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOGIN = "set HF_TOKEN, or log in with `hf auth login`"


@dataclasses.dataclass(frozen=True)
class Repo:
    """A repository of a model on the hub, at a revision."""

    name: str
    """OWNER/NAME."""
    revision: str | None = None
    """A branch, a tag or a commit; None: what the branch main has now."""

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def url(self) -> str:
        """Its page."""
        return f"{endpoint()}/{self.name}"


def is_address(weights: Any) -> bool:
    """True for what begins as hf:// does."""
    return isinstance(weights, str) and weights.startswith(PREFIX)


def parse(address: str) -> Repo:
    """OWNER/NAME or OWNER/NAME@REVISION, with hf:// before it or not.

    Raises:
      UserError: it is none.
    """
    found = re.fullmatch(f"(?:{PREFIX})?({_PART}/{_PART})(?:@([^@\\s]+))?", str(address))
    if found is None or any(bad in found[1] for bad in ("--", "..")):
        raise UserError(
            f"{str(address)!r:.120}: expected OWNER/NAME of a repository on the hub, or "
            "OWNER/NAME@REVISION with a branch, a tag or a commit"
        )
    return Repo(found[1], found[2])


def library() -> Any:
    """The module huggingface_hub.

    Raises:
      UserError: it is not installed.
    """
    try:
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UserError(
            f"the Hugging Face hub needs huggingface_hub ({error}): pip install 'flax_resnet[hub]'"
        ) from error
    return huggingface_hub


def offline() -> str | None:
    """Why the network is not to be used; None where it may be."""
    try:
        check_online()
    except Unavailable as error:
        return str(error)
    return None


def fetch_file(repo: Repo, name: str = WEIGHTS) -> Path:
    """A file of a repository, downloaded where the newest is not in huggingface_hub's cache yet.

    Without a network, and where $FLAX_RESNET_OFFLINE or $HF_HUB_OFFLINE is 1, it is the one that
    the cache has of this revision. Its hash is compared whenever it is asked for.

    Raises:
      UserError: it cannot be had, or is not what the hub says it is.
    """
    client = library()
    with explained(repo, f"{repo}: {name} cannot be downloaded"):
        path = client.hf_hub_download(
            repo.name,
            name,
            revision=repo.revision,
            endpoint=endpoint(),
            local_files_only=offline() is not None,
            library_name="flax_resnet",
        )
    _verify(repo, Path(path))
    return Path(path)


def fetch_optional(repo: Repo, name: str) -> Path | None:
    """As ``fetch_file``; None where the repository has no such file, or offline the cache.

    Raises:
      UserError: it is there and cannot be had.
    """
    try:
        return fetch_file(repo, name)
    except UserError as error:
        kinds, cause = library().errors, error.__cause__
        not_here = isinstance(cause, kinds.LocalEntryNotFoundError)
        if isinstance(cause, kinds.EntryNotFoundError) and (offline() or not not_here):
            return None
        raise


def commit_of(path: Path) -> str | None:
    """The commit that a file in the cache is of."""
    parts = [part for part in path.parts if _COMMIT.fullmatch(part)]
    return parts[-1] if parts else None


@contextlib.contextmanager
def explained(repo: Repo, what: str) -> Iterator[None]:
    """Turns whatever the client raises into one line that begins with ``what``.

    Its progress bars are shown on a terminal only.
    """
    bars = library().utils
    hide = not (sys.stderr.isatty() or bars.are_progress_bars_disabled())
    if hide:
        bars.disable_progress_bars()
    try:
        with files.error_as_one_line(lambda error: f"{what}: {_why(error, repo)}"):
            yield
    finally:
        if hide:
            bars.enable_progress_bars()


def _why(error: BaseException, repo: Repo) -> str:
    """What went wrong, and what to do about it."""
    kinds = library().errors
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, kinds.GatedRepoError):
        return f"it is gated (HTTP {status}): ask for access at {repo.url}, then {_LOGIN}"
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"there is no revision {repo.revision!r}: expected a branch, a tag or a commit of it"
    if isinstance(error, kinds.RepositoryNotFoundError):
        return (
            f"there is no such repository at {endpoint()}, or it is private and not yours (HTTP "
            f"{status}): look at the name, or {_LOGIN}"
        )
    if isinstance(error, kinds.LocalEntryNotFoundError):
        return _not_here(error, repo)
    if isinstance(error, kinds.EntryNotFoundError):
        return f"there is no such file in it: {repo.url} shows what there is"
    if status in (401, 403):
        said = getattr(error, "server_message", None) or "access is refused"
        return f"{files.reason(ValueError(said))} (HTTP {status}): {_LOGIN}, with a token for it"
    if isinstance(error, OSError) and error.errno in _FULL:
        return f"{error.strerror}: free space, or set HF_HUB_CACHE to another directory"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # an upload in a thread
        return _why(error.__cause__, repo)
    return f"{type(error).__name__}: {files.reason(error)}"


def _not_here(error: BaseException, repo: Repo) -> str:
    """What to do where the cache has not got the file and the hub was not reached."""
    cache = library().constants.HF_HUB_CACHE
    if (variable := offline()) is not None:
        return (
            f"it is not in {cache} and {variable}: unset it once, or copy that directory from a "
            "machine that has it"
        )
    cause = error.__cause__
    detail = files.reason(cause) if cause is not None else "no answer"
    return f"{endpoint()} is not reached ({detail}) and it is not in {cache}: try again later"


def _verify(repo: Repo, path: Path) -> None:
    """Raises UserError unless a file in the cache is what its name there says.

    A link in the cache leads to a file called by the hub's hash: sha256, or of small files git's.
    """
    if not path.is_symlink():
        LOG.warning("%s is used unverified: the cache keeps its hash in links, and has none", path)
        return
    blob = path.parent / path.readlink()
    try:
        found = _digests(blob, len(blob.name))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({files.reason(error)})") from error
    if not found:
        LOG.warning("%s is used unverified: %s is no hash that is known", path, blob.name)
    elif blob.name not in found:
        for wrong in {path, blob, blob.resolve()}:
            wrong.unlink(missing_ok=True)
        raise UserError(
            f"{repo}: {path.name} has the hash {found[0]}, not {blob.name}: it was altered or cut "
            "short, and was removed from the cache; try again"
        )


def _digests(path: Path, length: int) -> list[str]:
    """What a hash of so many hex digits may be of a file's content."""
    if length == 64:
        with path.open("rb") as file:
            return [hashlib.file_digest(file, "sha256").hexdigest()]
    if length == 40:
        data = path.read_bytes()
        head = f"blob {len(data)}\0".encode()  # as git hashes; mirrors of the hub do not
        return [hashlib.sha1(part + data).hexdigest() for part in (head, b"")]
    return []
