"""Runs a network that ``flax-resnet export`` wrote; needs jax and flatbuffers alone.

flatbuffers (pip install jax flatbuffers) is what ``jax.export`` reads programs with.

    net = load("DIRECTORY")
    print(net.about["prepare"])  # how a photograph becomes an image
    net(images)                  # uint8 (N, H, W, C), any N, to logits (N, classes)

A network is compiled once for each N. No code is loaded from an export, and nothing is unpickled.
The file is copied into every export and stands alone.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

FORMAT = "flax_resnet export 1"
ARTIFACT, WEIGHTS, ABOUT = "net.stablehlo", "weights.npz", "about.json"


class ExportError(ValueError):
    """A directory that holds no network, or a damaged one; the message is one line."""


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
    directory = Path(directory)
    try:
        about = json.loads((directory / ABOUT).read_text("utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"it is {about['format']!r:.80}: use the load.py there")
        files = [(directory / name).read_bytes() for name in (ARTIFACT, WEIGHTS)]
        if [hashlib.sha256(file).hexdigest() for file in files] != [
            about["sha256"][name] for name in (ARTIFACT, WEIGHTS)
        ]:
            raise ValueError(f"its files are not those that {ABOUT} describes: export it again")
        return Net(about, *files)
    except Exception as error:  # whatever a reader of bytes may raise; no flatbuffers, too
        lines = str(error).splitlines() or [""]
        raise ExportError(
            f"{directory} is no exported network that jax {jax.__version__} reads "
            f"({type(error).__name__}: {lines[0]:.200})"
        ) from error
