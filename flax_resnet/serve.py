"""A web page on this machine: drop an image, see its classes, Grad-CAM and how long it took."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from flax_resnet import flags
from flax_resnet.classify import Classifier, PreparedFlags, flag
from flax_resnet.errors import UserError, check_range
from flax_resnet.inspection import Inspected, open_run
from flax_resnet.inspection.samples import eval_images
from flax_resnet.pretrained import Pretrained
from flax_resnet.serving import page
from flax_resnet.serving.answers import Answers, Limits

LOCAL = ("127.0.0.1", "localhost", "[::1]")
UNPROXIED = ("127.0.0.1", "localhost", "::1")
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26
PORTS = 100


@dataclasses.dataclass(frozen=True)
class Settings(PreparedFlags):
    """What the command line asks for."""

    source: Annotated[tyro.conf.Positional[str], flag("SOURCE")] = ""
    """A tag such as "imagenet" (with --model), a weight file, or a run's working directory."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets in everyone who reaches this machine."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    max_mb: float = 10.0
    """Largest file, in MB of 2**20 bytes."""
    max_pixels: int = 50_000_000
    """Largest image, width times height."""
    examples: int = 6
    """Images of a run's evaluation split to click on, where its data are there; 0: none."""
    browser: Annotated[bool, flag("")] = True
    """Open the page in the browser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise UserError("expected an argument, SOURCE: a tag, a weight file or a run")
        check_range("--port", self.port, 0, 2**16)
        check_range("--max-mb", self.max_mb, 1e-6, 1e4)
        check_range("--max-pixels", self.max_pixels, 1, MOST_PIXELS + 1)
        check_range("--examples", self.examples, 0, 101)


ABOUT = """Opens a web page to drop images on: the most probable classes, Grad-CAM, and timing.

It listens on this machine only unless --host says otherwise, needs no internet, and sends
nothing anywhere. Images are prepared as `predict` does. Ctrl-C ends it; uploaded files are deleted
after ten minutes, and all of them at the end.

Examples:
  flax-resnet serve runs/digits
  flax-resnet serve imagenet --model resnet50
  flax-resnet serve net.safetensors --port 8000 --no-browser"""


def main(argv: Sequence[str] | None = None) -> None:
    """``flax-resnet serve``."""
    settings = flags.cli(Settings, argv, ABOUT, "flax-resnet serve")
    local = is_loopback(settings.host)
    port = settings.port or free_port(settings.host)
    check_port(settings.host, port)
    with contextlib.suppress(KeyboardInterrupt), surroundings() as directory:
        page.gradio()  # whether it is there is said before weights are fetched
        limits = Limits(settings.max_mb, settings.max_pixels)
        opened = settings.open(settings.source)
        answers = Answers(Classifier.of(opened), limits)
        shown, run = about(opened, settings.source)
        examples = example_images(run, settings.examples, directory / "examples") if run else []
        built = page.build(answers, shown, examples)
        with launched(built, settings.host, port, limits, inbrowser=settings.browser) as url:
            if not local:
                print(
                    f"warning: --host {settings.host}: whoever reaches this machine can use the "
                    "page; there is no password",
                    file=sys.stderr,
                )
            print(f"{shown.title}: {url} (Ctrl-C ends it)", flush=True)
            _wait()
    print("stopped")


def about(opened: Pretrained, source: str) -> tuple[page.About, Inspected | None]:
    """The head of the page; and the run, where ``source`` is one's working directory."""
    facts = [f"weights: {source}", *page.device_facts(opened.module)]
    workdir = Path(source).expanduser()
    if not (workdir / "config.json").is_file():
        return page.About(opened.name, tuple(facts)), None
    run = open_run(workdir)
    facts.insert(1, f"step {run.step:,}")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it is not finished
        result = json.loads((workdir / "result.json").read_text())
        share, count = result["best_top1"], result["num_eval"]
        facts.insert(2, f"top-1 {100 * share:.2f} % of {count:,} evaluation images")
    return page.About(run.title, tuple(facts)), run


