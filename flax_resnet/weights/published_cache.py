"""Files of torchvision and Keras, in the cache or downloaded into it; checked at every use.

pooch downloads them. It neither continues a download that broke off nor compares a part of a hash,
and torchvision publishes no more than the first digits: these two are done here.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.records.files import cache_dir
from flax_resnet.weights.published import Published

NOTHING_LEFT = 416
CHUNK = 1 << 16
"""Bytes written at a time: the most that a download loses when its process is killed."""


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
    if path.is_file():
        _check(published, path, f"delete it, or save {published.url} there")
        return path
    try:
        if (variable := offline()) is not None:
            raise OSError(f"{variable} is set")
        _download(published, path)
    except (ImportError, OSError, ValueError) as error:
        install = "pip install 'flax_resnet[hub]', or " if isinstance(error, ImportError) else ""
        raise UserError(
            f"weights {published.tag!r} of {published.network} are not on this machine and "
            f"{published.url} cannot be downloaded ({error}): {install}get it elsewhere and save "
            f"it as {path}, or give the path of a file"
        ) from error
    return path


def _download(published: Published, path: Path) -> None:
    """Downloads with pooch, on from what is in the file ``*.partial``."""
    import filelock
    import pooch
    from requests import HTTPError

    partial = path.with_name(f"{path.name}.partial")

    def download(url: str, output_file: str, cache: Any) -> None:
        with partial.open("ab") as file:
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={file.tell()}-"}
            get = pooch.HTTPDownloader(sys.stderr.isatty(), CHUNK, headers=headers, timeout=30)
            try:
                get(url, file, cache)
            except HTTPError as error:
                response: Any = error.response
                response.close()
                if response.status_code != NOTHING_LEFT:
                    raise
        try:
            _check(published, partial, "it was removed")
        except UserError:
            partial.unlink()
            raise
        partial.replace(output_file)

    pooch.get_logger().setLevel("WARNING")
    path.parent.mkdir(parents=True, exist_ok=True)
    where = {"registry": {path.name: None}, "urls": {path.name: published.url}}
    with filelock.FileLock(cache_dir() / f"{path.name}.lock"):
        files = pooch.create(path.parent, "", **where, retry_if_failed=2)
        files.fetch(path.name, downloader=download)


def _check(published: Published, path: Path, advice: str) -> None:
    """Raises UserError unless a file's hash is, or begins with, the published one."""
    algorithm, _, digest = published.checksum.partition(":")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, algorithm).hexdigest()
    if not actual.startswith(digest):
        raise UserError(f"{path} has the {algorithm} {actual}, not {digest}...: {advice}")
