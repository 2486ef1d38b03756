"""``flax-resnet serve``: a web page to drop images on."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from typing import Annotated

from flax_resnet.cli.flags import Positional, flag
from flax_resnet.cli.weight_flags import PreparedFlags
from flax_resnet.errors import UserError, check_range, import_extra
from flax_resnet.inference.classifier import Classifier
from flax_resnet.serving import LOCAL, launch


@dataclasses.dataclass(frozen=True)
class Settings(PreparedFlags):
    """Opens a web page to drop images on: the most probable classes, and Grad-CAM.

    It listens on this machine only unless --host says otherwise, needs no internet, and sends
    nothing anywhere. Images are prepared as `predict` does. Ctrl-C ends it.

    Examples:
      flax-resnet serve runs/digits
      flax-resnet serve imagenet --model resnet50
      flax-resnet serve net.safetensors --port 8000 --no-browser
    """

    source: Annotated[Positional[str], flag("SOURCE")] = ""
    """A tag such as "imagenet" (with --model), a weight file, or a run's working directory."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets in everyone who reaches this machine."""
    port: int = 7860
    """Port to listen on; 0 takes the first free one from 7860 on."""
    browser: Annotated[bool, flag("")] = True
    """Open the page in the browser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.source:
            raise UserError("expected an argument, SOURCE: a tag, a weight file or a run")
        check_range("--port", self.port, 0, 2**16)


def main(settings: Settings) -> None:
    """``flax-resnet serve``."""
    with warnings.catch_warnings(action="ignore"):  # deprecations of Gradio's dependencies
        import_extra("gradio", "serve")  # before weights are fetched
    opened, host, port = settings.open(settings.source), settings.host, settings.port
    of, title = Classifier(opened), f"{opened.name}: {settings.source}"
    if host not in LOCAL:
        print(
            f"warning: --host {host}: whoever reaches this machine can use the page; there is no "
            "password",
            file=sys.stderr,
        )
    try:
        page, url = launch(of, title, host, port, settings.browser)
    except OSError as error:
        raise UserError(
            f"port {port} of {host} cannot be used: try --port 0, or another --host"
        ) from error
    print(f"{opened.name}: {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()
