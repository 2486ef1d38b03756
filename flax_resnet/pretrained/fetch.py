"""Published weights on this machine: from the cache, or downloaded into it; checked at every use.

pooch downloads the files of torchvision and Keras. It neither continues a download that broke off
nor compares a part of a hash, and torchvision publishes no more than the first digits: these two
are done here. huggingface_hub keeps the weights of the hub (``pretrained.hub``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.pretrained.published import Published

TIMEOUT = (10, 30)
"""Seconds to wait for a connection, and for the next bytes."""
CHUNK = 1 << 16
"""Bytes written at a time: the most that a download loses when its process is killed."""
RETRIES = 2
"""Further attempts at a download that breaks off, or that gives the wrong bytes."""
NOTHING_LEFT, PARTIAL = 416, 206


def cache_dir() -> Path:
    """Where downloads are kept: $FLAX_RESNET_CACHE, else flax_resnet in the user's cache.

    The user's cache is $XDG_CACHE_HOME or ~/.cache. Weights are in the sub-folder ``weights``.
    """
    if own := os.environ.get("FLAX_RESNET_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flax_resnet"


def offline() -> str | None:
    """Name of the variable that keeps this process off the network; None where none does."""
    for variable in ("FLAX_RESNET_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return variable
    return None


def fetch(published: Published) -> Path:
    """The file of published weights, downloaded where the cache has not got it, and verified.

    A download that breaks off is continued, by a later process too. Processes that want the same
    file at once wait for the first of them.

    Raises:
      UserError: the file cannot be downloaded or written, or is not the one that was published.
    """
    path = cache_dir() / "weights" / published.filename
    if not path.is_file():
        _download(published, path)
    _check(published, path, f"delete it and it is downloaded again, or save {published.url} there")
    return path


def _download(published: Published, path: Path) -> None:
    problem = (
        f"weights {published.tag!r} of {published.network} are not on this machine and "
        f"{published.url} cannot be downloaded"
    )
    advice = f"get it elsewhere and save it as {path}, or give the path of a file"
    if (variable := offline()) is not None:
        raise UserError(f"{problem}, {variable} is set: {advice}")
    try:
        import filelock
        import pooch
    except ImportError as error:
        raise UserError(
            f"{problem} ({error}): pip install 'flax_resnet[hub]', or {advice}"
        ) from error
    pooch.get_logger().setLevel("WARNING")
    name = path.name
    cache = pooch.create(
        path.parent, "", registry={name: None}, urls={name: published.url}, retry_if_failed=RETRIES
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache_dir() / f"{name}.lock"):
            cache.fetch(name, downloader=_continued(published, path.with_name(f"{name}.partial")))
    except (OSError, ValueError) as error:
        raise UserError(f"{problem} ({error}): {advice}") from error


def _continued(published: Published, partial: Path) -> Callable[[str, str, Any], None]:
    """A downloader for pooch that goes on from what is in ``partial``."""
    import requests
    from tqdm import tqdm

    def download(url: str, output_file: str, cache: Any) -> None:
        done = partial.stat().st_size if partial.is_file() else 0
        headers = {"Accept-Encoding": "identity"}
        if done:
            headers["Range"] = f"bytes={done}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code != NOTHING_LEFT:
                response.raise_for_status()
                continues = response.status_code == PARTIAL
                done, mode = (done, "ab") if continues else (0, "wb")
                total = done + int(response.headers.get("Content-Length", 0)) or None
                with (
                    partial.open(mode) as file,
                    tqdm(desc=partial.stem, initial=done, total=total, unit="B", unit_scale=True,
                         disable=None) as bar,
                ):  # fmt: skip
                    for chunk in response.iter_content(CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
        try:
            _check(published, partial, "it was removed")
        except UserError:
            partial.unlink()
            raise
        partial.replace(output_file)

    return download


def _check(published: Published, path: Path, advice: str) -> None:
    """Raises UserError unless a file's hash is, or begins with, the published one."""
    algorithm, _, digest = published.checksum.partition(":")
    try:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): make it readable") from error
    if not actual.startswith(digest):
        raise UserError(f"{path} has the {algorithm} {actual}, not {digest}...: {advice}")
