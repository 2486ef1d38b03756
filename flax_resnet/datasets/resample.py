"""A crop of an array at another size: Pillow's bilinear filter, a triangle that antialiases.

cykooz-resizer computes it with SIMD, to within one level of Pillow and with the same bits on every
processor; where it has no wheels (Linux on ARM), Pillow does.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

try:
    import cykooz_resizer as simd
except ImportError:
    simd = None

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, in pixels."""


def reach(length: float, size: int) -> float:
    """How many pixels the filter takes beyond a crop whose ``length`` becomes ``size``."""
    return max(1.0, length / size)


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
    shrunk = image.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    return np.asarray(shrunk).reshape(size, size, pixels.shape[2])
