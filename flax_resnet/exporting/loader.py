"""Runs a network that ``flax-resnet export`` wrote; needs jax and flatbuffers alone.

flatbuffers is what ``jax.export`` reads programs with. ``about.json`` says under "requires" which
jax can read the program, for pip. Only ``prepare`` needs Pillow.

    net = load("DIRECTORY")
    images = np.stack([net.prepare("a.jpg"), net.prepare("b.png")])
    logits = net(images)  # uint8 (N, H, W, C), any N, to (N, classes)

A network is compiled once for each N. No code is loaded from an export, and nothing is unpickled.
The file is copied into every export and stands alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT = "flax_resnet export 1"
ARTIFACT, WEIGHTS, ABOUT = "net.stablehlo", "weights.npz", "about.json"


class ExportError(ValueError):
    """A directory whose network cannot be run, and why; the message is one line."""


class Net:
    """A network on the default device.

    Attributes:
      about: contents of ``about.json``: input, classes, preprocessing, versions, and the largest
        difference to the source that was measured.
    """

    def __init__(self, about: Any, program: bytes, weights: bytes):
        self.about = about
        self.shape: tuple[int, ...] = tuple(about["input"]["shape"][1:])
        with np.load(io.BytesIO(weights), allow_pickle=False) as arrays:
            self._weights = jax.device_put(dict(arrays))
        self._call = jax.jit(jax.export.deserialize(bytearray(program)).call)
        # A jax that cannot read the program or has no platform for it says so here, not at a call.
        self._call.lower(self._weights, jax.ShapeDtypeStruct((1, *self.shape), np.uint8))

    def prepare(self, image: str | Path | bytes) -> np.ndarray:
        """An image file, or its bytes, as ``flax-resnet predict`` prepares it: uint8 (H, W, C)."""
        return prepare(image, self.about["preprocessing"])

    def __call__(self, images: Any) -> np.ndarray:
        """Maps uint8 images (N, H, W, C), not normalised, to float32 logits (N, classes).

        Raises:
          ValueError: images of another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            raise ValueError(
                f"images are {images.dtype} {images.shape}: expected uint8 (N, "
                f"{', '.join(map(str, self.shape))})"
            )
        return np.asarray(self._call(self._weights, images))


def load(directory: str | Path) -> Net:
    """Loads what ``flax-resnet export SOURCE DIRECTORY`` wrote.

    Raises:
      ExportError: it is no such directory, it is damaged, or this jax cannot read it.
    """
    directory, about = Path(directory), {}
    try:
        about = {**json.loads((directory / ABOUT).read_text("utf-8"))}
        if about["format"] != FORMAT:
            raise ValueError(f"it is {about['format']!r:.80}: use the load.py there")
        files = [(directory / name).read_bytes() for name in (ARTIFACT, WEIGHTS)]
        if [hashlib.sha256(file).hexdigest() for file in files] != [
            about["sha256"][name] for name in (ARTIFACT, WEIGHTS)
        ]:
            raise ValueError(f"its files are not those that {ABOUT} describes: export it again")
        return Net(about, *files)
    except Exception as error:  # whatever a reader of bytes may raise; no flatbuffers, too
        line, wrote = (str(error).splitlines() or [""])[0], about.get("jax", "?")
        raise ExportError(
            f"{directory}, by jax {wrote}, is no exported network that jax {jax.__version__} reads "
            f"on {jax.default_backend()} ({type(error).__name__}: {line:.200}); of a newer jax: "
            f"pip install 'jax>={wrote}'"
        ) from error


