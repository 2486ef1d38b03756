"""What is classified, and what comes out: images, and the classes that are probable."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageFile

from flax_resnet.data.folders import find_images
from flax_resnet.errors import UserError
from flax_resnet.records.files import shown

KINDS = (
    "a path, the bytes of an image file, a PIL image, or an array, uint8 or floats of 0 to 1, "
    "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
)
"""What an image may be given as."""
OnError = Callable[[Path, Exception], None]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first one first."""

    path: Path | None
    """The image's file; None where the image was not given by a path."""
    classes: tuple[int, ...]
    """Numbers of the classes; of equal ones the lower comes first."""
    names: tuple[str, ...]
    """Their names, or "class 17" where nobody named them."""
    probabilities: tuple[float, ...]
    """Their softmax probabilities."""

    @property
    def name(self) -> str:
        """Name of the most probable class."""
        return self.names[0]

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return self.probabilities[0]


def is_path(image: Any) -> bool:
    """Whether an image is given by the path of its file."""
    return isinstance(image, (str, os.PathLike))


def is_one_image(images: Any) -> bool:
    """Whether this is one image, and no folder, batch or collection of images."""
    if is_path(images):
        return not Path(images).expanduser().is_dir()
    if isinstance(images, (bytes, bytearray, memoryview, Image.Image)):
        return True
    return hasattr(images, "__array__") and np.ndim(images) != 4


def every_image(images: Any) -> Iterator[Any]:
    """One image after the other, those of folders too."""
    if is_path(images):
        images = [images]
    if not isinstance(images, Iterable) or isinstance(images, Mapping):
        raise UserError(f"{images!r:.80} is no image: expected {KINDS}")
    for image in images:
        yield from find_images([image]) if is_path(image) else [image]


def encoded(image: Any) -> bytes:
    """The file that holds an image: one way to the network is enough, and it begins with a file.

    An image that PIL has opened and not read yet is the file that it was opened from.
    """
    if is_path(image):
        return Path(image).expanduser().read_bytes()
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_pixels(image))
    elif isinstance(image, ImageFile.ImageFile) and image.tile and image.fp and not image.tell():
        position = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(position)
        with Image.open(io.BytesIO(data)) as stored:
            if (stored.size, stored.mode) == (image.size, image.mode):  # it was not reduced
                return data
    if image.mode == "I":  # its range is anyone's guess
        raise ValueError("its mode is I, 8 or 16 bits a channel are expected")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0, exif=image.getexif())
    return file.getvalue()


def _pixels(image: Any) -> np.ndarray:
    """An array as uint8, (H, W) or (H, W, 3 or 4)."""
    pixels = np.asarray(image)
    said = f"an array of {pixels.dtype} {pixels.shape}"
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    is_float = jnp.issubdtype(pixels.dtype, jnp.floating)
    if is_float and ((pixels >= 0) & (pixels <= 1)).all():
        pixels = np.rint(255 * pixels.astype(np.float32)).astype(np.uint8)
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    if not is_image or pixels.dtype != np.uint8 or not pixels.size:
        raise UserError(f"{said} is no image: expected {KINDS}")
    return pixels


def image_title(image: Any) -> str:
    """What to call an image in a message: its path, or its type."""
    return shown(image) if is_path(image) else f"<{type(image).__name__}>"
