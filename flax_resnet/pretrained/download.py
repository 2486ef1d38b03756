"""Files over HTTP: where they are, resumed when broken off, tried again, and why they are not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

from flax_resnet.pretrained.published import HUB, Checksum, Published

if TYPE_CHECKING:
    import requests

TIMEOUT = (10, 30)
"""Seconds to connect, and of silence."""
PAUSES = (1.0, 2.0, 4.0)
"""Seconds before each further attempt; after new bytes have come they begin again."""
CHUNK = 1 << 14
"""Bytes, the most that a broken connection takes with it."""
MAX_REDIRECTS = 5
HTTP_REASONS = {
    401: "access is refused; a private file on the hub needs HF_TOKEN",
    403: "access is refused; a gated file on the hub needs HF_TOKEN",
    404: "there is no such file",
    410: "the file was removed",
    429: "too many requests",
}
PASSING = {408, 429, 500, 502, 503, 504}
HTTP_PARTIAL, HTTP_BAD_RANGE = 206, 416

Result = TypeVar("Result")


class Unavailable(Exception):
    """A host does not give the file: for good, as it is out of reach, or as it broke off."""

    def __init__(self, reason: str, kind: Literal["final", "unreachable", "dropped"] = "final"):
        super().__init__(reason)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the bytes are, and what they must be."""

    url: str
    checksum: Checksum
    size: int | None = None


def check_online() -> None:
    """Raises Unavailable where a variable says to stay off the network."""
    for variable in ("FLAX_RESNET_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise Unavailable(f"{variable} is set")


def persist(attempt: Callable[[], Result], file: BinaryIO) -> Result:
    """What ``attempt`` at ``file`` gives, made again after a pause when a host breaks off."""
    pauses, start = iter(PAUSES), size_of(file)
    furthest = start
    while True:
        try:
            return attempt()
        except Unavailable as error:
            if (now := size_of(file)) > furthest:
                pauses, furthest = iter(PAUSES), now
            pause = next(pauses, None)
            # Whoever has no network at all is told so at once.
            lost = error.kind == "dropped" or (error.kind == "unreachable" and furthest > start)
            if pause is None or not lost:
                raise
            time.sleep(pause)


def locate(session: requests.Session, published: Published) -> Source:
    """Asks the hub for a file's sha256 and commit; other files' checksums are known."""
    url = address(published)
    if published.checksum is not None:
        return Source(url, published.checksum)
    for _ in range(MAX_REDIRECTS):
        with _translated():
            response = session.head(
                url, allow_redirects=False, timeout=TIMEOUT, auth=_authorisation(url)
            )
        _check_status(response)
        headers = response.headers
        digest = headers.get("X-Linked-ETag", "").strip('W/"').lower()
        if re.fullmatch("[0-9a-f]{64}", digest):
            commit, size = headers.get("X-Repo-Commit", ""), headers.get("X-Linked-Size", "")
            if re.fullmatch("[0-9a-f]{40}", commit):
                url = url.replace("/resolve/main/", f"/resolve/{commit}/")
            checksum = Checksum("sha256", digest)
            return Source(url, checksum, int(size) if size.isdecimal() else None)
        location = headers.get("Location", "")
        url = urllib.parse.urljoin(url, location)
        # A renamed repository is followed; what goes to another host comes with the digest.
        if not location or not url.startswith(f"{endpoint()}/"):
            break
    raise Unavailable("the hub does not say its sha256")


def transfer(
    session: requests.Session,
    source: Source,
    file: BinaryIO,
    validator: Path,
    show: Callable[[int, int | None], Any],
) -> None:
    """One request for what is missing; ``validator`` keeps which version of the file it is."""
    done = size_of(file)
    version = validator.read_text() if done and validator.is_file() else ""
    headers = {"Accept-Encoding": "identity"}
    if version:
        headers |= {"Range": f"bytes={done}-", "If-Range": version}
    with (
        _translated(),
        session.get(
            source.url,
            headers=headers,
            stream=True,
            timeout=TIMEOUT,
            auth=_authorisation(source.url),
        ) as response,
    ):
        answered = response.headers.get("Content-Range", "")
        if response.status_code == HTTP_BAD_RANGE and version:
            if answered == f"bytes */{done}":
                return
            file.truncate(0)
            raise Unavailable("there is less of the file than before", "dropped")
        _check_status(response)
        partial = response.status_code == HTTP_PARTIAL
        matches = answered.startswith(f"bytes {done}-") and _version(response) == version
        if not (partial and matches):
            file.truncate(0)
            done = 0
            if partial:
                raise Unavailable("it answers with another part of the file", "dropped")
        validator.write_text(_version(response))
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else source.size
        if "Content-Encoding" in response.headers:
            total = None
        for chunk in response.iter_content(CHUNK):
            file.write(chunk)
            show(size_of(file), total)
    if total not in (None, size_of(file)):
        raise Unavailable(f"{size_of(file)} of {total} bytes came", "dropped")


def _version(response: requests.Response) -> str:
    """What If-Range takes: a strong ETag, or else a date; empty where there is none."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified", "")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turns what requests raises into Unavailable."""
    from requests import exceptions
    from urllib3.exceptions import NewConnectionError, ProtocolError

    dropped = (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError)
    unconnected = (exceptions.ConnectTimeout, exceptions.ProxyError, exceptions.SSLError)
    try:
        yield
    except exceptions.RequestException as error:
        inner = error.args[0] if error.args else error
        cause = getattr(inner, "reason", None) or inner
        kind: Literal["final", "unreachable", "dropped"] = "final"
        if isinstance(error, unconnected) or isinstance(cause, NewConnectionError):
            kind = "unreachable"
        elif isinstance(error, dropped):
            kind = "dropped"
        said = cause.args[0] if isinstance(cause, ProtocolError) and cause.args else cause
        raise Unavailable(str(said), kind) from error


def _check_status(response: requests.Response) -> None:
    code = response.status_code
    if code >= 400:
        what = f"HTTP {code}: {HTTP_REASONS.get(code, response.reason)}"
        raise Unavailable(what, "dropped" if code in PASSING else "final")


def endpoint() -> str:
    """The Hugging Face hub, or what stands for it: $HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def address(published: Published) -> str:
    """The file's URL, at $HF_ENDPOINT where it is the hub's."""
    on_hub = published.url.startswith(f"{HUB}/")
    return endpoint() + published.url.removeprefix(HUB) if on_hub else published.url


def _authorisation(url: str) -> Callable[[Any], Any] | None:
    """Adds $HF_TOKEN to a request to the hub; requests drops it on the way to another host."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token or not url.startswith(f"{endpoint()}/"):
        return None

    def authorise(request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return authorise


def size_of(file: BinaryIO) -> int:
    """Bytes written so far."""
    file.flush()
    return os.fstat(file.fileno()).st_size