def prepare(image: str | Path | bytes, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """An image file, or its bytes, as the network takes it: uint8 (H, W, C), not normalised.

    Args:
      image: what Pillow reads; what it raises on all else is raised.
      preprocessing: ``about["preprocessing"]``.
    """
    from PIL import Image

    data = image if isinstance(image, bytes) else Path(image).expanduser().read_bytes()
    channels, decoder = preprocessing["channels"], preprocessing["decoder"]
    as_displayed = (decoder or preprocessing).get("as_displayed", False)
    if decoder is not None:
        pixels = _square(data, channels, decoder["size"], decoder["crop_ratio"], as_displayed)
        pixels = np.pad(pixels, ((decoder["pad"],) * 2, (decoder["pad"],) * 2, (0, 0)))
        return pixels.repeat(channels // pixels.shape[2], axis=2)
    size, resize = preprocessing["size"], preprocessing["resize"]
    picture = _decoded(data, channels, as_displayed)
    width, height = picture.size
    short = min(picture.size)
    new = (int(resize * width / short), int(resize * height / short)) if resize else (size,) * 2
    picture = picture.resize(new, Image.Resampling[preprocessing["interpolation"].upper()])
    left, top = (round((side - size) / 2) for side in new)
    return np.atleast_3d(np.asarray(picture.crop((left, top, left + size, top + size))))


def _decoded(data: bytes, channels: int, as_displayed: bool) -> Any:
    """The first picture of a file, of 1, 3 or 4 channels of 8 bits."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as stored:
        picture: Any = stored
        if as_displayed:
            picture = _displayed(stored, channels)
        elif stored.mode in ("F", "I"):
            raise ValueError(f"its mode is {stored.mode}, 8 or 16 bits a channel are expected")
        elif stored.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(stored) >> 8).astype(np.uint8))
        return picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def _displayed(stored: Any, channels: int) -> Any:
    """A picture as viewers show it: turned as EXIF says, on white, greys of 8 bits."""
    from PIL import Image, ImageOps

    clear, kind = stored.info.get("transparency"), stored.tile[0].args if stored.tile else None
    if clear is not None and kind in ("L;2", "L;4"):  # Pillow leaves it as the file has it
        stored.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[kind]
    elif clear is not None and kind == "RGB;16B":
        stored.info["transparency"] = tuple(value >> 8 for value in clear)
    ImageOps.exif_transpose(stored, in_place=True)
    if stored.mode.startswith("I") or stored.mode == "F":
        values = np.asarray(stored)
        tops = (1,) if stored.mode == "F" else (2**8 - 1, 2**12 - 1, 2**16 - 1)
        if not 0 <= values.min() <= values.max() <= tops[-1]:
            raise ValueError(f"its greys are not of 0 to {tops[-1]}: save it in 8 bits")
        scale = 255 / next(top for top in tops if values.max() <= top)
        grey = np.where(values == clear, 255, np.rint(values * scale))
        return Image.fromarray(grey.astype(np.uint8))
    if channels == 4 or not stored.has_transparency_data:
        return stored
    picture = stored.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def _square(data: bytes, channels: int, size: int, ratio: float, as_displayed: bool) -> np.ndarray:
    """The central square of ``ratio`` of the shorter side at (size, size, 1, 3 or 4)."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as file:
        plain = (getattr(file, "layers", 0), channels) in {(1, 1), (1, 3), (3, 3)}
        if not plain or not _is_common_jpeg(data):
            picture = _decoded(data, channels, as_displayed)
            side = ratio * min(picture.size)
            left, top = ((length - side) / 2 for length in picture.size)
            box, bilinear = (left, top, left + side, top + side), Image.Resampling.BILINEAR
            picture = picture.resize((size, size), bilinear, box=box, reducing_gap=3.0)
            return np.atleast_3d(np.asarray(picture))
        turn = file.getexif().get(0x0112, 1) if as_displayed else 1
        side = ratio * min(file.size)
        factor = 1  # a half, a quarter or an eighth of the pixels is enough of many a photograph
        while factor < 8 and side >= 3 * factor * max(size, 4):
            factor *= 2
        starts = [(length - side) / 2 for length in (file.height, file.width)]
        file.draft(None, (file.width // factor, file.height // factor))
        pixels = np.atleast_3d(np.asarray(file))
    for axis, start in enumerate(starts):
        pixels = _resized(pixels, axis, start / factor, (start + side) / factor, size)
    rows, columns = (-1 if turn in flipped else 1 for flipped in ((3, 4, 6, 7), (2, 3, 7, 8)))
    pixels = pixels[::rows, ::columns]
    return pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels


def _is_common_jpeg(data: bytes) -> bool:
    """Whether a file is a whole JPEG, sequential or progressive, by Huffman codes."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1] != 0xDA:
        if data[at + 1] not in (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)):
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")


def _resized(pixels: np.ndarray, axis: int, start: float, stop: float, size: int) -> np.ndarray:
    """Pixels from ``start`` to ``stop`` of an axis at ``size``, by an antialiasing triangle.

    Weights of 16 bits and sums rounded to 8, as cykooz-resizer and Pillow-SIMD compute them.
    """
    end, scale = pixels.shape[axis], (stop - start) / size
    reach = max(1.0, scale)
    first = max(0, math.floor(start - reach))
    pixels = np.take(pixels, range(first, min(end, math.ceil(stop + reach))), axis)
    centre = start - first + (np.arange(size)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs((np.arange(pixels.shape[axis]) - centre) / reach))
    weights /= weights.sum(axis=1, keepdims=True)
    bits = next(n for n in range(22) if round(weights.max() * 2 ** (n + 1)) >= 2**15 or n == 21)
    whole = np.floor(weights * 2**bits + 0.5)
    sums = np.moveaxis(np.tensordot(whole, pixels.astype(np.float64), (1, axis)), 0, axis)
    return np.clip(np.floor(sums / 2**bits + 0.5), 0, 255).astype(np.uint8)
