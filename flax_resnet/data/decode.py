"""Encoded images to uint8 pixels: conversion, crop and resize.

JPEG photographs that are cropped and resized go through ``jpeg`` and ``resized``, all else through
Pillow. They come out within one level of what Pillow gives, except where the crop shrinks to a
third or less: there libjpeg-turbo does part of the shrinking, with a sharper filter, and they
differ by less than a level on average.

cykooz-resizer resizes with SIMD and by Pillow's bilinear filter, a triangle that antialiases: to
within one level of Pillow and with the same bits on every processor. Where it has no wheels (Linux
on ARM), Pillow does.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib
import io
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flax_resnet.data import jpeg
from flax_resnet.data.jpeg import Box, reach
from flax_resnet.errors import UserError, check_range, check_types
from flax_resnet.xla.backend import usable_cores

try:
    import cykooz_resizer as simd
except ImportError:
    simd = None

Item = TypeVar("Item")
Result = TypeVar("Result")

# Sides of decoded images stay below this many pixels.
LARGEST = 2**11 + 1
# Channels, stored and wanted, of JPEG files that do without Pillow's conversions.
PLAIN = {(1, 1), (1, 3), (3, 3)}
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What Pillow, and Decoder, raise on files that are no images they can read.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, RuntimeError, TypeError, LookupError, ArithmeticError,
    AttributeError, EOFError, struct.error, Image.DecompressionBombError,
)  # fmt: skip

# Pillow gives the transparent value as the file has it, and the pixels in 8 bits.
TRANSPARENT_VALUES: Mapping[Any, Callable[[Any], Any]] = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: tuple(each >> 8 for each in value),
}

PACKAGES = ("pillow", "simplejpeg", "cykooz-resizer")
"""What decides the pixels of an image besides this library: for records and the keys of caches."""


def reason(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow reads"
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.split()) or type(error).__name__


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[tuple[Item, Future[Result]]]:
    """(item, future of the work on it) in order; threads begin up to ``most`` items before.

    Args:
      work: function of an item, which frees the GIL.
      items: what is worked on.
      most: items whose results wait in memory.
    """
    begun: collections.deque[tuple[Item, Future[Result]]] = collections.deque()
    with ThreadPoolExecutor(usable_cores()) as pool:
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) > most:
                yield begun.popleft()
        while begun:
            yield begun.popleft()


def open_image(data: bytes, channels: int, as_displayed: bool = True) -> Image.Image:
    """Decodes one image, the first frame of several, to 1, 3 or 4 channels of 8 bits.

    Args:
      data: the file.
      channels: of the result.
      as_displayed: turned as EXIF says, transparent pixels on white (but for 4 channels), deep
        greys scaled by ``eight_bits``; False: the stored pixels, of 16-bit greys the upper byte.

    Raises:
      one of DECODE_ERRORS: it is no image that Pillow reads.
    """
    register_plugins()
    with Image.open(io.BytesIO(data)) as stored:
        if as_displayed:
            return _displayed(stored, channels).convert(PIL_MODES[channels])
        if stored.mode in ("F", "I"):  # their range is anyone's guess, Pillow clips it
            raise ValueError(f"its mode is {stored.mode}, 8 or 16 bits a channel are expected")
        # Pillow would clip 16-bit grey at 255: keep its upper byte instead.
        deep = stored.mode.startswith("I;16")
        image = Image.fromarray((np.asarray(stored) >> 8).astype(np.uint8)) if deep else stored
        return image.convert(PIL_MODES[channels])


@functools.cache
def register_plugins() -> None:
    """Lets Pillow read HEIC and JPEG XL where the packages for them are installed."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")


def orientation(image: Image.Image) -> int:
    """EXIF's orientation of an opened image, 1 to 8; 1 is as stored, and damaged EXIF says so."""
    # Pillow turns TIFF files itself; without these it would decode a PNG to look for EXIF.
    if image.format != "TIFF" and {"exif", "xmp"} & image.info.keys():
        with contextlib.suppress(Exception):
            value = image.getexif().get(0x0112, 1)
            return value if value in range(1, 9) else 1
    return 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (H, W, C) as EXIF's ``orientation`` shows them."""
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    pixels = pixels[::rows, ::columns]
    return pixels.swapaxes(0, 1) if orientation > 4 else pixels


