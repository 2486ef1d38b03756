"""Weights measured on a data set or a folder: accuracy, loss and calibration.

The data say where the images are, the weights how they are decoded. Every example counts once.
Runs on one device, the first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_resnet.data.config import DataConfig, open_sources
from flax_resnet.data.folders import TEST_NAMES, same_name
from flax_resnet.data.normalization import normalize
from flax_resnet.data.order import decode_chunks
from flax_resnet.data.sources import Unreadable, undecodable_rows, unreadable
from flax_resnet.data.tta import Views, averaged_logits
from flax_resnet.errors import UserError, check_range
from flax_resnet.inference.classifier import Classifier, not_finite, padded
from flax_resnet.training import metrics
from flax_resnet.weights import Pretrained
from flax_resnet.weights.imagenet import imagenet_classes, imagenet_ids

CROPS = 10


def evaluate(
    opened: Pretrained,
    config: DataConfig,
    *,
    batch_size: int = 64,
    ten_crop: bool = False,
    tta: Views = "none",
    limit: int | None = None,
    holdout: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Measures a network on a split.

    Args:
      opened: a network with its weights, such as ``classify.open_network`` gives.
      config: where the images are: name, data_dir, folder, train_split, eval_split and
        holdout_every. How they are decoded is up to the weights.
      batch_size: images in one step of the device.
      ten_crop: average the probabilities of ten crops an example (Krizhevsky et al. 2012,
        section 4.1).
      tta: average the logits of these views an example, as in training.
      limit: evaluate so many examples, evenly spread.
      holdout: of a folder without split sub-folders, evaluate what training holds out (one in
        ``holdout_every`` of each class) rather than all of it.
      say: called with a line on which images are scored, which are left out, and which classes of
        the data and of the network do not meet.

    Returns:
      "top1" and "top5" (shares of n), "loss" (mean cross-entropy, nats), "calibration_error" (15
      bins, Guo et al. 2017, section 2), "brier" (Brier 1950, 0 to 2), "n" and "seconds".

    Raises:
      UserError: data or weights that cannot be read or do not fit one another.
    """
    for name, number in {"batch_size": batch_size, "limit": limit}.items():
        check_range(name, number, 1)
    began = time.perf_counter()
    of = Classifier(opened)
    prepared = of.preprocessing
    if ten_crop:
        if tta != "none":
            raise UserError(f"--ten-crop with --tta {tta}: the crops are mirrored; leave one out")
        prepared.check_ten_crops()
        batch_size = max(1, batch_size // CROPS)
    split = config.eval_split or TEST_NAMES[0]  # a training is evaluated on val
    if config.folder is None:
        (source,) = open_sources(config, (split,))
    else:  # images may differ in size, and one that is held out of each one is all of them
        any_size = dataclasses.replace(config, image_size=1, eval_split=split)
        source = open_sources(any_size, every=None if holdout else 1)[1]
    if not len(source):
        raise UserError(f"split {split!r} of {config.title} is empty: give another")
    title = config.title
    for line in getattr(source, "notes", (f"evaluated on {split}",)):
        say(line)
    classes = class_order(source.class_names, of.class_names, of.num_classes, title, say)
    known = _known_rows(source, classes, title, say)
    count = len(known) if limit is None else min(limit, len(known))
    rows = known[np.linspace(0, len(known) - 1, count).round().astype(np.int64)]
    say(f"scored on {count} images of {title}")

    def decode(data: bytes, rng: None) -> np.ndarray:
        return prepared.ten_crops(data) if ten_crop else prepared(data)

    def step(batch: tuple[np.ndarray, np.ndarray]) -> metrics.Sums:
        images, labels = (padded(x, min(batch_size, count)) for x in batch)
        return _scores(of.module, of.variables, of.stats, images, classes[labels], tta)

    batches = decode_chunks(source, decode, rows, min(batch_size, count))  # type: ignore[arg-type]
    try:
        parts = [
            {name: values[: len(labels)] for name, values in scores.items()}
            for (_, labels), scores in metrics.outputs(step, batches)
        ]
    except Unreadable:
        if bad := undecodable_rows(source, rows.tolist(), prepared):
            raise unreadable(bad) from None  # with all that are unreadable
        raise
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    means = {name: float(values.mean(dtype=np.float64)) for name, values in scores.items()}
    if not math.isfinite(means["loss"]):
        raise not_finite()
    *_, error = metrics.reliability(scores["confidence"], scores["top1"])
    return {
        **{name: means[name] for name in ("top1", "top5", "loss")},
        "calibration_error": error,
        "brier": means["brier"],
        "n": count,
        "seconds": time.perf_counter() - began,
    }


@functools.partial(jax.jit, static_argnames=("module", "tta"))
def _scores(
    module: nn.Module, variables: Any, stats: Any, images: jax.Array, labels: jax.Array, tta: Views
) -> metrics.Sums:
    """Scores (N,) of each of the images (N, H, W, C), or of their crops (N, 10, H, W, C)."""
    pixels = images.reshape(-1, *images.shape[-3:])
    apply: Any = functools.partial(module.apply, variables)
    logits = averaged_logits(apply, normalize(pixels, stats), tta)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if images.ndim == 5:
        crops = jax.nn.log_softmax(logits).reshape(*images.shape[:2], -1)
        logits = jax.nn.logsumexp(crops, axis=1) - math.log(images.shape[1])
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    losses, p = metrics.cross_entropy(logits, targets), jax.nn.softmax(logits)
    examples = [x[:, None] for x in (logits, labels, losses)]
    return {
        **jax.vmap(metrics.classification_sums)(*examples),
        "brier": jnp.sum((p - targets) ** 2, axis=-1),
        "confidence": jnp.max(p, axis=-1),
    }


def _known_rows(
    source: Any, classes: np.ndarray, title: str, say: Callable[[str], None]
) -> np.ndarray:
    """Rows of the examples whose class the network knows: int64 (N,)."""
    unknown = [name for name, place in zip(source.class_names, classes, strict=True) if place < 0]
    if not unknown:
        return np.arange(len(source))
    what = f"classes that the weights do not know: {unknown[:5]}"
    if not hasattr(source, "labels"):
        raise UserError(f"{title} has {what}")
    rows = np.flatnonzero(classes[source.labels] >= 0)
    say(f"left out: {len(source) - len(rows)} images of {what}")
    return rows


def class_order(
    data: Sequence[str],
    weights: Sequence[str] | None,
    num_classes: int,
    title: str,
    say: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """The network's output for each label of the data: int32 (labels,), -1 where it has none.

    Classes are matched by name, and WordNet's ids with ImageNet's classes. Where no name is the
    same they go by position; another number of classes raises UserError then.

    ``title`` is what to call the data; ``say`` is called with a line where classes go by position,
    or some are not in the data.
    """
    known = num_classes if weights is None else min(len(weights), num_classes)
    are_ids = all(re.fullmatch(r"n\d{8}", name) for name in data)
    if are_ids and tuple(weights or ()) == imagenet_classes():
        weights = imagenet_ids()
    data, names = ([same_name(name) for name in each] for each in (data, weights or ()))
    place = {name: index for index, name in enumerate(names)}
    if data != names and len({*data}) == len(data) and place.keys() & {*data}:
        if missing := [name for name in names if name not in data]:
            say(f"{len(missing)} of the network's classes are not in {title}: {missing[:5]}")
        return np.array([place.get(name, -1) for name in data], np.int32)
    if len(data) != known:
        raise UserError(
            f"the weights tell {known} classes apart and {title} has {len(data)}, none of the same "
            "name: take weights or data of the same classes"
        )
    if weights is not None and data != names:
        say(f"no class of {title} has a name of the network's: they are matched by position, "
            f"{data[0]!r} with {names[0]!r}")  # fmt: skip
    return np.arange(len(data), dtype=np.int32)
