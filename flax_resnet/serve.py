"""A web page on this machine: drop an image, see its classes and where the evidence lies.

Gradio draws the page and serves it. The library keeps the decoding (as ``predict`` decodes), the
heat map, and an address that only this machine reaches unless ``--host`` says otherwise.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from PIL import Image

from flax_resnet.augment import normalize
from flax_resnet.classify import Classifier, PreparedFlags, flag, not_finite
from flax_resnet.datasets.decode import DECODE_ERRORS
from flax_resnet.errors import UserError, check_range, import_extra
from flax_resnet.inspection.layers import grad_cam, heat
from flax_resnet.predict import best_classes, reason

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read. Pillow starts a program for some others (EPS)."""
LOCAL = ("127.0.0.1", "localhost", "::1")
MIN_SIDE = 256
"""Pictures on the page have at least this many pixels a side."""


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

    source: Annotated[tyro.conf.Positional[str], flag("SOURCE")] = ""
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
    with warnings.catch_warnings(action="ignore"):  # deprecations of its dependencies
        gr = import_extra("gradio", "serve")
    opened = settings.open(settings.source)
    of = Classifier.of(opened)

    def answer(path: str | None) -> Any:
        try:
            return explain(of, path)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    page = gr.Interface(
        answer,
        gr.Image(type="filepath", image_mode=None, label="Image"),  # the file as it is
        [gr.Label(label="Classes"), gr.Image(label="Grad-CAM of the first class", format="png")],
        title=f"{opened.name}: {settings.source}",
        api_name="predict",
        flagging_mode="never",
        analytics_enabled=False,
    )
    if settings.host not in LOCAL:
        print(
            f"warning: --host {settings.host}: whoever reaches this machine can use the page; "
            "there is no password",
            file=sys.stderr,
        )
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *LOCAL]))
    try:
        _, url, _ = page.launch(
            server_name=settings.host,
            server_port=settings.port or None,
            share=False,
            inbrowser=settings.browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,  # the one line of a UserError
            max_file_size="10mb",
            footer_links=[],
            ssr_mode=False,
            theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),  # no download
        )
    except OSError as error:
        raise UserError(
            f"port {settings.port} of {settings.host} cannot be used: try --port 0, or another "
            "--host"
        ) from error
    print(f"{opened.name}: {url.rstrip('/')} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def explain(of: Classifier, path: Path | str | None) -> tuple[dict[str, float], np.ndarray | None]:
    """The five most probable classes of an image file, and Grad-CAM of the first.

    Returns:
      ({name: softmax probability}, the image under the heat map, uint8 (H, W, 3) of at least 256
      pixels a side; None if the network has no map).

    Raises:
      UserError: no image, one that cannot be read, or outputs that are not finite.
    """
    if path is None:
        raise UserError("no image: drop one")
    try:
        Image.open(path, formats=FORMATS).close()
        pixels = of.preprocessing(Path(path).read_bytes())
    except DECODE_ERRORS as error:
        raise UserError(
            f"this image cannot be read ({reason(error)}): expected one of {', '.join(FORMATS)}"
        ) from error
    best = best_classes(of.module, of.variables, of.stats, pixels[None], min(5, of.num_classes))
    (classes,), (shares,) = jax.device_get(best)
    if not np.isfinite(shares).all():
        raise not_finite()
    labels: dict[str, float] = {}
    for index, share in zip(classes.tolist(), shares.tolist(), strict=True):
        name = of.name(index)
        labels[f"{name} ({index})" if name in labels else name] = share
    try:
        images = normalize(jnp.asarray(pixels[None]), of.stats)
        maps, _, _ = grad_cam(of.module, of.variables, images, [classes[0]])
    except UserError:  # the network has no map
        return labels, None
    times = -(-MIN_SIDE // min(pixels.shape[:2]))
    under = pixels[..., :3].repeat(times, axis=0).repeat(times, axis=1)
    (heated,) = heat(maps, *under.shape[:2])
    colours = matplotlib.colormaps["jet"](heated, bytes=True)[..., :3]
    return labels, ((under.astype(np.uint16) + colours) // 2).astype(np.uint8)
