"""Images to classes: the most probable ones of each image, by any weights.

Runs on one device, the first. The first images come out while later ones are still decoded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_resnet.data.decode import DECODE_ERRORS, ahead
from flax_resnet.data.decode import reason as reason
from flax_resnet.data.folders import find_images as find_images
from flax_resnet.data.normalization import normalize
from flax_resnet.data.sources import unreadable
from flax_resnet.errors import check_range
from flax_resnet.inference.classifier import Classifier, not_finite, padded
from flax_resnet.records.files import shown as shown
from flax_resnet.training import metrics
from flax_resnet.weights import Pretrained

OnError = Callable[[Path, Exception], None]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first one first."""

    path: Path
    """The image."""
    classes: tuple[int, ...]
    """Numbers of the classes; of equal ones the lower comes first."""
    names: tuple[str, ...]
    """Their names, or "class 17" where nobody named them."""
    probabilities: tuple[float, ...]
    """Their softmax probabilities."""


def predict_images(
    opened: Pretrained,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    on_error: OnError | None = None,
) -> Iterator[Prediction]:
    """The most probable classes of images, in their order.

    Args:
      opened: a network with its weights, such as ``classify.open_network`` gives.
      paths: image files, and folders of them (see ``find_images``).
      top: how many classes an image; at most all.
      batch_size: images in one step of the device.
      on_error: called with an image that cannot be read and why, and the image is skipped; by
        default the first such image ends it all.

    Raises:
      UserError: a path that is not there, weights that cannot classify, or, from the iterator,
        an image that cannot be read or outputs that are not finite.
    """
    check_range("top", top, 1)
    check_range("batch_size", batch_size, 1)
    files = find_images(paths)
    return _predictions(Classifier.of(opened), files, top, min(batch_size, len(files)), on_error)


def _predictions(
    of: Classifier, files: Sequence[Path], top: int, size: int, on_error: OnError | None
) -> Iterator[Prediction]:
    decoded = _decoded(of, files, 2 * size, on_error)
    batches = iter(lambda: list(itertools.islice(decoded, size)), [])

    def step(batch: Sequence[tuple[Path, np.ndarray]]) -> Any:
        images = padded([image for _, image in batch], size)
        return best_classes(of.module, of.variables, of.stats, images, min(top, of.num_classes))

    for batch, best in metrics.outputs(step, batches):
        # The last batch is padded: zip leaves its padding out.
        for (path, _), classes, p in zip(batch, *best, strict=False):
            if not np.isfinite(p).all():
                raise not_finite(f"the network's outputs for {shown(path)}")
            names = tuple(of.name(index) for index in classes)
            yield Prediction(path, tuple(classes.tolist()), names, tuple(p.tolist()))


@functools.partial(jax.jit, static_argnames=("module", "top"))
def best_classes(
    module: nn.Module, variables: Any, stats: Any, images: jax.Array, top: int
) -> tuple[jax.Array, jax.Array]:
    """Classes and probabilities of the largest logits, (N, top) each."""
    logits: Any = module.apply(variables, normalize(images, stats))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    _, classes = jax.lax.top_k(logits, top)
    return classes, jnp.take_along_axis(jax.nn.softmax(logits), classes, axis=-1)


def _decoded(
    of: Classifier, files: Sequence[Path], most: int, on_error: OnError | None
) -> Iterator[tuple[Path, np.ndarray]]:
    """The images that can be read, up to ``most`` decoded ahead."""
    for path, work in ahead(lambda path: of.preprocessing(path.read_bytes()), files, most):
        try:
            yield path, work.result()
        except DECODE_ERRORS as error:
            if on_error is None:
                raise unreadable(shown(path), error) from error
            on_error(path, error)
