"""Runs a network that ``flax-resnet export`` wrote; needs jax and flatbuffers alone.

flatbuffers (pip install jax flatbuffers) is what ``jax.export`` reads programs with.

    net = load("DIRECTORY")
    net(images)                      # uint8 (N, H, W, C), any N, to logits (N, classes)
    net.prepare(data)                # an encoded photograph to one such image; needs Pillow
    net.predict("PHOTO.jpg", top=5)  # [(name, probability), ...]

As a command, in the directory or beside it: ``python DIRECTORY/load.py PHOTO.jpg``.

A network is compiled once for each N. No code is loaded from an export, and nothing is unpickled.
The file is copied into every export and stands alone: ``Net.prepare`` says again what
flax_resnet.preprocess and flax_resnet.datasets.decode do, and a test holds them equal.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT = "flax_resnet export 1"
ARTIFACT, WEIGHTS, ABOUT = "net.stablehlo", "weights.npz", "about.json"
HASHED = (ARTIFACT, WEIGHTS)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ExportError(ValueError):
    """A directory that holds no network, or a damaged one; the message is one line."""


class Net:
    """A network on the default device, and what its images go through before.

    Attributes:
      about: what ``about.json`` says: input, classes, preprocessing, versions, and the largest
        difference to the source that was measured.
    """

    def __init__(
        self, about: Mapping[str, Any], exported: jax.export.Exported, weights: Mapping[str, Any]
    ):
        self.about = about
        self.shape: tuple[int, ...] = tuple(about["input"]["shape"][1:])
        self._prepared = about["preprocessing"]
        self._weights = jax.device_put(dict(weights))
        self._call = jax.jit(exported.call)

    def __call__(self, images: Any) -> np.ndarray:
        """Maps uint8 images (N, H, W, C), not normalised, to float32 logits (N, classes).

        Raises:
          ValueError: images of another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            raise ValueError(
                f"images are {images.dtype} {images.shape}: expected uint8 (N, "
                f"{', '.join(map(str, self.shape))}), as prepare gives them"
            )
        return np.asarray(self._call(self._weights, images))

    def name(self, index: int) -> str:
        """What to call a class."""
        names = self.about["class_names"] or ()
        return names[index] if index < len(names) else f"class {index}"

    def predict(self, path: str | Path, top: int = 5) -> list[tuple[str, float]]:
        """The most probable classes of a photograph, the first one first, as (name, probability).

        Raises:
          an exception of Pillow's: the file is no image that it reads.
        """
        logits = self(self.prepare(Path(path).read_bytes())[None])[0].astype(np.float64)
        odds = np.exp(logits - logits.max())
        best = np.argsort(-odds, kind="stable")[:top]
        return [(self.name(int(i)), float(odds[i] / odds.sum())) for i in best]

    def prepare(self, data: bytes) -> np.ndarray:
        """Decodes a photograph to uint8 (H, W, C), resized and cropped, as the network wants it.

        The same pixels as in flax_resnet, but for JPEG files where the network was trained here on
        images that were cropped: there they are within a level or two, by another decoder.

        Raises:
          ImportError: Pillow is not there.
          an exception of Pillow's: it is no image that it reads.
        """
        decoder, how = self._prepared["decoder"], self._prepared
        if decoder is not None:
            return _decoded(data, decoder)
        image = _opened(data, how["channels"])
        size, short, (width, height) = how["size"], how["resize"], image.size
        new = (size, size)
        if short is not None:
            least = min(width, height)
            new = (int(short * width / least), int(short * height / least))
        most = _pillow().MAX_IMAGE_PIXELS
        if most is not None and math.prod(new) > most:
            raise ValueError(f"at {width}x{height} it is too long and thin to resize")
        if new != image.size:
            image = image.resize(new, _pillow().Resampling[how["interpolation"].upper()])
        left, top = (round((side - size) / 2.0) for side in image.size)
        return _pixels(image.crop((left, top, left + size, top + size)))


def load(directory: str | Path) -> Net:
    """Loads what ``flax-resnet export SOURCE DIRECTORY`` wrote.

    Raises:
      ExportError: it is no such directory, it is damaged, or this jax cannot read it.
    """
    directory = Path(directory)
    try:
        text = (directory / ABOUT).read_text("utf-8")
        files = {name: (directory / name).read_bytes() for name in HASHED}
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"{directory} is no exported network ({error}): expected {ABOUT}, "
            f"{ARTIFACT} and {WEIGHTS}"
        ) from error
    try:
        about = json.loads(text)
        known, hashes = about["format"] == FORMAT, dict(about["sha256"] or ())
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(f"{directory / ABOUT} is damaged ({error!r}): export it again") from error
    if not known:
        raise ExportError(
            f"{directory / ABOUT} says {about['format']!r:.80}, expected {FORMAT!r}: use the "
            "load.py beside it"
        )
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != hashes.get(name):
            raise ExportError(f"{directory / name} is not what {ABOUT} describes: export it again")
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "jax reads programs with flatbuffers, which is not here: pip install flatbuffers"
        ) from error
    try:
        with np.load(io.BytesIO(files[WEIGHTS]), allow_pickle=False) as weights:
            return Net(about, jax.export.deserialize(bytearray(files[ARTIFACT])), weights)
    except Exception as error:  # whatever a reader of bytes may raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise ExportError(
            f"{directory} cannot be read by jax {jax.__version__} ({lines[0]:.200}): take a jax "
            "nearer to the one that about.json names, or export it again"
        ) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("photographs are decoded by Pillow: pip install pillow") from error
    return Image


def _opened(data: bytes, channels: int) -> Any:
    """The first frame, in 1, 3 or 4 channels of 8 bits; of 16-bit grey the upper ones."""
    pillow = _pillow()
    with pillow.open(io.BytesIO(data)) as stored:
        if stored.mode in ("F", "I"):
            raise ValueError(f"its mode is {stored.mode}, 8 or 16 bits a channel are expected")
        deep = stored.mode.startswith("I;16")
        image = pillow.fromarray((np.asarray(stored) >> 8).astype(np.uint8)) if deep else stored
        return image.convert(_MODES[channels])


def _decoded(data: bytes, how: Mapping[str, Any]) -> np.ndarray:
    """As the images that a network was trained on here: a square from the centre, then a rim."""
    image, size, pad = _opened(data, how["channels"]), how["size"], how["pad"]
    width, height = image.size
    side = how["crop_ratio"] * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    if (size, size) != image.size or box != (0, 0, *image.size):
        bilinear = _pillow().Resampling.BILINEAR
        image = image.resize((size, size), bilinear, box=box, reducing_gap=3.0)
    return np.pad(_pixels(image), ((pad, pad), (pad, pad), (0, 0)))


def _pixels(image: Any) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the most probable classes of photographs; returns the exit status."""
    parser = argparse.ArgumentParser(description="Names what is in photographs.")
    parser.add_argument("photos", nargs="+", metavar="PHOTO")
    parser.add_argument("--top", type=int, default=5, help="classes a photograph; default: 5")
    given = parser.parse_args(argv)
    try:
        net = load(Path(__file__).resolve().parent)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = 0
    for photo in given.photos:
        try:
            found = net.predict(photo, given.top)
        except Exception as error:  # Pillow has many
            print(f"skipped {photo}: {error}", file=sys.stderr)
            failed += 1
            continue
        print(photo, *(f"  {p:.4f}  {name}" for name, p in found), sep="\n")
    return 2 if failed == len(given.photos) else 0


if __name__ == "__main__":
    sys.exit(main())
