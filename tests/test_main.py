"""The command line as a person uses it: processes, exit status, files."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers import assert_one_line_error, assert_trees_equal
from tensorboard_events import read_scalars
from test_train import saved

from experiments import digits
from flax_resnet import metrics
from flax_resnet.main import main

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    "--model.stage-sizes", "1", "--model.num-filters", "8", "--log-every-steps", "2",
    "--eval-every-epochs", "0.5", "--batch-size", "64",
)  # fmt: skip


@pytest.fixture
def environment(digits_dir, clean_environment):
    """One CPU device, the prepared digits, no TensorFlow whatever is installed."""
    return clean_environment | {"TFDS_DATA_DIR": digits_dir}


def start(environment, *arguments, module="experiments.digits", **kwargs):
    command = [sys.executable, "-W", "error", "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs,
    )  # fmt: skip


def run(environment, *arguments, **kwargs):
    process = start(environment, *arguments, **kwargs)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def call(digits_dir, capsys):
    """Runs a command line in this process: (exit status, stdout, stderr)."""

    def call(*arguments):
        argv = ["--data.data-dir", digits_dir, *map(str, arguments)]
        try:
            main(digits.get_config, "runs/digits", argv)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_bad_input_ends_a_process_with_status_2_and_one_line(environment, tmp_path):
    result = run(environment, "--workdir", tmp_path / "w", "--batch-size", 0)
    assert_one_line_error(result, "batch_size=0: expected 1 or more")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.name", "cifar1o"], "unknown dataset 'cifar1o' (did you mean 'cifar10'?)"),
        (["--data.name", "cifar100"], "run python -m flax_resnet prepare cifar100 --data-dir "),
        (["--model.num-classes", "5"], "labels 0 to 9: set --model.num-classes 10"),
        (["--data.folder", "/nowhere"], "--data.folder /nowhere: no such directory"),
        (["--batch-size", "12"], "batch_size=12 is not divisible by the 8 devices: use 8 or 16"),
        (["--model", "resnet21"], "expected one of the names that `python -m flax_resnet names`"),
        (["--workdir", "/proc/flax_resnet"], "--workdir /proc/flax_resnet cannot be written"),
        (["--workdir", "/dev/null/w"], "--workdir /dev/null/w cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(call, tmp_path, arguments, message):
    where = () if "--workdir" in arguments else ("--workdir", tmp_path / "w")
    assert_one_line_error(call(*where, *arguments), message)
    assert not (tmp_path / "w").exists()


def test_another_configs_workdir_is_left_alone(call, tmp_path):
    workdir = tmp_path / "w"
    first = call("--workdir", workdir, "--num-steps", 2, *SMALL)
    assert first[0] == 0, first
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    result = call("--workdir", workdir, "--num-steps", 2, *SMALL, "--seed", 3)
    assert_one_line_error(result, "holds a run of another config (seed: there 0, here 3)")
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before
    code, out, _ = call("--workdir", workdir, "--num-steps", 2, *SMALL)
    assert code == 0
    assert out.count("\n") == 1
    assert "is finished: 2 steps" in out


def kill_when(environment, workdir, targets, arguments, **kwargs):
    """Starts the command once for each target step and kills it -9 when it has logged it."""
    for target in targets:
        process = start(environment, "--workdir", workdir, *arguments, **kwargs)
        deadline = time.monotonic() + 240
        while max([r["step"] for r in metrics.read_metrics(workdir)], default=0) < target:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (workdir / "result.json").exists()


@pytest.mark.slow
def test_a_killed_run_ends_bit_identical_to_an_unbroken_one(environment, tmp_path):
    """kill -9 wherever the process is, then the same command to the end."""
    arguments = (*SMALL, "--num-steps", 60, "--checkpoint.every-steps", 7, "--optimizer", "adam")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, _, err = run(environment, "--workdir", whole, *arguments)
    assert code == 0, err
    kill_when(environment, killed, (30,), arguments)
    code, out, err = run(environment, "--workdir", killed, *arguments)
    assert code == 0, err
    assert "resumes at step" in out
    assert_trees_equal(saved(killed)[0], saved(whole)[0])
    records = metrics.read_metrics(killed)
    steps = [(r["split"], r["step"]) for r in records]
    assert steps == [(r["split"], r["step"]) for r in metrics.read_metrics(whole)]
    losses = {(f"{r['split']}/loss", r["step"]): pytest.approx(r["loss"]) for r in records}
    events = read_scalars(killed / "tensorboard")
    assert {at: value for at, value in events.items() if "/loss" in at[0]} == losses


@pytest.mark.slow
def test_the_digits_reach_98_percent(environment, tmp_path):
    code, out, err = run(environment, "--workdir", tmp_path / "w")
    assert code == 0, err
    result = json.loads((tmp_path / "w" / "result.json").read_text())
    assert result["top1"] >= 0.98
    assert f"{100 * result['top1']:.2f} % of 355 images" in out


@pytest.mark.slow
def test_mini_model_learns_real_cifar10_and_survives_kill_9(environment, tmp_path, shared_data):
    arguments = (
        "--data.data-dir", shared_data, "--data.eval-split", "test[:512]", "--num-steps", 30,
        "--batch-size", 64, "--log-every-steps", 5, "--checkpoint.every-steps", 5,
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    module = "experiments.cifar10_mini"
    code, _, err = run(environment, "--workdir", whole, *arguments, module=module)
    assert code == 0, err
    losses = [r["loss"] for r in metrics.read_metrics(whole) if r["split"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
    kill_when(environment, killed, (15,), arguments, module=module)
    code, out, err = run(environment, "--workdir", killed, *arguments, module=module)
    assert code == 0, err
    assert "resumes at step 1" in out
    assert_trees_equal(saved(killed)[0], saved(whole)[0])
