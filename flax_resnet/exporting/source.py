"""What is exported: a network in float32, and its logits on real images to compare with."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flax_resnet import cpu, models
from flax_resnet.augment import normalize
from flax_resnet.classify import Classifier, not_finite
from flax_resnet.datasets.decode import DECODE_ERRORS, PIL_MODES
from flax_resnet.datasets.sources import unreadable
from flax_resnet.predict import find_images, shown
from flax_resnet.preprocess import Preprocessing
from flax_resnet.pretrained import Pretrained
from flax_resnet.record import to_record

Run = Callable[[np.ndarray], np.ndarray]
"""Of uint8 images (N, H, W, C), logits (N, classes)."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far an export is from its source."""

    largest: float
    """max |a - b| / max |a| over the logits, a the source's."""
    images: int
    """How many different images it was measured on."""
    batch_sizes: tuple[int, int]
    """In batches of so many."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A network that is exported; everything is computed on the CPU, in float32."""

    opened: Pretrained
    """The network, of float32."""
    classifier: Classifier
    """The same, checked."""
    images: np.ndarray
    """uint8 (N, H, W, C), as its preprocessing gives them."""
    logits: np.ndarray
    """Its own on them, float32 (N, classes)."""

    @classmethod
    def of(cls, opened: Pretrained, photographs: Sequence[str | Path] = ()) -> Source:
        """Prepares a network, and computes its logits.

        Args:
          opened: the network with its weights.
          photographs: image files or folders; by default the two of scikit-learn, cut up.

        Raises:
          UserError: the weights cannot classify, a photograph cannot be read, or the logits are
            not finite.
        """
        opened = in_float32(opened)
        classifier = Classifier.of(opened)
        images = _prepared(classifier.preprocessing, photographs)
        logits = runner(classifier)(images)
        if not np.isfinite(logits).all():
            raise not_finite()
        return cls(opened, classifier, images, logits)

    @property
    def name(self) -> str:
        """What to call the network."""
        module = self.opened.module
        return self.opened.network or models.name_of(module) or type(module).__name__

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """The input: uint8 images, as many as one likes."""
        sides = ", ".join(map(str, self.images.shape[1:]))
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"b, {sides}"), jnp.uint8)

    def apply(self, variables: Any, images: jax.Array) -> jax.Array:
        """uint8 images to float32 logits in the forms of any backend: for tracing."""
        stats = jax.device_get(self.classifier.stats)
        with cpu.plain_forms():
            logits: Any = self.classifier.module.apply(variables, normalize(images, stats))
        return logits

    @property
    def about(self) -> dict[str, Any]:
        """Description of the network, its classes and its preprocessing, as JSON values."""
        names = self.classifier.class_names
        return {
            "network": self.name,
            "class_names": None if names is None else list(names),
            "preprocessing": to_record(self.classifier.preprocessing),
            "prepare": how_to_prepare(self.classifier.preprocessing),
        }

    def difference(self, run: Run) -> Difference:
        """Measures an export, with one image and with all of them at once."""
        images, logits, count = self.images, self.logits, len(self.images)
        if count == 1:
            images, logits = images.repeat(2, axis=0), logits.repeat(2, axis=0)
        found = [np.asarray(run(images[:n])) for n in (1, len(images))]
        gaps = [np.max(np.abs(y - logits[: len(y)])) for y in found]
        scale = np.maximum(np.max(np.abs(logits)), np.finfo(np.float32).tiny)
        # A NaN stays one: it is no small difference.
        return Difference(float(np.max(gaps) / scale), count, (1, len(images)))


def runner(classifier: Classifier) -> Run:
    """The network as ``predict`` computes it, but for the precision, which is the highest."""
    module = classifier.module

    def run(variables: Any, stats: Any, images: jax.Array) -> Any:
        return module.apply(variables, normalize(images, stats))

    compiled = jax.jit(run)

    def logits(images: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(compiled(classifier.variables, classifier.stats, images))

    return logits


def in_float32(opened: Pretrained) -> Pretrained:
    """A network that computes, and has its weights, in float32."""
    names = ("dtype", "param_dtype")
    kinds: dict[str, Any] = {name: "float32" for name in names if hasattr(opened.module, name)}
    if getattr(opened.module, "remat", False):  # it is for training
        kinds["remat"] = False
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), opened.variables)
    return dataclasses.replace(opened, module=opened.module.clone(**kinds), variables=variables)


def how_to_prepare(prepared: Preprocessing) -> str:
    """The way from a photograph to the network's input, in words; Pillow does all of it."""
    mode, decoder = PIL_MODES[prepared.channels], prepared.decoder
    if decoder is not None:
        crop = f"crop the central square of {decoder.crop_ratio:g} of the shorter side"
        steps = [crop, f"resize to {decoder.size}x{decoder.size}, bilinear"]
        steps += [f"pad {decoder.pad} zeros on every side"] if decoder.pad else []
    elif prepared.resize is None:
        steps = [f"resize to {prepared.size}x{prepared.size}, {prepared.interpolation}"]
    else:
        steps = [
            f"resize the shorter side to {prepared.resize}, {prepared.interpolation}",
            f"crop the central {prepared.size}x{prepared.size}",
        ]
    return "; ".join([f"decode to {mode}", *steps, "pass uint8 (N, H, W, C), not normalised"])


def _prepared(prepared: Preprocessing, photographs: Sequence[str | Path]) -> np.ndarray:
    if not photographs:
        return np.stack([prepared(data) for data in _samples()])
    found = []
    for path in find_images(photographs):
        try:
            found.append(prepared(path.read_bytes()))
        except DECODE_ERRORS as error:
            raise unreadable(shown(path), error) from error
    return np.stack(found)


def _samples() -> list[bytes]:
    """scikit-learn's photographs of a temple and a flower, 640x427: each whole, and in four."""
    from sklearn.datasets import load_sample_images

    found = []
    for pixels in load_sample_images().images:
        rows, columns = (side // 2 for side in pixels.shape[:2])
        parts = [pixels[y : y + rows, x : x + columns] for y in (0, rows) for x in (0, columns)]
        for part in (pixels, *parts):
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(part)).save(file, "PNG", compress_level=1)
            found.append(file.getvalue())
    return found