def _displayed(stored: Image.Image, channels: int) -> Image.Image:
    """An image as viewers show it: its pixels turned, on white, in 8 bits a channel."""
    tiles: Any = getattr(stored, "tile", None)  # how the file codes its pixels
    kind = tiles[0].args if tiles else None
    if "transparency" in stored.info and (change := TRANSPARENT_VALUES.get(str(kind))):
        stored.info["transparency"] = change(stored.info["transparency"])
    stored.load()  # the EXIF of a PNG may come after its pixels
    if orientation(stored) != 1:
        ImageOps.exif_transpose(stored, in_place=True)
    if stored.mode.startswith("I") or stored.mode == "F":
        values = np.asarray(stored)
        grey = np.where(values == stored.info.get("transparency"), 255, eight_bits(values))
        return Image.fromarray(grey.astype(np.uint8))
    if channels == 4 or not stored.has_transparency_data:
        return stored
    image = stored.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Greys of more than 8 bits (H, W) to uint8: the top of their range becomes 255.

    The range of floating point is 0 to 1; that of whole numbers is the least of 8, 12 and 16 bits
    that holds the image's largest value, so that 12 bits in a 16-bit file are not near black.

    Raises:
      ValueError: a value is outside.
    """
    low, high = values.min(), values.max()
    tops = (1,) if values.dtype.kind == "f" else (2**8 - 1, 2**12 - 1, 2**16 - 1)
    top = next((top for top in tops if high <= top), None)
    if top is None or not low >= 0:
        raise ValueError(
            f"its greys go from {low:g} to {high:g}, expected 0 to {tops[-1]}: save it in 8 bits"
        )
    return np.rint(values * (255 / top)).astype(np.uint8)


def undecodable(items: Iterable[Item], decode: Callable[[Item], Any]) -> dict[Item, str]:
    """{item: why} of those that ``decode`` cannot; all are decoded, on the machine's cores."""
    bad = {}
    for item, work in ahead(decode, items, 64):
        try:
            work.result()
        except DECODE_ERRORS as error:
            bad[item] = reason(error)
    return bad


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Encoded bytes to a uint8 image (H, W, channels).

    Attributes:
      channels: 1 (grey), 3 (RGB) or 4 (RGBA); other images are converted.
      size: height and width of the result, or None to keep the stored size.
      crop_ratio: with ``size``, the centre crop's share of the shorter side (0.875 is
        ImageNet's 224 of 256).
      random_crop: with ``size``, crop an area of 8 to 100 % at an aspect of 3/4 to 4/3
        instead (Szegedy et al. 2015), drawn from the generator passed in.
      pad: pixels of zero to put on every side in the end.
      as_displayed: decode what a viewer shows, see ``open_image``; False in older records.
    """

    channels: int
    size: int | None = None
    crop_ratio: float = 1.0
    random_crop: bool = False
    pad: int = 0
    as_displayed: bool = True

    def __post_init__(self) -> None:
        check_types(self, "decoder.")
        check_range("decoder.size", self.size, 1, LARGEST)
        check_range("decoder.pad", self.pad, 0, LARGEST)
        if self.channels not in PIL_MODES:
            raise UserError(f"decoder.channels={self.channels!r:.40}: expected 1, 3 or 4")
        if not 0 < self.crop_ratio <= 1:
            raise UserError(f"decoder.crop_ratio={self.crop_ratio!r:.40}: expected a share")

    @property
    def side(self) -> int | None:
        """Height and width of the result, padding included; None where the stored size is kept."""
        return None if self.size is None else self.size + 2 * self.pad

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """Decodes one image, the first frame of several; one of DECODE_ERRORS otherwise."""
        if self.size is None:
            pixels = np.asarray(open_image(data, self.channels, self.as_displayed))
        else:
            pixels = self._cropped(data, rng, self.size)
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        return np.pad(pixels, ((self.pad,) * 2,) * 2 + ((0, 0),)) if self.pad else pixels

    def _cropped(self, data: bytes, rng: np.random.Generator | None, size: int) -> np.ndarray:
        header, box = jpeg.read_header(data), None
        if header is not None and (header.components, self.channels) in PLAIN:
            turn = 1
            if self.as_displayed:
                with Image.open(io.BytesIO(data)) as stored:
                    turn = orientation(stored)
            box = self._box(rng, header.width, header.height)
            decoded = jpeg.decode(data, header, box, size)
            if decoded is not None:
                pixels = turned(resized(*decoded, size), turn)
                return pixels.repeat(3, axis=2) if self.channels > pixels.shape[2] else pixels
            box = box if turn == 1 else None  # it is of the image as it is stored
        image = open_image(data, self.channels, self.as_displayed)
        box = box or self._box(rng, *image.size)
        return np.asarray(_shrunk(image, box, size))

    def _box(self, rng: np.random.Generator | None, width: int, height: int) -> Box:
        if self.random_crop and rng is not None:
            return _random_box(rng, width, height)
        return _centre_box(self.crop_ratio, width, height)


def _centre_box(ratio: float, width: int, height: int) -> Box:
    side = ratio * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(rng: np.random.Generator, width: int, height: int) -> Box:
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    return _centre_box(1.0, width, height)


def resized(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    """A crop of uint8 pixels (H, W, 1 or 3) at (size, size)."""
    left, top, right, bottom = box
    columns = _taken(left, right, size, pixels.shape[1])
    rows = _taken(top, bottom, size, pixels.shape[0])
    inner = left - columns.start, top - rows.start, right - columns.start, bottom - rows.start
    part = pixels[rows, columns]
    if part.shape[:2] == (size, size) and inner == (0, 0, size, size):
        return part
    return (_by_simd if simd else _by_pillow)(part, inner, size)


def _taken(start: float, stop: float, size: int, end: int) -> slice:
    """What the filter takes of a side that is ``end`` long."""
    beyond = reach(stop - start, size)
    return slice(max(0, math.floor(start - beyond)), min(end, math.ceil(stop + beyond)))


def _by_simd(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    rows, columns, channels = pixels.shape
    left, top, right, bottom = box
    kind = {1: simd.PixelType.U8, 3: simd.PixelType.U8x3}[channels]
    result = simd.ImageData(size, size, kind)
    simd.Resizer().resize(
        simd.ImageData(columns, rows, kind, pixels.tobytes()),
        result,
        simd.ResizeOptions(
            simd.ResizeAlg.convolution(simd.FilterType.bilinear),
            crop_box=simd.CropBox(left, top, right - left, bottom - top),
        ),
    )
    return np.frombuffer(result.get_buffer(), np.uint8).reshape(size, size, channels)


def _by_pillow(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(_shrunk(image, box, size)).reshape(size, size, pixels.shape[2])


def _shrunk(image: Image.Image, box: Box, size: int) -> Image.Image:
    """A crop at (size, size); Pillow computes nothing where that is the whole image."""
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
