"""Batches in step order, read ahead by Grain in worker processes or threads.

An element of Grain's is a whole batch: what it does for each element is then nothing beside the
decoding. Batches of worker processes come in shared memory.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any

from flax_resnet.cpu import usable_cores
from flax_resnet.datasets.rows import BatchReader

# Threads that decode in this process: each has a batch in hand, and Python lets no more be of use.
MOST_THREADS = 8


def batches(reader: BatchReader, start: int, stop: int, num_workers: int) -> Generator[Any]:
    """What ``reader`` makes of each step from ``start`` to before ``stop``, in order.

    Args:
      reader: of one batch.
      start: first step.
      stop: one past the last.
      num_workers: processes that read; 0 reads in threads of this one.
    """
    import grain

    # A worker process costs seconds to start; a handful of batches does not repay it.
    workers = num_workers if stop - start > 4 * num_workers else 0
    threads = thread_count(workers)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 + threads)
    made: Any = grain.MapDataset.range(start, stop).map(reader).to_iter_dataset(options)
    if workers:
        _mark_flags_parsed()
        # Grain hands their batches on in shared memory.
        made = made.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=2), worker_init_fn=_depend
        )
    with contextlib.ExitStack() as stack:
        with _signals_held():  # a worker begins with what its parent holds, until it ignores it
            iterator = iter(made)
            stack.callback(iterator.close)
            first = list(itertools.islice(iterator, 1))
        yield from itertools.chain(first, iterator)


def thread_count(workers: int) -> int:
    """Threads of each worker process; of this one without them.

    They are no more than the cores: they would wait for each other, and for Python.
    """
    return max(1, min(2 if workers else MOST_THREADS, usable_cores() // max(1, workers)))


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """SIGTERM and SIGINT of this thread wait until the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _depend(worker: int, workers: int) -> None:
    """In a worker process: it ends with its parent, even a killed one, and by no signal before.

    What stops the run (Slurm tells all processes) is for the main one.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _mark_flags_parsed() -> None:
    """Grain hands absl's flags to its workers, and refuses while nobody has parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
