"""Two processes train one run; one is stopped or killed; the launcher starts both again."""

import pathlib
import signal
import sys
import threading
import time

import pytest
from fault_helpers import assert_same_end
from fault_worker import newest

from experiments.launch import local
from flax_resnet import tables
from flax_resnet.metrics import read_metrics

pytestmark = pytest.mark.slow
WORKER = str(pathlib.Path(__file__).with_name("fault_worker.py"))


@pytest.fixture(scope="module")
def environment(digits_dir, clean_environment):
    return clean_environment | {"FAULTS_DATA": digits_dir}


@pytest.fixture(scope="module")
def trained(environment):
    """Trains 60 steps in a workdir, as processes; the exit status of all."""

    def train(workdir, *flags, processes=2, restart=0, act=None):
        command = [sys.executable, WORKER, "--workdir", str(workdir), "--num-steps", "60", *flags]
        settings = local.Settings(processes=processes, devices=1, restart=restart, grace=15)
        threads, wait = [], local._wait

        def watched(children, *rest):
            if act is not None and not threads:  # the first time alone
                threads.append(threading.Thread(target=act, args=[children]))
                threads[0].start()
            return wait(children, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, "_wait", watched)
            status = local.launch(command, settings, environment)
        for thread in threads:
            thread.join()
        return status

    return train


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "w"
    assert trained(workdir) == 0
    return workdir


def sends(workdir, number, who, ended):
    """What sends one process a signal when a checkpoint is there, and notes how both end."""

    def act(children):
        while newest(workdir) < 10:
            time.sleep(0.02)
        children[who].send_signal(number)
        while any(child.returncode is None for child in children):
            time.sleep(0.02)
        ended.extend(child.returncode for child in children)

    return act


@pytest.mark.parametrize(
    ("number", "who"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGKILL, 0), (signal.SIGKILL, 1)],
)
def test_what_one_of_two_meets_costs_no_bit(trained, unbroken, tmp_path, capfd, number, who):
    workdir, ended = tmp_path / "w", []
    assert trained(workdir, restart=1, act=sends(workdir, number, who, ended)) == 0
    said = capfd.readouterr().out
    assert "resumes at step" in said
    assert "still run" not in said  # what the launcher says when it has to end one
    if number == signal.SIGKILL:
        assert ended[who] == -signal.SIGKILL
        assert ended[1 - who] in (1, -signal.SIGABRT)  # the latter is JAX's own
    else:
        assert ended == [75, 75]
        assert "of 60, which is saved" in said
    assert_same_end(workdir, unbroken, 60)


def test_a_sweep_of_two_processes_reports_what_diverged_and_goes_on(environment, tmp_path, capfd):
    workdir = tmp_path / "w"
    worker = str(pathlib.Path(WORKER).with_name("sweep_worker.py"))
    flags = ["--workdir", str(workdir), "--num-steps", "10", "--seeds", "1"]
    settings = local.Settings(processes=2, devices=1)
    assert local.launch([sys.executable, worker, *flags], settings, environment) == 2
    said = capfd.readouterr()
    assert "1 of 2 runs failed" in said.err
    rows = {row["optimizer.learning_rate"]: row for row in tables.read(workdir)}
    assert rows["0.01"]["state"] == "finished"
    assert "failed: the run diverged: the parameters are not finite" in rows["1e+20"]["state"]
    assert (workdir / "learning_rate=0.01/seed0/curves.png").exists()


def test_a_run_goes_from_two_processes_to_one(trained, unbroken, tmp_path, capfd):
    workdir, ended = tmp_path / "w", []
    stops = sends(workdir, signal.SIGTERM, 0, ended)
    assert trained(workdir, "--sharding", "fsdp", act=stops) == 75
    step = newest(workdir)
    capfd.readouterr()
    assert trained(workdir, processes=1) == 0
    said = capfd.readouterr().out
    assert f"resumes at step {step}" in said
    assert "saved with processes 2, now 1; devices 2, now 1; sharding fsdp, now replicated" in said
    last = [read_metrics(place)[-1] for place in (workdir, unbroken)]
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=1e-3)
