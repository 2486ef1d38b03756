"""Batches in step order: which examples make batch k, their decoding, and reading ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flax_resnet.data import sources
from flax_resnet.data.decode import DECODE_ERRORS, Decoder, ahead, reason
from flax_resnet.distributed import workers
from flax_resnet.errors import UserError
from flax_resnet.xla.backend import usable_cores

# Files or records read at a time: enough that storage is asked for several at once, and few enough
# that the processor still has them at hand when they are decoded: records of 60 kB by 64 took more
# than twice as long each as by 16 (a 2-core CPU, n = 1).
READ = 16
# Threads that decode in this process: each has a batch in hand, and Python lets no more be of use.
MOST_THREADS = 8


def epoch_permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the n training examples in an epoch (read-only)."""
    return _orders(seed, n)(epoch)


@functools.lru_cache(maxsize=64)  # of seeds that train together
def _orders(seed: int, n: int) -> Callable[[int], np.ndarray]:
    """epoch -> order; a batch needs two at most."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        rows = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
        rows.setflags(write=False)
        return rows

    return order


def batch_rows(seed: int, step: int, batch_size: int, n: int, repeats: int = 1) -> np.ndarray:
    """The training examples of batch ``step``: (batch_size,) row numbers below n.

    With ``repeats`` each example of the order comes so many times in a row; where the batch does
    not divide by it, the last one's copies go on in the next batch.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size) // repeats
    epochs = positions // n
    return np.concatenate(
        [
            epoch_permutation(seed, int(epoch), n)[positions[epochs == epoch] % n]
            for epoch in np.unique(epochs)
        ]
    )


def take(arrays: Mapping[str, Any], which: Mapping[str, Any]) -> dict[str, Any]:
    """The rows ``which["row"]`` of each array; and "row" and "epoch", where there is "epoch"."""
    taken = {name: array[which["row"]] for name, array in arrays.items()}
    return {**taken, **which} if "epoch" in which else taken


def batch_epochs(step: int, batch_size: int, n: int, repeats: int = 1) -> np.ndarray:
    """The epoch that each row of batch ``step`` is of, from 0: int32 (batch_size,)."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size) // repeats
    return (positions // n).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """Reads and decodes this process's rows of batch ``step``; picklable, for worker processes.

    Attributes:
      source: the split.
      decoder: bytes to pixels.
      batch_size: rows of the global batch.
      seed: shuffles by (seed, epoch); None reads in file order and pads the last batch.
      shard: (index, count): which equal part of each batch to read.
      repeats: copies of each example in training.
      with_rows: with a seed, give "row" and "epoch" too.
    """

    source: sources.Source
    decoder: Decoder
    batch_size: int
    seed: int | None = None
    shard: tuple[int, int] = (0, 1)
    repeats: int = 1
    with_rows: bool = False

    def rows(self, step: int) -> dict[str, np.ndarray]:
        """{"row" int32 (n,)} of this process; without a seed also "mask" bool, False on padding.

        With a seed and ``with_rows`` also "epoch", int32 (n,).
        """
        n = len(self.source)
        if self.seed is None:
            rows = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
            which = {"row": np.where(rows < n, rows, 0), "mask": rows < n}
        else:
            which = {"row": batch_rows(self.seed, step, self.batch_size, n, self.repeats)}
            if self.with_rows:
                which["epoch"] = batch_epochs(step, self.batch_size, n, self.repeats)
        which["row"] = which["row"].astype(np.int32)
        mine = shard_slice(self.batch_size, *self.shard)
        return {name: x[mine] for name, x in which.items()}

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """{"image" uint8 (n, H, W, C), "label" int32 (n,)}, and what ``rows`` has beside "row".

        "row" too, where there is "epoch".
        """
        which = self.rows(step := int(step))
        generators = self._generators(step, shard_slice(self.batch_size, *self.shard))
        images, labels = decode_rows(self.source, self.decoder, which["row"], generators)
        if "epoch" not in which:
            del which["row"]
        return {"image": images, "label": labels, **which}

    def _generators(self, step: int, mine: slice) -> Iterator[np.random.Generator] | None:
        """One generator an example, by its position in training, whoever reads it."""
        if self.seed is None or not self.decoder.random_crop:
            return None
        first = step * self.batch_size
        return (
            np.random.Generator(np.random.Philox(key=[self.seed, position], counter=1))
            for position in range(first + mine.start, first + mine.stop)
        )


def shard_slice(n: int, index: int, count: int) -> slice:
    """The rows of part ``index`` where n rows are cut into ``count`` equal parts."""
    return slice(index * n // count, (index + 1) * n // count)


def decode_rows(
    source: sources.Source,
    decoder: Decoder,
    rows: np.ndarray,
    generators: Iterable[np.random.Generator] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes rows of a source, one or more: uint8 (n, H, W, C) and int32 labels (n,)."""
    draws = [None] * len(rows) if generators is None else list(generators)
    images: np.ndarray = np.empty(0, np.uint8)
    labels = np.empty(len(rows), np.int32)
    for start in range(0, len(rows), READ):
        some = rows[start : start + READ]
        encoded, labels[start : start + READ] = source.read([int(row) for row in some])
        for position, (row, data) in enumerate(zip(some, encoded, strict=True), start):
            if not 0 <= labels[position] < len(source.class_names):
                raise UserError(
                    f"{source.describe(int(row))} has label {labels[position]}, expected 0 to "
                    f"{len(source.class_names) - 1}: the split is unlabelled or damaged, give "
                    "another"
                )
            try:
                pixels = decoder(data, draws[position])
            except DECODE_ERRORS as error:
                bad = {source.describe(int(row)): reason(error)}
                raise sources.unreadable(bad) from error
            if position == 0:
                images = np.empty((len(rows), *pixels.shape), np.uint8)
            if pixels.shape != images.shape[1:]:
                raise UserError(
                    f"{source.describe(int(row))} is {pixels.shape[1]}x{pixels.shape[0]} and "
                    f"others are {images.shape[2]}x{images.shape[1]}: set --data.image-size"
                )
            images[position] = pixels
    return images, labels


