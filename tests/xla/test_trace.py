"""Traces of training steps: what they hold, when they end, and that they change no number."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_trees_equal, tiny_resnet
from run_helpers import numbers, saved

from flax_resnet.data.config import DataConfig
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.xla.trace import FIRST_STEPS, traced


def events(directory):
    """[(name, stats)] of the one trace in a directory."""
    (path,) = directory.rglob("*.xplane.pb")
    (other,) = directory.rglob("*.trace.json.gz")
    assert other.stat().st_size > 0
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    return [(e.name, dict(e.stats)) for p in planes for line in p.lines for e in line.events]


def test_a_run_is_traced_and_has_the_same_numbers(digits_dir, tmp_path, mesh, capsys):
    data = DataConfig(data_dir=digits_dir)
    config = TrainConfig(tiny_resnet(), data, batch_size=64, num_steps=8, log_every_steps=1)
    train_and_evaluate(config, tmp_path / "plain", mesh=mesh, quiet=True)
    config = dataclasses.replace(config, profile_steps=2)
    train_and_evaluate(config, tmp_path / "traced", mesh=mesh)
    found = events(tmp_path / "traced" / "profile")
    assert sum(stats.get("hlo_module") == "jit_train_step" for _, stats in found) > 10
    assert [stats["step_num"] for name, stats in found if name == "train"] == [1, 2]
    out = capsys.readouterr().out
    assert re.search(r"profile of 2 steps in .*/traced/profile: tensorboard --logdir ", out)
    assert not (tmp_path / "plain" / "profile").exists()
    assert numbers(tmp_path / "traced") == numbers(tmp_path / "plain")
    assert_trees_equal(saved(tmp_path / "traced")[0], saved(tmp_path / "plain")[0])
    again = train_and_evaluate(dataclasses.replace(config, profile_steps=3), tmp_path / "traced")
    assert again["step"] == 8  # the field is free


step = jax.jit(lambda x: x + 1)


def test_a_trace_ends_where_the_run_does(tmp_path):
    said = []

    def train():
        x = jnp.zeros(3)
        with traced(step, 9, tmp_path, said.append) as taken:
            for _ in range(FIRST_STEPS + 2):
                x = taken(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert [name for name, _ in events(tmp_path)].count("train") == 2
    assert [line.split(" in ")[0] for line in said] == ["profile of 2 steps"]


def test_calls_of_several_steps_are_traced_whole_by_each_process_in_its_directory(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    said, x = [], jnp.zeros(3)
    with traced(step, 5, tmp_path, said.append, steps_of=lambda x: 3) as taken:
        for _ in range(6):
            x = taken(x)
    seen = events(tmp_path / "process1")
    assert [stats["step_num"] for name, stats in seen if name == "train"] == [1, 4]
    assert [line.split(":")[0] for line in said] == [f"profile of 6 steps in {tmp_path}/process1"]


def test_a_run_that_is_too_short_says_so(tmp_path):
    said = []
    with traced(step, 2, tmp_path / "profile", said.append) as taken:
        taken(jnp.zeros(3))
    assert said == ["no profile: the run ended at step 1, and the first 5 are left out"]
    assert not (tmp_path / "profile").exists()