def example_images(run: Inspected, count: int, place: Path) -> list[Path]:
    """Evaluation images as PNG, where the data are there and of one size: these are exact."""
    decoder = run.config.data.decoder(run.image_shape[2])
    if not count or decoder.size is not None or run.image_shape[2] not in (1, 3):
        return []
    try:
        rows = np.linspace(0, run.data.num_eval - 1, min(count, run.data.num_eval))
        images, labels = eval_images(run, rows.round().astype(int).tolist())
    except UserError as error:
        print(f"no examples: {error}", file=sys.stderr)
        return []
    place.mkdir()
    paths = []
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True), 1):
        pad = decoder.pad
        inner = pixels[pad : len(pixels) - pad, pad : pixels.shape[1] - pad]
        paths.append(place / f"{number}_{_plain(run.class_name(label))}.png")
        Image.fromarray(inner.squeeze(2) if inner.shape[2] == 1 else inner).save(paths[-1])
    return paths


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)[:40]


@contextlib.contextmanager
def launched(
    built: Any, host: str, port: int, limits: Limits, *, inbrowser: bool = False
) -> Iterator[str]:
    """A page that is served while the block runs; yields its address.

    Args:
      built: of ``serving.page.build``.
      host: address to listen on. On a loopback one only requests that name it are answered, so
        that a web site cannot reach the page under a name of its own.
      port: to listen on.
      limits: of an upload.
      inbrowser: open it there.

    Raises:
      UserError: the port cannot be used.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    hosts = [*LOCAL, host] if is_loopback(host) else ["*"]
    gr = page.gradio()
    try:
        _, url, _ = built.launch(
            inline=False,
            inbrowser=inbrowser,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            footer_links=[],
            run_history=False,
            allowed_paths=[],
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
            state_session_capacity=page.SESSIONS,
            max_file_size=limits.bytes,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            num_workers=0,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=page.CSS,
        )
    except OSError as error:
        raise UserError(f"port {port} of {host} cannot be used ({error}): try another") from error
    try:
        yield url.rstrip("/")
    finally:
        built.close(verbose=False)


def is_loopback(host: str) -> bool:
    """True where only this machine reaches an address.

    Raises:
      UserError: it is none of this machine's names or addresses.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host} is not known here ({error}): give an address of this machine, such as "
            "127.0.0.1 or 0.0.0.0"
        ) from error
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def check_port(host: str, port: int) -> None:
    """Raises UserError where a port cannot be listened on, with one to try where that helps."""
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            free_port(host)  # says what is wrong with the host
        free = _next_free(host, max(port + 1, 1024)) or free_port(host)
        raise UserError(
            f"port {port} of {host} cannot be used ({error.strerror}): try --port {free}"
        ) from error


def _next_free(host: str, start: int) -> int | None:
    for port in range(start, min(start + PORTS, 2**16)):
        with contextlib.suppress(OSError):
            return _bind(host, port)
    return None


def free_port(host: str) -> int:
    """A port that nobody listens on.

    Raises:
      UserError: the host is no address of this machine.
    """
    try:
        return _bind(host, 0)
    except OSError as error:
        raise UserError(
            f"--host {host} cannot be listened on ({error.strerror}): give an address of this "
            "machine"
        ) from error


def _bind(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        return listening.getsockname()[1]


@contextlib.contextmanager
def surroundings() -> Iterator[Path]:
    """A directory for Gradio's files, deleted in the end; inside, its settings are set here.

    Nothing that the environment says to Gradio counts, and nothing is reported to anyone.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="flax_resnet_serve_") as directory:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]
        os.environ |= {
            "GRADIO_TEMP_DIR": directory,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        # Gradio asks its own server whether it is there: a proxy could not say.
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join([*filter(None, [os.environ.get(name)]), *UNPROXIED])
        try:
            yield Path(directory)
        finally:
            os.environ.clear()
            os.environ |= before


def _wait() -> None:
    """Until Ctrl-C, or until the process is asked to end.

    What a shell starts in the background ignores SIGINT until it says otherwise.
    """
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while not ended.wait(3600):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
