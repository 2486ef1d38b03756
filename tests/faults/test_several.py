"""Two processes train one run; one is stopped or killed; started again they go on."""

import pathlib
import signal
import sys
import time

import processes
import pytest
from fault_worker import newest
from run_helpers import assert_same_end

from experiments.launch import local
from flax_resnet.records.run_dir import read_metrics
from flax_resnet.studies import tables

pytestmark = pytest.mark.slow
WORKER = str(pathlib.Path(__file__).parents[1] / "support" / "fault_worker.py")


@pytest.fixture(scope="module")
def environment(digits_dir, clean_environment):
    return clean_environment | {"FAULTS_DATA": digits_dir}


def command(workdir, *flags):
    return [sys.executable, WORKER, "--workdir", str(workdir), "--num-steps", "60", *flags]


@pytest.fixture(scope="module")
def trained(environment):
    """Trains 60 steps in a workdir, as processes of one device each; the exit status of all."""

    def train(workdir, count=2):
        return local.launch(command(workdir), local.Settings(count, 1), environment)

    return train


@pytest.fixture
def struck(environment):
    """How two processes end when one gets a signal after a checkpoint; what they printed."""

    def strike(workdir, number, who, *flags):
        children = processes.start(command(workdir, *flags), environment)
        while newest(workdir) < 10 and children[who].poll() is None:
            time.sleep(0.02)
        children[who].send_signal(number)
        printed = processes.ended(children)
        return [child.returncode for child in children], "".join(printed)

    return strike


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "w"
    assert trained(workdir) == 0
    return workdir


@pytest.mark.parametrize(
    ("number", "who"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGKILL, 0), (signal.SIGKILL, 1)],
)
def test_what_one_of_two_meets_costs_no_bit(
    trained, struck, unbroken, tmp_path, capfd, number, who
):
    statuses, printed = struck(tmp_path / "w", number, who)
    if number == signal.SIGKILL:
        assert statuses[who] == -signal.SIGKILL
        assert statuses[1 - who] in (1, -signal.SIGABRT), printed  # the latter is JAX's own
    else:
        assert statuses == [75, 75], printed
        assert "of 60, which is saved" in printed
    assert trained(tmp_path / "w") == 0
    assert "resumes at step" in capfd.readouterr().out
    assert_same_end(tmp_path / "w", unbroken, 60)


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


def test_a_run_goes_from_two_processes_to_one(trained, struck, unbroken, tmp_path, capfd):
    workdir = tmp_path / "w"
    statuses, printed = struck(workdir, signal.SIGTERM, 0, "--sharding", "fsdp")
    assert statuses == [75, 75], printed
    step = newest(workdir)
    assert trained(workdir, 1) == 0
    said = capfd.readouterr().out
    assert f"resumes at step {step}" in said
    assert "saved with processes 2, now 1; devices 2, now 1; sharding fsdp, now replicated" in said
    last = [read_metrics(place)[-1] for place in (workdir, unbroken)]
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=1e-3)
