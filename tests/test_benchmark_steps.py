"""The benchmarks train_step and eval_step: their rows, what they count, and bad input."""

import json

import jax
import pytest
from helpers import line_of_bad_input, tiny_resnet

from experiments.benchmarks import eval_step, peak, steps, train_step, workers
from flax_resnet import models

BEST = peak.Peak(100.0, 9.0, "float32", 64, {"jax": {"gflops": 100.0}, "torch": {"error": "none"}})
MAINS = {"train": train_step.main, "eval": eval_step.main}


@pytest.fixture
def tiny(monkeypatch):
    """Flags of a network of one block; the machine's peak is not measured."""
    monkeypatch.setattr(peak, "measured", lambda *_: BEST)
    monkeypatch.setattr(models, "create", lambda name, **fields: tiny_resnet(**fields))
    return ["--models", "resnet20", "--image-size", "8", "--batch-size", "2", "--steps", "2",
            "--rounds", "3"]  # fmt: skip


@pytest.mark.parametrize("kind", MAINS)
def test_rows_have_times_work_and_memory(kind, tiny, capfd):
    MAINS[kind](tiny)
    out, err = capfd.readouterr()
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert (row["benchmark"], row["model"]) == (f"{kind}_step", "resnet20")
    assert (row["image_size"], row["batch_size"], row["dtype"]) == (8, 2, "float32")
    assert row["optimizer"] == {"train": "sgd", "eval": None}[kind]
    times = row["step_seconds"]
    assert times["n"] == 3
    assert 0 < times["least"] <= times["median"] <= times["most"]
    assert row["images_per_second"] == pytest.approx(2 / times["median"])
    macs = 8 * 8 * 9 * (3 * 8 + 8 * 8 + 8 * 8) + 8 * 10  # three convolutions, the head
    assert row["gflop_a_step"] == pytest.approx({"train": 6, "eval": 2}[kind] * 2 * macs / 1e9)
    assert row["gflops"] == pytest.approx(row["gflop_a_step"] / times["median"])
    assert row["peak_share"] == pytest.approx(row["gflops"] / 100)
    memory = row["program_memory"]
    assert row["program_bytes"] == (
        memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"]
    )
    assert (memory["aliased"] > 0) == (kind == "train")  # the donated state
    assert row["process_peak_rss_bytes"] > 1e7
    assert row["peak"]["by"]["torch"] == {"error": "none"}
    assert row["hardware"]["jax"] == jax.__version__
    table = err.splitlines()
    assert "peak: 100 GFLOP/s, float32 products of 64 rows (jax 100, torch none)" in table[1]
    assert table[-1].split()[:3] == ["resnet20", "8", "2"]


def test_several_steps_in_one_dispatch_are_timed_by_the_step(tiny, capfd):
    train_step.main([*tiny, "--steps", "3", "--steps-per-dispatch", "2"])
    row = json.loads(capfd.readouterr().out)
    assert row["steps_per_dispatch"] == 2
    times = row["step_seconds"]
    assert row["images_per_second"] == pytest.approx(2 / times["median"])
    assert row["program_memory"]["aliased"] > 0


def test_sizes_follow_the_network():
    settings = steps.Settings()
    found = [settings.config(name).batch_size for name in (*settings.models, "resnet18")]
    assert found == [128, 128, 8, 32, 32]
    assert steps.Settings(batch_size=4).config("resnet50").eval_batch_size == 4
    assert type(steps.Settings(optimizer="adam").config("mini").optimizer).__name__ == "Adam"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--models", "resnet21"], "network 'resnet21' is not known (did you mean 'resnet"),
        (["--models"], "--models: expected one or more"),
        (["--models", "mini", "--dtype", "int8"], "dtype 'int8': expected one such as float32"),
        (["--models", "resnet50", "--image-size", "8"], "input is 8x8, the least"),
        (["--steps", "0"], "--steps=0: expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(argv, line, capfd, monkeypatch):
    monkeypatch.setattr(peak, "measured", lambda *_: BEST)
    assert line in line_of_bad_input(train_step.main, argv, capfd)


def test_a_peak_that_cannot_be_measured_is_one_line(monkeypatch, capfd):
    def fails(*_):
        raise workers.WorkerError("jax: too large")

    monkeypatch.setattr(peak, "measured", fails)
    with pytest.raises(SystemExit):
        eval_step.main(["--models", "mini"])
    error = capfd.readouterr().err
    assert error.startswith("error: the machine's peak cannot be measured in float32 on the cpu: ")
    assert error.endswith("jax: too large\n")