def decode_chunks(
    source: sources.Source, decoder: Decoder, rows: np.ndarray, chunk: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decodes rows in order, ``chunk`` at a time, on the machine's cores: decoders free the GIL."""

    def decode(start: int) -> tuple[np.ndarray, np.ndarray]:
        return decode_rows(source, decoder, rows[start : start + chunk])

    for _, decoded in ahead(decode, range(0, len(rows), chunk), usable_cores()):
        yield decoded.result()


def read_ahead(reader: BatchReader, start: int, stop: int, num_workers: int) -> Generator[Any]:
    """Reads the batches from step ``start`` to before ``stop`` ahead, by Grain, in their order.

    An element of Grain's is a whole batch: what it does for each element is then nothing beside
    the decoding. Batches of worker processes come in shared memory.

    Args:
      reader: of one batch.
      start: first step.
      stop: one past the last.
      num_workers: processes that read; 0 reads in threads of this one.
    """
    import grain

    count = num_workers if is_repaid(num_workers, stop - start) else 0
    threads = thread_count(count)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 + threads)
    made: Any = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(options)
    if count:
        _mark_flags_parsed()
        # Grain hands their batches on in shared memory.
        made = made.mp_prefetch(
            grain.MultiprocessingOptions(count, per_worker_buffer_size=workers.BATCHES_PER_WORKER),
            worker_init_fn=workers.depend,
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(workers.dead_worker_as_one_line())
        # A worker begins with the signals that its parent holds, until it ignores them.
        starting = workers.without_main() if count else contextlib.nullcontext()
        with workers.signals_held(), starting:
            iterator = iter(made)
            stack.callback(iterator.close)
            first = list(itertools.islice(iterator, 1))
        for batch in itertools.chain(first, iterator):
            yield workers.taken(batch)


def is_repaid(num_workers: int, num_batches: int) -> bool:
    """Whether so many batches repay worker processes, each of which costs seconds to start."""
    return num_batches > 4 * num_workers > 0


def thread_count(workers: int) -> int:
    """Threads of each worker process; of this one without them.

    They are no more than the cores: they would wait for each other, and for Python.
    """
    return max(1, min(2 if workers else MOST_THREADS, usable_cores() // max(1, workers)))


def _mark_flags_parsed() -> None:
    """Grain hands absl's flags to its workers, and refuses while nobody has parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
