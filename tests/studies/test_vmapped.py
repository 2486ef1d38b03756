import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, max_difference, tiny_resnet
from run_helpers import saved, timeless

from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.errors import UserError
from flax_resnet.optim.optimizers import SGD, Cosine, ReduceOnPlateau
from flax_resnet.records.run_dir import read_metrics
from flax_resnet.studies import vmapped
from flax_resnet.studies.grids import replaced
from flax_resnet.tracking.run_log import RunLog
from flax_resnet.training import setup
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate

OPTIMIZED = True  # or the grouped convolutions of several networks take their time


def variants(data_dir, dtype="float32"):
    """Four runs that differ by their seed, everything random on."""
    base = TrainConfig(
        model=tiny_resnet(
            num_filters=4, dtype=dtype, param_dtype=dtype, dropblock_rate=0.1, dropblock_size=2
        ),
        data=DataConfig(data_dir=data_dir),
        augment=Augment(rotation=10, cutout=2, mixup=0.2),
        optimizer=SGD(weight_decay=5e-4, schedule=Cosine(warmup=0.2)),
        dropblock_rise=0.5,
        batch_size=32,
        eval_batch_size=400,
        num_steps=5,
        log_every_steps=2,
        ema_decay=0.9,
        checkpoint=CheckpointConfig(every_steps=2),
    )
    return [dataclasses.replace(base, seed=seed) for seed in (0, 1, 2, 9)]


def last_state(run):
    """The state after all of a run's steps."""
    step = run.programs.compile(run.dispatch_lengths).train_step
    for batch in run.dispatches():
        run.state, _ = step(run.state, batch)
    return run.state


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [Cosine(warmup=0.2), ReduceOnPlateau(patience=1, warmup=0.2)],
)
def test_networks_trained_together_equal_runs_of_their_own_in_x64(digits_dir, tmp_path, schedule):
    with jax.enable_x64(True):
        configs = [
            dataclasses.replace(c, optimizer=dataclasses.replace(c.optimizer, schedule=schedule))
            for c in variants(digits_dir, "float64")
        ]
        state = last_state(vmapped.set_up(configs, tmp_path, jax.devices()[:2]))
        assert len(state.step.sharding.device_set) == 2
        for i in (0, 3):
            one = last_state(setup.set_up(configs[i], tmp_path, data_mesh(jax.devices()[:1])))
            for name in ("params", "batch_stats", "ema"):
                here = jax.tree.map(lambda x, i=i: x[i], getattr(state, name))
                assert max_difference(here, getattr(one, name)) < 1e-10


@pytest.fixture
def configs(digits_dir, tmp_path):
    return {tmp_path / f"seed{c.seed}": c for c in variants(digits_dir)[:2]}


@pytest.fixture
def devices():
    return jax.devices()[:1]


@pytest.mark.slow
def test_each_leaves_the_record_of_a_run_of_its_own(configs, tmp_path, devices, mesh, capsys):
    results = vmapped.train_together(configs, tmp_path / "together", devices)
    assert "2 x ResNet" in capsys.readouterr().out
    workdir, config = list(configs.items())[1]
    alone = train_and_evaluate(config, tmp_path / "alone", mesh=mesh)
    assert results[1].keys() == {*alone, "together"}
    assert results[1]["together"] == 2
    assert results[1]["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert json.loads((workdir / "result.json").read_text()) == results[1]
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in workdir.iterdir()} == names
    assert not (tmp_path / "together").exists()
    got, want = (timeless(read_metrics(path)) for path in (workdir, tmp_path / "alone"))
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, abs=2e-3) if a["split"] == "eval" else a.keys() == b.keys()
        if a["split"] == "train":
            assert a["learning_rate"] == pytest.approx(b["learning_rate"])
    state, meta = saved(workdir)
    assert meta["config"]["seed"] == config.seed
    assert np.shape(state["step"]) == ()
    with_it = train_and_evaluate(config, workdir, mesh=mesh)
    assert with_it == results[1]


class Killed(BaseException):
    """No Exception: nothing that survives a failure catches it."""


@pytest.mark.slow
def test_killed_twice_they_end_bit_identical(configs, tmp_path, devices, monkeypatch):
    vmapped.train_together(configs, tmp_path / "together", devices)
    again = {tmp_path / "again" / path.name: config for path, config in configs.items()}
    write, written = RunLog.write, []

    def kill_at(log, *args):
        write(log, *args)
        written.append(1)
        if len(written) in (3, 9):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "write", kill_at)
        for _ in range(2):
            with pytest.raises(Killed):
                vmapped.train_together(again, tmp_path / "again" / "together", devices)
    vmapped.train_together(again, tmp_path / "again" / "together", devices)
    for whole, killed in zip(configs, again, strict=True):
        assert_trees_equal(saved(killed)[0], saved(whole)[0])
        assert timeless(read_metrics(killed)) == timeless(read_metrics(whole))


@pytest.mark.slow
def test_those_that_began_together_go_on_together(configs, tmp_path, devices, monkeypatch, capsys):
    """Where a field that may change does, and where more or fewer are asked for."""
    with monkeypatch.context() as patched:
        patched.setattr(vmapped, "conclude", lambda *a, **k: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            vmapped.train_together(configs, tmp_path / "together", devices)
    (first, config), *_ = configs.items()
    with pytest.raises(UserError, match="seed1 is being trained together with some of these"):
        vmapped.train_together({first: config}, tmp_path / "together", devices)
    changed = {p: dataclasses.replace(c, log_every_steps=1) for p, c in configs.items()}
    capsys.readouterr()
    vmapped.train_together(changed, tmp_path / "together", devices)
    assert "resumes at step 5" in capsys.readouterr().out
    assert [saved(path)[1]["step"] for path in configs] == [5, 5]


@pytest.mark.slow
def test_one_that_was_begun_by_itself_goes_on_by_itself(configs, tmp_path, devices, mesh):
    (path, config), *_ = configs.items()
    taken = iter(range(4))
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config, path, mesh=mesh, stop=lambda: next(taken) == 3)
    before = (path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="seed0 was begun by itself: train it on by itself"):
        vmapped.train_together(configs, tmp_path / "together", devices)
    assert (path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("who", "field", "value", "message"),
    [
        (1, "batch_size", 8, "do not train together: they differ in more than their seed.*turn"),
        (2, "data.resident_mb", 0, "is streamed, and networks that train together need it"),
    ],
)
def test_runs_that_do_not_go_together(configs, tmp_path, devices, who, field, value, message):
    for path in list(configs)[:who]:
        configs[path] = replaced(configs[path], field, value)
    with pytest.raises(UserError, match=message):
        vmapped.train_together(configs, tmp_path / "together", devices)
    assert not any(path.exists() for path in configs)
