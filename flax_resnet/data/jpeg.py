"""JPEG photographs by libjpeg-turbo: no more rows, and no finer, than a crop needs.

Rows below the crop are not decoded, and a crop that shrinks to a third or less is decoded at a
half, a quarter or an eighth: libjpeg-turbo then takes fewer frequencies of each block. simplejpeg
carries libjpeg-turbo in its wheels, as Pillow does, writes into an array at once and frees the GIL.
At full size the pixels are Pillow's, bit for bit.

It is for the common case. Where ``read_header`` or ``decode`` return None (CMYK, arithmetic coding,
a file that breaks off, no JPEG at all), Pillow reads the file, or says why it cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re

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
_APP1 = 0xE1
TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
"""{EXIF orientation: (rows are reversed, columns are reversed, then both change places)}."""
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
      orientation: EXIF's, 1 to 8; 1 is as stored.
    """

    width: int
    height: int
    components: int
    block_rows: int
    height_at: int | None
    orientation: int = 1

    @property
    def displayed_size(self) -> tuple[int, int]:
        """(width, height) once the image is turned as ``orientation`` says."""
        is_turned = TURNS[self.orientation][2]
        return (self.height, self.width) if is_turned else (self.width, self.height)


def read_header(data: bytes, as_displayed: bool = False) -> Header | None:
    """The header of a whole JPEG file of 8 bits a channel, grey or colour; None of another.

    ``as_displayed``: read its EXIF orientation too.
    """
    if not (data.startswith(_START) and data.endswith(_END)):
        return None
    at, frame_at, frame_kind, orientation = len(_START), 0, 0, 1
    while data[at : at + 1] == b"\xff" and at + 4 < len(data):
        kind, stop = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == _SCAN:
            in_order = frame_kind in _SEQUENTIAL and data[at + 4] == data[frame_at + 5]
            return _header(data, frame_at, in_order, orientation) if frame_at else None
        if kind in (*_SEQUENTIAL, _PROGRESSIVE) and not frame_at and stop - at in (13, 19):
            frame_at, frame_kind = at + 4, kind
        elif kind not in _OTHERS:
            return None
        if kind == _APP1 and as_displayed and orientation == 1:
            orientation = _orientation(data[at + 4 : stop])
        at = stop
    return None


def _orientation(segment: bytes) -> int:
    """EXIF's orientation in an application segment, read by Pillow; 1 where there is none."""
    value = 1
    if segment.startswith(b"Exif\0\0"):
        exif = Image.Exif()
        with contextlib.suppress(Exception):  # a damaged one turns nothing
            exif.load(segment)
            value = exif.get(0x0112, 1)
    elif found := re.search(rb'tiff:Orientation(?:="|>)([0-9])', segment):
        value = int(found[1])
    return value if value in TURNS else 1


def _header(data: bytes, at: int, in_order: bool, orientation: int) -> Header | None:
    """Reads a frame's segment, from after its length; ``in_order``: all components interleave."""
    bits, components = data[at], data[at + 5]
    height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (1, 3))
    if bits != 8 or components not in _COLOURS or not 0 < height * width <= _most_pixels():
        return None
    block_rows = 8 * max(each & 15 for each in data[at + 7 : at + 6 + 3 * components : 3])
    height_at = at + 1 if in_order and block_rows else None
    return Header(width, height, components, block_rows, height_at, orientation)


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
      box: the crop, in pixels of the whole image as it is displayed.
      size: height and width that the crop is resized to.

    Returns:
      Pixels, turned as the header says, uint8 (rows, columns, 1 or 3), and the crop in them. None
      where libjpeg-turbo cannot.
    """
    flips_rows, flips_columns, is_turned = TURNS[header.orientation]
    rows, columns = header.height * flips_rows, header.width * flips_columns
    box = _flipped(_turned(box, is_turned), rows, columns)
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
    box = (left / factor, top / factor, right / factor, bottom / factor)
    if header.orientation == 1:
        return pixels, box
    box = _flipped(box, len(pixels) * flips_rows, pixels.shape[1] * flips_columns)
    pixels = pixels[:: -1 if flips_rows else 1, :: -1 if flips_columns else 1]
    return pixels.swapaxes(0, 1) if is_turned else pixels, _turned(box, is_turned)


def _turned(box: Box, is_turned: bool) -> Box:
    """The same box where rows and columns have changed places."""
    left, top, right, bottom = box
    return (top, left, bottom, right) if is_turned else box


def _flipped(box: Box, rows: int, columns: int) -> Box:
    """The same box where so many rows or columns come in reverse; 0 where they do not."""
    left, top, right, bottom = box
    if columns:
        left, right = columns - right, columns - left
    if rows:
        top, bottom = rows - bottom, rows - top
    return left, top, right, bottom


def _shortened(data: bytes, header: Header, rows: int) -> bytearray:
    """The file of an image of fewer rows: those below stay undecoded."""
    assert header.height_at is not None
    shorter = bytearray(data)
    shorter[header.height_at : header.height_at + 2] = rows.to_bytes(2, "big")
    return shorter
