"""Encoded images to uint8 pixels: conversion, crop and resize.

JPEG photographs that are cropped and resized go through ``jpeg`` and ``resample``, all else through
Pillow. They come out within one level of what Pillow gives, except where the crop shrinks to a
third or less: there libjpeg-turbo does part of the shrinking, with a sharper filter, and they
differ by less than a level on average.
"""

from __future__ import annotations

import dataclasses
import io
import math
import struct

import numpy as np
from PIL import Image

from flax_resnet.datasets import jpeg, resample
from flax_resnet.datasets.resample import Box
from flax_resnet.errors import UserError, check_whole, is_number

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

PACKAGES = ("pillow", "simplejpeg", "cykooz-resizer")
"""What decides the pixels of an image besides this library: for records and the keys of caches."""


def open_image(data: bytes, channels: int) -> Image.Image:
    """Decodes one image, the first frame of several, to 1, 3 or 4 channels of 8 bits.

    Raises:
      one of DECODE_ERRORS: it is no image that Pillow reads.
    """
    with Image.open(io.BytesIO(data)) as stored:
        if stored.mode in ("F", "I"):  # their range is anyone's guess, Pillow clips it
            raise ValueError(f"its mode is {stored.mode}, 8 or 16 bits a channel are expected")
        # Pillow would clip 16-bit grey at 255: keep its upper byte instead.
        deep = stored.mode.startswith("I;16")
        image = Image.fromarray((np.asarray(stored) >> 8).astype(np.uint8)) if deep else stored
        return image.convert(PIL_MODES[channels])


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
    """

    channels: int
    size: int | None = None
    crop_ratio: float = 1.0
    random_crop: bool = False
    pad: int = 0

    def __post_init__(self) -> None:
        for name, value in {"size": self.size, "pad": self.pad}.items():
            check_whole(f"decoder.{name}", value, int(name == "size"), LARGEST)
        if self.channels not in PIL_MODES:
            raise UserError(f"decoder.channels={self.channels!r:.40}: expected 1, 3 or 4")
        if not is_number(self.crop_ratio) or not 0 < self.crop_ratio <= 1:
            raise UserError(f"decoder.crop_ratio={self.crop_ratio!r:.40}: expected a share")

    @property
    def side(self) -> int | None:
        """Height and width of the result, padding included; None where the stored size is kept."""
        return None if self.size is None else self.size + 2 * self.pad

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> np.ndarray:
        """Decodes one image, the first frame of several; one of DECODE_ERRORS otherwise."""
        if self.size is None:
            pixels = np.asarray(open_image(data, self.channels))
        else:
            pixels = self._cropped(data, rng, self.size)
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        return np.pad(pixels, ((self.pad,) * 2,) * 2 + ((0, 0),)) if self.pad else pixels

    def _cropped(self, data: bytes, rng: np.random.Generator | None, size: int) -> np.ndarray:
        header, box = jpeg.read_header(data), None
        if header is not None and (header.components, self.channels) in PLAIN:
            box = self._box(rng, header.width, header.height)
            decoded = jpeg.decode(data, header, box, size)
            if decoded is not None:
                pixels = resample.resized(*decoded, size)
                return pixels.repeat(3, axis=2) if self.channels > pixels.shape[2] else pixels
        image = open_image(data, self.channels)
        box = box or self._box(rng, *image.size)
        if (size, size) != image.size or box != (0, 0, *image.size):
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
        return np.asarray(image)

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
