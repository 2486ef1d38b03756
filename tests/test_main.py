"""The command line as a person uses it: processes, exit status, files."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from helpers import QUICK, assert_one_line_error, assert_trees_equal
from tensorboard_events import read_scalars
from test_train import saved

from experiments import digits
from flax_resnet import metrics
from flax_resnet.command import command
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

    def call(*arguments, entry=digits):
        argv = [str(a) for a in arguments]
        if entry is digits:
            argv = ["--data.data-dir", digits_dir, *argv]
        try:
            if entry is digits:
                main(digits.get_config, "runs/digits", argv)
            else:
                command(argv)
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
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(call, tmp_path, arguments, message):
    assert_one_line_error(call("--workdir", tmp_path / "w", *arguments), message)
    assert not (tmp_path / "w").exists()


def test_bad_folders_are_one_line(call, tmp_path, image_folder):
    arguments = ("--workdir", tmp_path / "w", "--model.num-classes", 2, "--data.folder")
    assert_one_line_error(call(*arguments, image_folder / "cat"), "holds 0 class sub-folders")
    (image_folder / "cat" / "03.png").write_bytes(b"not a picture")
    assert_one_line_error(call(*arguments, image_folder), "unreadable image")
    header = (image_folder / "cat" / "04.png").read_bytes()[:100]
    (image_folder / "cat" / "03.png").write_bytes(header)
    streamed = call(*arguments, image_folder, "--data.resident-mb", 0)
    assert_one_line_error(streamed, f"unreadable image {image_folder}/cat/03.png")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("workdir", ["/proc/flax_resnet", "/dev/null/w"])
def test_a_workdir_that_cannot_be_written(call, workdir):
    result = call("--workdir", workdir, "--num-steps", 1, *SMALL)
    assert_one_line_error(result, f"--workdir {workdir} cannot be written")


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


def test_a_folder_trains(call, tmp_path, image_folder):
    workdir = tmp_path / "w"
    code, out, err = call(
        "--data.folder", image_folder, "--workdir", workdir, "--num-steps", 3, *SMALL,
        "--model.num-classes", 2, "--batch-size", 8, "--eval-batch-size", 8,
    )  # fmt: skip
    assert code == 0, err
    assert "32 training and 8 evaluation images of 8x8x3, resident" in out
    assert json.loads((workdir / "result.json").read_text())["num_eval"] == 8


def test_prepare_prints_where_the_set_is(call, digits_dir):
    arguments = ("prepare", "sklearn_digits", "--data-dir", digits_dir)
    assert call(*arguments, entry=command)[:2] == (0, f"{digits_dir}/sklearn_digits/1.0.0\n")
    result = call("prepare", "sklearn_digitz", "--data-dir", digits_dir, entry=command)
    assert_one_line_error(result, "unknown dataset 'sklearn_digitz' (did you mean 'sklearn_digits'")
    result = call("prepare", "sklearn_digits", "--data-dir", "/proc/x", entry=command)
    assert_one_line_error(result, "give a directory that can be written by --data-dir")


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


@pytest.mark.slow
def test_tensorflow_is_never_imported(environment, tmp_path):
    """A stand-in that leaves a mark when anything imports it, Grain's workers included."""
    marker = tmp_path / "imported"
    (tmp_path / "site" / "tensorflow").mkdir(parents=True)
    (tmp_path / "site" / "tensorflow" / "__init__.py").write_text(
        f"open({str(marker)!r}, 'a').close()\nraise ImportError('TensorFlow was imported')\n"
    )
    environment |= QUICK | {"PYTHONPATH": str(tmp_path / "site")}
    code, out, err = run(
        environment, "--workdir", tmp_path / "w", "--num-steps", 6, *SMALL,
        "--data.resident-mb", 0, "--data.num-workers", 1,
    )  # fmt: skip
    assert code == 0, err
    assert "streamed" in out
    assert not marker.exists()
