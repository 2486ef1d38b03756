"""Sums of metrics, and where they are written: metrics.jsonl, a tracker and the terminal.

A metric is a sum over examples, kept beside the count of examples, so that batches of any
size, shard or padding add up to the exact mean.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_resnet.records.files import replacing
from flax_resnet.tracking import Follower

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


def evaluated(step: Callable[[Any], Mapping[str, Any]], batches: Iterable[Any]) -> dict[str, Any]:
    """Adds up, as ``totals`` does, the sums that a step gives for each of the batches."""
    return totals(sums for _, sums in outputs(step, batches))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy in nats, (N,), in at least float32. Targets (N, K) sum to one."""
    return optax.softmax_cross_entropy(_wide(logits), targets)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over classes of the sigmoid cross-entropy, (N,) (Wightman et al. 2021, section 3.2)."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(_wide(logits), targets), axis=-1)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RunLog:
    """Writes one run's metrics: lines of JSON, TensorBoard events, a tracker and the terminal.

    Opened again at a step, it drops the lines after it, so that a resumed run leaves the file
    of an unbroken one.

    Args:
      workdir: gets metrics.jsonl and tensorboard/.
      start_step: lines after it are dropped.
      num_steps: optimizer steps of the whole run.
      lead: False, in every process but process 0, writes nothing.
      quiet: True writes nothing to the terminal.
      events: False leaves out tensorboard/.
      follower: sends the lines to a tracker; whoever made it ends it.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        num_steps: int,
        *,
        lead: bool = True,
        quiet: bool = False,
        events: bool = True,
        follower: Follower | None = None,
    ):
        self._lead, self._quiet, self._num_steps = lead, quiet, num_steps
        self._follower, self._events = follower, None
        if not lead:
            return
        if events:
            from flax_resnet.tracking.events import Events  # imports torch if it is installed

            self._events = Events(workdir / "tensorboard", start_step + 1)
        kept = [record for record in read_metrics(workdir) if record["step"] <= start_step]
        path = workdir / "metrics.jsonl"
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        if follower is not None:
            follower.follow(kept, self.message)

    def write(self, split: str, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes one line: the metrics of a split at a step, ``epoch`` epochs into the run."""
        if not self._lead:
            return
        record = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.write(f"{split}/{name}", value, step)
            self._events.flush()  # or a killed run would lose its last two minutes for good
        if self._follower is not None:
            self._follower.write(record)
        self.message(f"step {step}/{self._num_steps} epoch {epoch:.2f} {split}: {_text(values)}")

    def message(self, text: str) -> None:
        """Prints a line."""
        if self._lead and not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the files."""
        if not self._lead:
            return
        self._file.close()
        if self._events is not None:
            self._events.close()


class RunLogs:
    """The logs of runs that train together: element i of every value goes to log i."""

    def __init__(self, logs: Sequence[RunLog], num_steps: int):
        self._logs, self._num_steps = logs, num_steps

    def write(self, split: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """As RunLog.write, of values that are arrays (S,) or the same for all; prints one line."""
        for i, log in enumerate(self._logs):
            own = {name: float(v[i]) if np.ndim(v) else v for name, v in values.items()}
            if "images_per_second" in own:
                own["images_per_second"] /= len(self._logs)  # its share
            log.write(split, step, epoch, own)
        self.message(f"step {step}/{self._num_steps} epoch {epoch:.2f} {split}: {_text(values)}")

    def message(self, text: str) -> None:
        """Prints a line."""
        print(text, flush=True)

    def close(self) -> None:
        """Closes every log."""
        for log in self._logs:
            log.close()


def _text(values: Mapping[str, Any]) -> str:
    """Each name and its value; of several networks' values the mean, the least and the largest."""
    parts = []
    for name, v in values.items():
        digits = ".0f" if name == "images_per_second" else ".4g"
        spread = f" ({np.min(v):.4g}-{np.max(v):.4g})" if np.ndim(v) else ""
        parts.append(f"{name} {np.mean(v):{digits}}{spread}")
    return " ".join(parts)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of a workdir's metrics.jsonl; a last line cut off by a crash is left out."""
    path, records = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Timer:
    """Seconds of an interval, the share of them spent waiting for data, and images a second.

    Attributes:
      images: images trained on in the interval; its user adds them up.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new interval."""
        self._start, self._waited, self.images = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Passes batches on, counting the time until each is there."""
        iterator, end = iter(batches), object()
        while True:
            before = time.perf_counter()
            batch = next(iterator, end)
            self._waited += time.perf_counter() - before
            if batch is end:
                return
            yield batch

    def summary(self) -> dict[str, float]:
        """ "images_per_second" and "data_wait" (share of the time) since the last reset."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        wait = min(self._waited / seconds, 1.0)
        return {"images_per_second": self.images / seconds, "data_wait": wait}
