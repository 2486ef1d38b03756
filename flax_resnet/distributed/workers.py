"""Worker processes that Grain starts: how they begin and end, and their shared memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.errors import UserError

SHARED_MEMORY = "/dev/shm"
"""Where worker processes hand batches over, on Linux."""
BATCHES_PER_WORKER = 2
"""Batches of a worker that wait to be taken; it has one more in hand."""
DECODE_HERE = "set data.num_workers 0, which decodes in threads of this process"
ADVICE: Mapping[int, str] = {
    signal.SIGBUS: "give a container more shared memory (docker run --shm-size 2g), take smaller "
    f"batches or fewer data.num_workers, or {DECODE_HERE}",
    signal.SIGKILL: "the system does so when memory runs out: take smaller batches or fewer "
    f"data.num_workers, or {DECODE_HERE}",
}
_STARTING = threading.Lock()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """SIGTERM and SIGINT of this thread wait until the block is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Processes that are started here do not run the user's script, which would train again in
    each if it has no ``if __name__ == "__main__":``."""
    with _STARTING:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def taken(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of Grain's in memory of this process; its shared memory, which would outlive the
    interpreter, is free at once."""
    arrays = {}
    for name, array in batch.items():
        arrays[name] = np.array(array)
        if (memory := getattr(array, "shm", None)) is not None:
            array._unlink_on_del = False
            memory.unlink()
    return arrays


@contextlib.contextmanager
def dead_worker_as_one_line() -> Iterator[None]:
    """Turns Grain's error for a worker process that has died into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if (status := re.search(r"Worker process .* exit code (-?\d+)", str(error))) is None:
            raise
        code = int(status[1])
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        raise UserError(f"a data worker {how}: {ADVICE.get(-code, DECODE_HERE)}") from error


def check_shared_memory(num_bytes: int) -> None:
    """Raises UserError unless batches of so many bytes fit into shared memory.

    The system promises the memory all the same, and kills the worker that meets its end.
    """
    if not Path(SHARED_MEMORY).is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if num_bytes > free:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and the batches that data workers "
            f"hand over take {num_bytes / 2**20:.0f} MiB: {ADVICE[signal.SIGBUS]}"
        )


def depend(worker: int, workers: int) -> None:
    """In a worker process: it ends with its parent, even a killed one, and by no signal before.

    What stops the run (Slurm tells all processes) is for the main one.
    """
    parent: Any = multiprocessing.parent_process()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
