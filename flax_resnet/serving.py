"""A web page on this machine: drop an image, see its classes and where the evidence lies.

Gradio draws the page and serves it. Images are decoded as ``predict`` decodes them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

from flax_resnet.data.decode import DECODE_ERRORS, reason
from flax_resnet.data.normalization import normalize
from flax_resnet.errors import UserError
from flax_resnet.inference.classifier import Classifier
from flax_resnet.inspection.layers import grad_cam, heat

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read. Pillow starts a program for some others (EPS)."""
LOCAL = ("127.0.0.1", "localhost", "::1")
MIN_SIDE = 256
"""Pictures on the page have at least this many pixels a side."""


def launch(of: Classifier, title: str, host: str, port: int, browser: bool) -> tuple[Any, str]:
    """Serves the page in threads; returns it, a gradio.Interface, and its address.

    Where the port cannot be used, OSError is raised.
    """
    import gradio as gr

    def answer(path: str | None) -> Any:
        try:
            return explain(of, path)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    page = gr.Interface(
        answer,
        gr.Image(type="filepath", image_mode=None, label="Image"),  # the file as it is
        [gr.Label(label="Classes"), gr.Image(label="Grad-CAM of the first class", format="png")],
        title=title,
        api_name="predict",
        flagging_mode="never",
        analytics_enabled=False,
    )
    for name in ("NO_PROXY", "no_proxy"):  # Gradio asks its own server whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), *LOCAL]))
    _, url, _ = page.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,  # the one line of a UserError
        max_file_size="10mb",
        footer_links=[],
        ssr_mode=False,
        theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),  # no download
    )
    return page, url.rstrip("/")


def explain(of: Classifier, path: Path | str | None) -> tuple[dict[str, float], np.ndarray | None]:
    """({name: probability} of an image file's five most probable classes, Grad-CAM of the first).

    That is the image under the heat map, uint8 (H, W, 3); None if the network has no map.
    """
    if path is None:
        raise UserError("no image: drop one")
    try:
        Image.open(path, formats=FORMATS).close()
        pixels = of.prepare(path)
    except DECODE_ERRORS as error:
        raise UserError(
            f"this image cannot be read ({reason(error)}): expected one of {', '.join(FORMATS)}"
        ) from error
    (best,) = of.predictions([path], top=5)
    labels: dict[str, float] = {}
    for index, name, share in zip(best.classes, best.names, best.probabilities, strict=True):
        labels[f"{name} ({index})" if name in labels else name] = share
    try:
        images = normalize(jnp.asarray(pixels[None]), of.stats)
        maps, _, _ = grad_cam(of.module, of.variables, images, best.classes[:1])
    except UserError:  # the network has no map
        return labels, None
    times = -(-MIN_SIDE // min(pixels.shape[:2]))
    under = pixels[..., :3].repeat(times, axis=0).repeat(times, axis=1)
    (heated,) = heat(maps, *under.shape[:2])
    colours = matplotlib.colormaps["jet"](heated, bytes=True)[..., :3]
    return labels, ((under.astype(np.uint16) + colours) // 2).astype(np.uint8)
