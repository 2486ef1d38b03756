"""Sums of metrics, their means, and the losses.

A metric is a sum over examples, kept beside the count of examples, so that batches of any
size, shard or padding add up to the exact mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Sums = dict[str, jax.Array]
BINS = 15
"""Of the reliability diagram and the expected calibration error."""


def classification_sums(
    logits: jax.Array, labels: jax.Array, loss: jax.Array, mask: jax.Array | None = None
) -> Sums:
    """Sums over a batch.

    Args:
      logits: (N, num_classes).
      labels: int (N,).
      loss: (N,), one for each example.
      mask: bool (N,), False where an example is padding; None counts all.

    Returns:
      Scalars "loss", "top1" and "top5" (correct examples; top5 of at most num_classes), and
      "count".
    """
    counted = jnp.ones(labels.shape, bool) if mask is None else mask
    k = min(5, logits.shape[-1])
    # The rank of the true class; on equal logits the lower class comes first, as in argmax.
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & before), axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return {
        "loss": jnp.sum(jnp.where(counted, loss, 0)),
        "top1": jnp.sum(counted & finite & (rank < 1)).astype(jnp.int32),
        "top5": jnp.sum(counted & finite & (rank < k)).astype(jnp.int32),
        "count": jnp.sum(counted).astype(jnp.int32),
    }


def confusion_counts(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """int32 (num_classes, num_classes): examples by true class (row) and predicted (column)."""
    num_classes = logits.shape[-1]
    ones = jnp.ones(labels.shape, jnp.int32) if mask is None else mask.astype(jnp.int32)
    counts = jnp.zeros((num_classes, num_classes), jnp.int32)
    return counts.at[labels, jnp.argmax(logits, axis=-1)].add(ones)


def reliability(
    confidence: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """How sure a network is, and how often right (Guo et al. 2017, section 2).

    Args:
      confidence: (N,), the largest probability of each example.
      correct: (N,), whether the network is right.

    Returns:
      (sum of confidences, right examples, examples) of each bin, (BINS,), and the expected
      calibration error. The bins are equal parts of (0, 1], closed above.
    """
    place = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    counts, sure, right = (np.bincount(place, w, BINS) for w in (None, confidence, correct))
    # A bin's |accuracy - confidence|, times its share of the examples.
    return sure, right, counts, float(np.abs(sure - right).sum() / len(place))


def means(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """``totals``, divided by "count": "loss" in nats, "top1" and "top5" in 0..1."""
    total = totals(sums)
    count = total.pop("count")
    means = {name: value / count for name, value in total.items()}
    return {name: value if np.ndim(value) else float(value) for name, value in means.items()}


def totals(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds up sums on the host, one after the other in float64.

    Floats, or arrays (S,) for the sums of S networks that train together. A list is fetched from
    the device at once.
    """
    total: dict[str, Any] = {}
    for one in jax.device_get(sums) if isinstance(sums, list) else sums:
        for name, value in one.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)[()]
    return total


def outputs(step: Callable[[Any], Any], batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(batch, what ``step`` gives for it, on the host); the step after it runs meanwhile."""
    running = None
    for batch in itertools.chain(batches, [None]):
        started = None if batch is None else (batch, step(batch))
        if running is not None:
            yield running[0], jax.device_get(running[1])
        running = started


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy in nats, (N,), in at least float32. Targets (N, K) sum to one."""
    return optax.softmax_cross_entropy(_wide(logits), targets)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over classes of the sigmoid cross-entropy, (N,) (Wightman et al. 2021, section 3.2)."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(_wide(logits), targets), axis=-1)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
