"""The command line as a person uses it: processes, exit status, files."""

import pathlib
import subprocess
import sys

import pytest
from helpers import assert_one_line_error

from flax_resnet.records.run_dir import read_metrics

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def environment(digits_dir, clean_environment):
    """One CPU device, the prepared digits, no TensorFlow whatever is installed."""
    return clean_environment | {"TFDS_DATA_DIR": digits_dir}


def run(environment, *arguments, module="experiments.digits"):
    """(exit status, stdout, stderr) of a module in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *map(str, arguments)],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_bad_input_ends_a_process_with_status_2_and_one_line(environment, tmp_path):
    result = run(environment, "--workdir", tmp_path / "w", "--batch-size", 0)
    assert_one_line_error(result, "batch_size=0: expected 1 or more")
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_mini_model_learns_real_cifar10(environment, tmp_path, shared_data):
    arguments = (
        "--data.data-dir", shared_data, "--data.eval-split", "test[:512]", "--num-steps", 30,
        "--batch-size", 64, "--log-every-steps", 5,
    )  # fmt: skip
    workdir, module = tmp_path / "w", "experiments.cifar10_mini"
    code, _, err = run(environment, "--workdir", workdir, *arguments, module=module)
    assert code == 0, err
    losses = [r["loss"] for r in read_metrics(workdir) if r["split"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
