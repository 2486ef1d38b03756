"""Reading ahead: how many threads, and what ends the processes that do it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_resnet.data import order

PARENT = """
import multiprocessing, sys, time
from flax_resnet.data import order
from test_stream import child
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, daemon=True)
    process.start()
    time.sleep(600)
"""


def child():
    """A worker process: it says that it has begun, and never ends by itself."""
    order._depend(0, 1)
    print(os.getpid(), flush=True)
    time.sleep(600)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="it reads /proc")
def test_a_worker_ends_with_its_parent_and_by_no_signal_before(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    with parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
        time.sleep(0.2)
        assert alive(worker)
        parent.kill()
    deadline = time.monotonic() + 10
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(worker)


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [(1, 0, 1), (2, 0, 2), (64, 0, 8), (1, 2, 1), (2, 2, 1), (4, 2, 2), (64, 2, 2), (6, 4, 1)],
)
def test_there_are_no_more_threads_than_cores(cores, workers, threads, monkeypatch):
    monkeypatch.setattr(order, "usable_cores", lambda: cores)
    assert order.thread_count(workers) == threads
