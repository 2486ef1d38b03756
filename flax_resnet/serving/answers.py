"""What the demo page computes: classes and evidence for one uploaded image, within limits."""

from __future__ import annotations

import dataclasses
import io
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image, UnidentifiedImageError

from flax_resnet.augment import normalize
from flax_resnet.classify import Classifier
from flax_resnet.datasets.decode import DECODE_ERRORS
from flax_resnet.errors import UserError
from flax_resnet.inspection.layers import grad_cam, heat
from flax_resnet.predict import best_classes, reason

# Each is known by its first bytes. Others that Pillow reads can start a program (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MEGABYTE = 2**20
# Pictures on the page are at least so many pixels wide: small ones would be blurred.
SHOWN = 256
ORIENTATION = 0x0112  # the EXIF tag


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an image may cost."""

    megabytes: float = 10.0
    """Of the file, in MB of 2**20 bytes."""
    pixels: int = 50_000_000
    """Width times height, read before anything is decoded."""

    @property
    def bytes(self) -> int:
        """The largest file."""
        return int(self.megabytes * MEGABYTE)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a network says of one image."""

    pixels: np.ndarray
    """The image as the network sees it, before normalisation: uint8 (H, W, C)."""
    classes: tuple[int, ...]
    """Numbers of the most probable classes, the first one first."""
    names: tuple[str, ...]
    """Their names, each only once: of equal ones the number is added."""
    probabilities: tuple[float, ...]
    """Their softmax probabilities."""
    decode_ms: float
    """Decoding and resizing, milliseconds."""
    network_ms: float
    """Normalisation, network and softmax, until the result is there, milliseconds."""
    note: str
    """What to know about the file, or nothing."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Where the evidence for a class lies."""

    overlay: np.ndarray
    """The image, enlarged where it is small, under the heat map: uint8 (h, w, 3)."""
    ms: float
    """Grad-CAM and its drawing, milliseconds."""


class Answers:
    """A network that answers for images one at a time; compiled when it is made.

    Args:
      of: the network.
      limits: of an image.
      top: how many classes; at most all.

    Raises:
      UserError: the network's outputs are not finite.
    """

    def __init__(self, of: Classifier, limits: Limits, top: int = 5):
        self.of, self.limits, self.top = of, limits, min(top, of.num_classes)
        self.no_evidence: str | None = None
        """Why there is no Grad-CAM, where there is none."""
        grey = np.full(of.preprocessing.shape, 128, np.uint8)
        first = self._answer(grey, 0.0, "")
        try:
            self.evidence(grey, first.classes[0])
        except UserError as error:
            self.no_evidence = str(error)

    def read(self, path: str | Path) -> Answer:
        """Of a file.

        Raises:
          UserError: it is too large, or no image that can be read.
        """
        path = Path(path)
        try:
            self._check_bytes(path.stat().st_size)
            data = path.read_bytes()
        except OSError as error:
            raise UserError("the uploaded file has gone: drop the image again") from error
        return self(data)

    def __call__(self, data: bytes) -> Answer:
        """Of an encoded image, the first frame of several.

        Raises:
          UserError: it is too large, or no image that can be read.
        """
        self._check_bytes(len(data))
        begun = time.perf_counter()
        try:
            note = self._check_header(data)
            pixels = self.of.preprocessing(data)
        except UserError:
            raise
        except (*DECODE_ERRORS, MemoryError) as error:
            unknown = isinstance(error, UnidentifiedImageError)
            why = f"it is none of {', '.join(FORMATS)}" if unknown else reason(error)
            raise UserError(f"this image cannot be read: {why}") from error
        return self._answer(pixels, _since(begun), note)

    def evidence(self, pixels: np.ndarray, index: int) -> Evidence:
        """Grad-CAM for one class.

        Args:
          pixels: as an Answer has them.
          index: the class.

        Raises:
          UserError: the network has no map.
        """
        begun, of = time.perf_counter(), self.of
        images = normalize(jnp.asarray(pixels[None]), of.stats)
        maps, _, _ = grad_cam(of.module, of.variables, images, [index])
        under = enlarged(pixels_rgb(pixels))
        (shares,) = heat(maps, *under.shape[:2])
        colours = matplotlib.colormaps["jet"](shares, bytes=True)[..., :3]
        overlay = (under.astype(np.uint16) + colours) // 2
        return Evidence(overlay.astype(np.uint8), _since(begun))

    def _check_bytes(self, size: int) -> None:
        if size > self.limits.bytes:
            raise UserError(
                f"this file has {size / MEGABYTE:.1f} MB: at most "
                f"{self.limits.megabytes:g} MB are allowed"
            )

    def _check_header(self, data: bytes) -> str:
        """Raises UserError or one of DECODE_ERRORS; a note on the file, or nothing."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is below
            stored = Image.open(io.BytesIO(data), formats=FORMATS)
        with stored:
            width, height = stored.size
            if width * height > self.limits.pixels:
                raise UserError(
                    f"this image has {width} x {height} pixels: at most "
                    f"{self.limits.pixels / 1e6:g} million are allowed"
                )
            notes = []
            if stored.format != "MPO" and getattr(stored, "is_animated", False):
                notes.append("Only the first of its frames is used.")
            # Neither training nor `predict` turns images. Of a PNG this would decode it all.
            if stored.format in ("JPEG", "MPO") and stored.getexif().get(ORIENTATION, 1) != 1:
                notes.append("The file asks to be shown turned (EXIF); the network sees it as is.")
            return " ".join(notes)

    def _answer(self, pixels: np.ndarray, decode_ms: float, note: str) -> Answer:
        begun, of = time.perf_counter(), self.of
        best = best_classes(of.module, of.variables, of.stats, pixels[None], self.top)
        (classes,), (p,) = jax.device_get(best)
        network_ms = _since(begun)
        if not np.isfinite(p).all():
            raise UserError(
                "the network's output is not finite: the weights are damaged, or --mean and "
                "--std are not theirs"
            )
        names = [of.name(index) for index in classes]
        distinct = [
            f"{name} ({index})" if names.count(name) > 1 else name
            for index, name in zip(classes, names, strict=True)
        ]
        return Answer(
            pixels, tuple(classes.tolist()), tuple(distinct), tuple(p.tolist()),
            decode_ms, network_ms, note,
        )  # fmt: skip


def pixels_rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 1, 3 or 4) as (H, W, 3); alpha is left out, as it is no colour."""
    return pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Small images, each pixel repeated until the sides are 256 or more."""
    times = max(1, -(-SHOWN // min(pixels.shape[:2])))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _since(begun: float) -> float:
    return 1000 * (time.perf_counter() - begun)
