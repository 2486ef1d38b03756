"""Worker processes: what they run, what ends them, and the memory that they share."""

import collections
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_resnet.distributed import workers
from flax_resnet.errors import UserError

PARENT = """
import multiprocessing, sys, time
from test_workers import child
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child, daemon=True)
    process.start()
    time.sleep(600)
"""


def child():
    """A worker process: it says that it has begun, and never ends by itself."""
    workers.depend(0, 1)
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


# A script without the main guard; what it trains on lives to the end of the interpreter.
SCRIPT = """
import multiprocessing, os, signal, sys
print("begins", flush=True)
from flax_resnet.data.batches import Data
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import data_mesh
data = Data(DataConfig(folder=sys.argv[1], resident_mb=0, num_workers=1), data_mesh(), 2)
batches = data.host_batches(0, 8, 0, 12)
kept = [next(batches)]
if len(sys.argv) > 2:
    os.kill(multiprocessing.active_children()[0].pid, int(sys.argv[2]))
kept += batches
print(len(kept), sum(int(batch["image"].sum()) for batch in kept) > 0)
"""


def run_script(way, tmp_path, environment, *arguments):
    """(exit status, stdout, stderr) of SCRIPT as a file or by -c."""
    (tmp_path / "script.py").write_text(SCRIPT)
    how = {"file": [tmp_path / "script.py"], "-c": ["-c", SCRIPT]}[way]
    done = subprocess.run(
        [sys.executable, *how, *arguments], text=True, capture_output=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "-c"])
def test_a_script_without_guard_runs_once_and_leaves_nothing(
    way, tmp_path, image_folder, clean_environment
):
    ended = run_script(way, tmp_path, clean_environment, image_folder)
    assert ended == (0, "begins\n12 True\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_one_line(number, tmp_path, image_folder, clean_environment):
    code, _, error = run_script("file", tmp_path, clean_environment, image_folder, str(int(number)))
    assert code == 1
    line = f"flax_resnet.errors.UserError: a data worker was killed by {number.name}: "
    assert line + workers.ADVICE[number] in error
    assert "data.num_workers 0" in workers.ADVICE[number]


def test_other_ends_of_a_worker_are_one_line_too():
    for code, how in ((-11, "was killed by SIGSEGV"), (3, "exited with 3")):
        text = f"Worker process was terminated unexpectedly with exit code {code}. Search"
        with pytest.raises(UserError, match=f"{how}.*set data.num_workers 0"):  # noqa: SIM117
            with workers.dead_worker_as_one_line():
                raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="another"), workers.dead_worker_as_one_line():
        raise RuntimeError("another")


@pytest.mark.skipif(not Path(workers.SHARED_MEMORY).is_dir(), reason="Linux has it")
def test_batches_that_do_not_fit_into_shared_memory_are_refused(monkeypatch):
    workers.check_shared_memory(100)
    usage = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(64 * 2**20))
    workers.check_shared_memory(64 * 2**20)
    with pytest.raises(UserError, match=r"64 MiB free, and .* take 110 MiB: .* --shm-size 2g"):
        workers.check_shared_memory(110 * 2**20)
