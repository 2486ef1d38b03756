"""kill -9 and SIGTERM at random moments: every restart goes on, and the end is bit-identical."""

import collections
import itertools
import json
import multiprocessing
import os
import signal
import time

import fault_worker
import numpy as np
import pytest
from run_helpers import assert_same_end

from flax_resnet.records.run_dir import read_metrics

pytestmark = pytest.mark.slow
KILLS, TERMS = 50, 15

CLOCK = {"seconds", "train_seconds", "compile_seconds", "eval_seconds"}


@pytest.fixture(scope="module")
def environment(digits_dir, clean_environment, tmp_path_factory):
    """For the workers; what they compile is compiled once."""
    cache = tmp_path_factory.mktemp("cache")
    return clean_environment | {"FAULTS_DATA": digits_dir, "JAX_COMPILATION_CACHE_DIR": str(cache)}


@pytest.fixture(scope="module")
def started(environment, tmp_path_factory):
    """(workdir, log) -> a process that trains in it, and a function that says its phase."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_worker"])
    phases = tmp_path_factory.mktemp("phase") / "phase"

    def start(workdir, log):
        phases.write_bytes(b"\0")
        process = context.Process(
            target=fault_worker.train, args=(str(workdir), str(phases), environment, str(log))
        )
        process.start()
        return process, lambda: fault_worker.PHASES[phases.read_bytes()[0]]

    return start


@pytest.fixture(scope="module")
def unbroken(started, tmp_path_factory):
    """The workdir of a run that nothing stopped."""
    directory = tmp_path_factory.mktemp("unbroken")
    process, _ = started(directory / "w", directory / "log")
    process.join(300)
    assert process.exitcode == 0, (directory / "log").read_text()[-2000:]
    return directory / "w"


def assert_same_record(workdir, unbroken):
    """The state and the record of two finished runs are equal but for the clock."""
    assert_same_end(workdir, unbroken, 300)
    results = [json.loads((place / "result.json").read_text()) for place in (workdir, unbroken)]
    assert {k for k in results[0] if results[0][k] != results[1][k]} <= CLOCK


def strike(process, phase, number, moment, aim=None):
    """Sends a signal ``moment`` seconds after the loop has begun; the phase it met, or None.

    With ``aim`` it is the first moment after that in that phase.
    """
    while process.is_alive() and phase() == "starting":
        time.sleep(0.005)
    process.join(moment)
    while aim is not None and process.is_alive() and phase() != aim:
        pass
    if not process.is_alive():
        return None
    met = aim or phase()
    os.kill(process.pid, number)
    process.join(60)
    assert not process.is_alive()
    return met


def test_a_run_killed_fifty_times_ends_as_if_it_had_not_been(started, unbroken, tmp_path, capsys):
    workdir, log = tmp_path / "w", tmp_path / "log"
    rng = np.random.default_rng(0)
    met, background, lost, finished = collections.Counter(), 0, [], 0
    while met.total() < KILLS:
        process, phase = started(workdir, log)
        aim = {3: "evaluating", 6: "saving a checkpoint"}.get(met.total() % 10)
        where = strike(process, phase, signal.SIGKILL, rng.uniform(0, 0.5), aim)
        assert where is None or process.exitcode == -signal.SIGKILL, log.read_text()[-2000:]
        if where is None:  # it came to its end before: another run, for the kills that are left
            assert process.exitcode == 0, log.read_text()[-2000:]
            assert_same_record(workdir, unbroken)
            finished += 1
            workdir = tmp_path / f"w{finished}"
            continue
        saving = [p for p in workdir.glob("checkpoints/*") if not (p / "SEALED.json").exists()]
        met[where] += 1
        background += bool(saving) and where != "saving a checkpoint"
        logged = [r["step"] for r in read_metrics(workdir)]
        lost.append(max([*logged, 0]) - fault_worker.newest(workdir))
    process, _ = started(workdir, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-2000:]
    assert_same_record(workdir, unbroken)
    with capsys.disabled():
        print(f"\n{met.total()} kills ({dict(met)}), {background} of them beside a save under way")
        print(
            f"{finished + 1} runs to the end; steps lost: {sum(lost)}, at most {max(lost)} at once"
        )
    assert {"in a training step", "saving a checkpoint", "evaluating"} <= met.keys()
    assert max(lost) <= 10  # two intervals of saving: one under way, one not begun


def test_a_run_stopped_by_sigterm_loses_no_step(started, unbroken, tmp_path, capsys):
    workdir, log = tmp_path / "w", tmp_path / "log"
    rng = np.random.default_rng(1)
    steps, met = [], collections.Counter()
    while len(steps) < TERMS:
        process, phase = started(workdir, log)
        where = strike(process, phase, signal.SIGTERM, rng.uniform(0, 0.5))
        if where is None:
            break
        assert process.exitcode == 75, log.read_text()[-2000:]
        met[where] += 1
        steps.append(fault_worker.newest(workdir))
        assert f"stopped at step {steps[-1]} of 300, which is saved" in log.read_text()
    process, _ = started(workdir, log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-2000:]
    assert_same_record(workdir, unbroken)
    assert all(after >= before for before, after in itertools.pairwise(steps))
    assert len(set(steps)) >= 5
    with capsys.disabled():
        print(f"\n{len(steps)} SIGTERMs ({dict(met)}) at steps {steps}: none lost")
