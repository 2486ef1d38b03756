"""What an export is compared with: a network in float32, and its logits on photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_resnet.augment import normalize
from flax_resnet.classify import Classifier
from flax_resnet.datasets.decode import DECODE_ERRORS, PIL_MODES
from flax_resnet.datasets.sources import unreadable
from flax_resnet.predict import find_images, shown
from flax_resnet.preprocess import Preprocessing
from flax_resnet.pretrained import Pretrained

Run = Callable[[np.ndarray], Any]
"""Maps uint8 images (N, H, W, C) to logits (N, classes)."""


def in_float32(opened: Pretrained) -> Pretrained:
    """A network that computes, and has its weights, in float32."""
    fields: dict[str, Any] = {"dtype": "float32", "param_dtype": "float32", "remat": False}
    known = {name: value for name, value in fields.items() if hasattr(opened.module, name)}
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), opened.variables)
    return dataclasses.replace(opened, module=opened.module.clone(**known), variables=variables)


def runner(network: Classifier) -> Run:
    """The network as ``predict`` computes it."""

    @jax.jit
    def run(variables: Any, stats: Any, images: jax.Array) -> Any:
        return network.module.apply(variables, normalize(images, stats))

    return lambda images: run(network.variables, network.stats, images)


def prepared_images(prepared: Preprocessing, photographs: Sequence[str | Path]) -> np.ndarray:
    """Photographs, each as it is, mirrored two ways, turned, and inverted: uint8 (5 N, H, W, C).

    Args:
      prepared: makes an image of a file's bytes.
      photographs: image files or folders; if empty, scikit-learn's two.

    Raises:
      UserError: a photograph cannot be read.
    """
    if not photographs:
        from sklearn.datasets import load_sample_images

        photographs = load_sample_images().filenames
    images = []
    for path in find_images(photographs):
        try:
            image = prepared(path.read_bytes())
        except DECODE_ERRORS as error:
            raise unreadable(shown(path), error) from error
        images += [image, image[::-1], image[:, ::-1], image[::-1, ::-1], 255 - image]
    return np.stack(images)


def difference(run: Run, images: np.ndarray, logits: np.ndarray) -> float:
    """max |run(images) - logits| / max |logits|, of one image and of all in one batch."""
    gaps = [np.max(np.abs(run(images[:n]) - logits[:n])) for n in (1, len(images))]
    # A NaN stays one: it is no small difference.
    return float(np.max(gaps) / np.maximum(np.max(np.abs(logits)), np.finfo(np.float32).tiny))


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
