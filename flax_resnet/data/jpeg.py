"""JPEG photographs by libjpeg-turbo: no more rows, and no finer, than a crop needs.

Rows below the crop are not decoded, and a crop that shrinks to a third or less is decoded at a
half, a quarter or an eighth: libjpeg-turbo then takes fewer frequencies of each block. simplejpeg
carries libjpeg-turbo in its wheels, as Pillow does, writes into an array at once and frees the GIL.
At full size the pixels are Pillow's, bit for bit.

It is for the common case. Where ``read_header`` or ``decode`` return None (CMYK, arithmetic coding,
a file that breaks off, no JPEG at all), Pillow reads the file, or says why it cannot.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import simplejpeg
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge, in pixels."""
# What is decoded at a fraction has at least so many times the result's pixels on each side: pixels
# then differ from those of a full decode by half a level on average, and by 16 at most.
GAP = 1.5
_START, _END = b"\xff\xd8", b"\xff\xd9"
_SEQUENTIAL, _PROGRESSIVE, _SCAN = (0xC0, 0xC1), 0xC2, 0xDA
# Huffman and quantisation tables, restart interval, application data, comment.
_OTHERS = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
_COLOURS = {1: "GRAY", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of its image.

    Attributes:
      width: in pixels.
      height: in pixels.
      components: 1 (grey) or 3.
      block_rows: rows that are coded together.
      height_at: where the file has its height, or None where the rows do not follow each other.
    """

    width: int
    height: int
    components: int
    block_rows: int
    height_at: int | None


def read_header(data: bytes) -> Header | None:
    """The header of a whole JPEG file of 8 bits a channel, grey or colour; None of another."""
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    at, frame_at, frame_kind = len(_START), 0, 0
    while data[at : at + 1] == b"\xff" and at + 4 < len(data):
        kind, stop = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == _SCAN:
            in_order = frame_kind in _SEQUENTIAL and data[at + 4] == data[frame_at + 5]
            return _header(data, frame_at, in_order) if frame_at else None
        if kind in (*_SEQUENTIAL, _PROGRESSIVE) and not frame_at and stop - at in (13, 19):
            frame_at, frame_kind = at + 4, kind
        elif kind not in _OTHERS:
            return None
        at = stop
    return None


def _header(data: bytes, at: int, in_order: bool) -> Header | None:
    """Reads a frame's segment, from after its length; ``in_order``: all components interleave."""
    bits, components = data[at], data[at + 5]
    height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (1, 3))
    if bits != 8 or components not in _COLOURS or not 0 < height * width <= _most_pixels():
        return None
    block_rows = 8 * max(each & 15 for each in data[at + 7 : at + 6 + 3 * components : 3])
    height_at = at + 1 if in_order and block_rows else None
    return Header(width, height, components, block_rows, height_at)


def _most_pixels() -> float:
    """Above it Pillow warns, or refuses."""
    return Image.MAX_IMAGE_PIXELS or math.inf


def reach(length: float, size: int) -> float:
    """How many pixels the filter takes beyond a crop whose ``length`` becomes ``size``."""
    return max(1.0, length / size)


def decode(data: bytes, header: Header, box: Box, size: int) -> tuple[np.ndarray, Box] | None:
    """Decodes what a crop needs that ``decode.resized`` then brings to ``size``.

    Args:
      data: the file.
      header: what it says.
      box: the crop, in pixels of the whole image.
      size: height and width that the crop is resized to.

    Returns:
      Pixels from the left upper corner, uint8 (rows, columns, 1 or 3), and the crop in them. None
      where libjpeg-turbo cannot.
    """
    left, top, right, bottom = box
    rows = header.height
    if header.height_at is not None:
        # Chroma is interpolated from the blocks below those that the filter takes.
        last = bottom + reach(bottom - top, size)
        blocks = math.ceil(last / header.block_rows) + 1
        rows = min(rows, blocks * header.block_rows)
    factor, side = 1, min(right - left, bottom - top)
    while factor < 8 and side >= 2 * factor * GAP * max(size, 4):
        factor *= 2
    try:
        pixels = simplejpeg.decode_jpeg(
            data if rows == header.height else _shortened(data, header, rows),
            _COLOURS[header.components],
            min_height=-(-rows // factor),
            min_width=-(-header.width // factor),
            min_factor=factor,
            strict=False,  # Pillow overlooks the same faults; a shortened image has one
        )
    except (ValueError, RuntimeError):
        return None
    return pixels, (left / factor, top / factor, right / factor, bottom / factor)


def _shortened(data: bytes, header: Header, rows: int) -> bytearray:
    """The file of an image of fewer rows: those below stay undecoded."""
    assert header.height_at is not None
    shorter = bytearray(data)
    shorter[header.height_at : header.height_at + 2] = rows.to_bytes(2, "big")
    return shorter
