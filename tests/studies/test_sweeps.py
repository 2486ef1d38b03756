import csv
import dataclasses
import json
import os
import signal
import threading
import time

import jax
import pytest
from helpers import tiny_resnet

from flax_resnet.data.config import DataConfig
from flax_resnet.errors import UserError
from flax_resnet.optim.optimizers import SGD
from flax_resnet.studies import sweeps, tables
from flax_resnet.studies.grids import grid
from flax_resnet.studies.sweeps import train_seeds
from flax_resnet.training import loop
from flax_resnet.training.config import TrainConfig


@pytest.fixture
def base(digits_dir):
    return TrainConfig(
        model=tiny_resnet(num_filters=4),
        data=DataConfig(data_dir=digits_dir),
        optimizer=SGD(learning_rate=0.05),
        batch_size=96,
        eval_batch_size=400,
        num_steps=3,
    )


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *a, d=jax.devices()[:1]: d)


def test_a_sweep_leaves_a_table_and_skips_what_is_finished(base, tmp_path, one_device, capsys):
    configs = grid(base, {"model.connection": ("plain", "residual")}, seeds=2)
    rows = sweeps.sweep(configs, tmp_path, baseline="connection=plain")
    assert [row["workdir"] for row in rows] == list(configs)
    for row in rows:
        result = json.loads((tmp_path / row["workdir"] / "result.json").read_text())
        assert {k: row[k] for k in tables.RESULTS} == {k: result[k] for k in tables.RESULTS}
        assert row["model.connection"] == configs[row["workdir"]].model.connection
        assert row["state"] == "finished"
    with (tmp_path / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert (tmp_path / "table.md").read_text() == tables.markdown(rows, "connection=plain")
    starts = (tmp_path / "connection=plain/seed0/config.json").read_text()
    capsys.readouterr()
    assert sweeps.sweep(configs, tmp_path) == rows
    assert (tmp_path / "connection=plain/seed0/config.json").read_text() == starts


def test_a_failed_run_leaves_the_others_alone_and_is_tried_again(
    base, tmp_path, one_device, capsys
):
    bad = dataclasses.replace(base, data=DataConfig(folder=str(tmp_path / "nowhere")))
    configs = {"bad/seed0": bad, "good/seed0": base}
    rows = sweeps.sweep(configs, tmp_path / "s")
    assert [row["state"][:6] for row in rows] == ["failed", "finish"]
    assert "nowhere" in rows[0]["state"]
    assert "bad/seed0: failed: " in capsys.readouterr().out
    trace = tmp_path / "s" / "failures" / "bad-seed0.txt"
    assert "Traceback" in trace.read_text()
    assert "bad | 0 of 1" in (tmp_path / "s" / "table.md").read_text()
    rows = sweeps.sweep({**configs, "bad/seed0": dataclasses.replace(base, seed=5)}, tmp_path / "s")
    assert [row["state"] for row in rows] == ["finished"] * 2
    assert not trace.exists()


@pytest.mark.slow
def test_runs_are_shared_by_the_devices(base, tmp_path, monkeypatch):
    used = []
    set_up = loop.set_up

    def spy(config, workdir, mesh):
        used.append((workdir.parent.parent.name, *mesh.devices.flat))
        return set_up(config, workdir, mesh)

    monkeypatch.setattr(loop, "set_up", spy)
    configs = grid(base, {"optimizer.learning_rate": (0.05, 0.1)})
    rows = sweeps.sweep(configs, tmp_path / "two", devices=jax.devices()[2:4])
    alone = sweeps.sweep(configs, tmp_path / "one", devices=jax.devices()[:1])
    assert {u for u in used if u[0] == "one"} == {("one", jax.devices()[0])}
    assert {u for u in used if u[0] == "two"} == {("two", d) for d in jax.devices()[2:4]}
    for a, b in zip(rows, alone, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert len({row["loss"] for row in rows}) == 2
    assert [row["variant"] for row in rows] == [row["variant"] for row in alone]


@pytest.mark.slow
def test_seeds_train_together_and_in_turn_to_the_same_table(base, tmp_path, one_device):
    together = sweeps.sweep(grid(base, {}, 2), tmp_path / "together", together=True)
    in_turn = sweeps.sweep(grid(base, {}, 2), tmp_path / "in_turn", together=False)
    for a, b in zip(together, in_turn, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert (a["variant"], a["state"], a["workdir"]) == (b["variant"], b["state"], b["workdir"])
    assert not (tmp_path / "together" / "together").exists()


def test_names_and_baselines_are_checked(base, tmp_path):
    with pytest.raises(UserError, match="a run is called 'x': expected VARIANT/seedN"):
        sweeps.sweep({"x": base}, tmp_path)
    with pytest.raises(UserError, match=r"baseline='aa' is none of 1 variants \(did you mean 'a'"):
        sweeps.sweep({"a/seed0": base}, tmp_path, baseline="aa")


def test_num_seeds_on_a_cpu_runs_them_in_turn(base, tmp_path, one_device):
    results = train_seeds(dataclasses.replace(base, seed=3), tmp_path / "w", 2)
    assert len(results) == 2
    records = [json.loads((tmp_path / f"w/seed{s}/config.json").read_text()) for s in (3, 4)]
    assert [r["config"]["seed"] for r in records] == [3, 4]
    assert [int(row["seed"]) for row in tables.read(tmp_path / "w")] == [3, 4]
    assert [float(row["loss"]) for row in tables.read(tmp_path / "w")] == [
        r["loss"] for r in results
    ]


@pytest.mark.slow
def test_a_sweep_that_is_stopped_on_several_devices_stops_them_all(base, tmp_path):
    configs = grid(dataclasses.replace(base, num_steps=2000), {}, 2)

    def interrupt():
        while not list(tmp_path.glob("base/seed*/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep(configs, tmp_path, devices=jax.devices()[:2])
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("sweep") for name in names), names
    assert not list(tmp_path.glob("base/seed*/result.json"))


def test_streamed_seeds_are_trained_in_turn_and_one_that_fails_is_one(base, tmp_path, one_device):
    """As accelerators would by themselves: together where they can."""
    streamed = dataclasses.replace(base, data=dataclasses.replace(base.data, resident_mb=0))
    configs = grid(streamed, {}, 2)
    other = sweeps._Sweep(configs, tmp_path, None, None, parallel=False)
    (tmp_path / "base/seed1").mkdir(parents=True)
    (tmp_path / "base/seed1/config.json").write_text("{}")
    other.run(list(configs), None)
    states = {row["seed"]: row["state"] for row in other.write()}
    assert states[0] == "finished"
    assert "is not a run's record" in states[1]


def test_a_varied_loss_keeps_its_column(base, tmp_path, one_device):
    configs = grid(base, {"loss": ("cross_entropy", "binary_cross_entropy")})
    rows = sweeps.table_rows(configs, tmp_path, {})
    assert [row["config.loss"] for row in rows] == ["cross_entropy", "binary_cross_entropy"]
    assert [row["loss"] for row in rows] == ["", ""]
