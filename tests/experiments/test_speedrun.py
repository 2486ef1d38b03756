"""The speed runs: recipes in numbers, lookahead, and a tiny one that is resumed to the bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_equal, speed_gradients
from run_helpers import saved

from experiments import cifar10_speedrun
from experiments.speedrun import SpeedNet, SpeedSGD, Triangle
from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.cli import flags
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.preemption import Preempted
from flax_resnet.errors import UserError
from flax_resnet.optim.optimizers import SGD, decoupled
from flax_resnet.records.configs import from_record, to_record
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.training.step import TrainState, look_ahead


@pytest.mark.parametrize(
    ("target", "steps", "peak", "decay", "bias_steps", "top", "last"),
    [
        # peak: lr / (1 + 1 / 0.15); decay: wd / lr; the schedule's corner at int(share * steps).
        (94, 476, 1.5, 0.0153 / 11.5, 144, 109, 0.07 + 0.93 / 367),
        (95, 720, 1.304348, 0.00153, 144, 165, 0.07 + 0.93 / 555),
        (96, 1776, 1.173913, 0.012 / 9, 144, 177, 1 / 1599),
    ],
)
def test_recipes(target, steps, peak, decay, bias_steps, top, last):
    config = cifar10_speedrun.get_config(target)
    optimizer = config.optimizer
    assert (config.num_steps, config.batch_size, config.label_smoothing) == (steps, 1024, 0.2)
    assert optimizer.learning_rate == pytest.approx(peak, rel=1e-5)
    assert optimizer.weight_decay == pytest.approx(decay)
    assert (optimizer.momentum, optimizer.nesterov, optimizer.norm_bias_scale) == (0.85, True, 64)
    assert round(optimizer.stem_bias_until * steps) == pytest.approx(bias_steps, abs=1)
    schedule = optimizer.schedule.build(1.0, steps)
    found = [float(schedule(step)) for step in (0, top, steps - 1)]
    np.testing.assert_allclose(found, [0.2, 1.0, last], rtol=1e-4)
    assert config.ema_decay == pytest.approx(0.7737809)
    assert (config.lookahead_steps, config.tta) == (5, "flip_shift")
    shift = 4 if target == 96 else 2
    assert (config.augment.pad_crop, config.augment.pad_mode) == (shift, "reflect")
    assert config.augment.cutout == (12 if target == 96 else 0)
    assert config.augment.alternating_flip


def test_flags_reach_what_is_the_speed_runs_own():
    words = ["--optimizer.schedule.rise", "0.5", "--optimizer.stem-bias-until", "0.25"]
    asked = flags.parse(cifar10_speedrun.get_config(), "runs/x", words).config
    assert asked.optimizer == dataclasses.replace(
        cifar10_speedrun.get_config().optimizer, stem_bias_until=0.25,
        schedule=Triangle(start=0.2, rise=0.5, final=0.07),
    )  # fmt: skip
    assert isinstance(asked.model, SpeedNet)
    other = flags.parse(asked, "runs/x", ["--optimizer", "sgd"]).config
    assert other.optimizer == SGD(schedule=asked.optimizer.schedule)


def test_records_of_older_speed_runs_are_read():
    """The classes were flax_resnet's then, and the stem's bias a field of every optimizer."""
    config = cifar10_speedrun.get_config()
    record = to_record(config)
    record["model"]["class"] = "flax_resnet.models.speed:SpeedNet"
    record["optimizer"]["class"] = "flax_resnet.optim:SGD"
    record["optimizer"]["schedule"]["class"] = "flax_resnet.schedules:Triangle"
    assert from_record(record) == config
    record["optimizer"]["class"] = "flax_resnet.optim:Muon"
    with pytest.raises(UserError, match=r"no field 'stem_bias_until' any more.* write 1.0 there"):
        from_record(record)


def test_other_targets_are_refused():
    with pytest.raises(UserError, match="--target 93: expected one of 94, 95, 96"):
        cifar10_speedrun.get_config(93)


def test_the_speed_runs_optimizer_is_torchs_with_groups_of_parameters(rng):
    """airbench in numpy: a rate and a decay for each group, decay / rate in the gradient."""
    steps, batch, momentum = 10, 64, 0.85
    fields = decoupled(11.5, 0.0153, momentum, batch)
    sgd = SpeedSGD(
        **fields, nesterov=True, decay_norm_and_bias=True, norm_bias_scale=64.0,
        stem_bias_until=0.3, schedule=Triangle(),
    )  # fmt: skip
    params, grads = speed_gradients(rng, steps)
    tx, _ = sgd.build(steps, 5)
    state, got = tx.init(params), jax.tree.map(jnp.asarray, params)
    update = jax.jit(tx.update)
    kilo = 1024 * (1 + 1 / (1 - momentum))
    decay = 0.0153 * batch / kilo
    want, velocity = params, jax.tree.map(np.zeros_like, params)
    for step, grad in enumerate(grads):
        delta, state = update(grad, state, got, value=0.0)
        got = optax.apply_updates(got, delta)
        # airbench's gradient is of the sum over the batch: the mean's times the batch.
        shape = 0.2 + 0.8 * step / 2 if step < 2 else 1 - 0.93 * (step - 2) / 8

        def move(path, p, v, g, step=step, shape=shape):
            names = [key.key for key in path]
            rate = 11.5 / kilo * (64 if names[-2] == "norm1" else 1)
            g = batch * g + decay / rate * p
            v = momentum * v + g
            if names[-2] == "stem_conv" and step >= 3:
                return p, v
            return p - shape * rate * (g + momentum * v), v

        both = jax.tree_util.tree_map_with_path(move, want, velocity, grad)
        is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
        want = jax.tree.map(lambda x: x[0], both, is_leaf=is_pair)
        velocity = jax.tree.map(lambda x: x[1], both, is_leaf=is_pair)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_lookahead_is_the_loop_written_out(rng):
    every, decay, steps = 3, 0.8, 9
    moves = rng.normal(size=(steps, 2)).astype(np.float32)
    now = {"params": {"w": jnp.zeros(2), "still": jnp.full(2, 0.1)}, "batch_stats": {}}
    state = TrainState(
        step=jnp.int32(0), apply_fn=None, tx=optax.identity(), opt_state=(), key=None,
        normalization=None, ema=now, **now,
    )  # fmt: skip
    fast, slow = np.zeros(2), np.zeros(2)
    meet = jax.jit(lambda state: look_ahead(state, every=every, decay=decay, num_steps=steps))
    for step, move in enumerate(moves, 1):
        params = {**state.params, "w": state.params["w"] + move}
        state = meet(state.replace(step=jnp.int32(step), params=params))
        fast = fast + move
        if step % every == 0:
            keep = decay * (step / steps) ** 3
            slow = keep * slow + (1 - keep) * fast
            fast = slow
        np.testing.assert_allclose(state.params["w"], fast, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.ema["params"]["w"], slow, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.params["still"], np.full(2, 0.1, np.float32))


@pytest.fixture
def config(image_folder):
    """The recipe of 96, shrunk: one narrow stage on 8x8 images, 12 steps of 4 an epoch."""
    config = cifar10_speedrun.get_config(96)
    return dataclasses.replace(
        config,
        model=SpeedNet(num_classes=2, stage_filters=(8,), stage_convs=3, residual=True),
        data=DataConfig(folder=str(image_folder)),
        augment=dataclasses.replace(config.augment, cutout=3, pad_crop=2),
        checkpoint=CheckpointConfig(every_steps=4),
        batch_size=8,
        eval_batch_size=8,
        num_steps=12,
        log_every_steps=4,
    )


@pytest.mark.slow
def test_a_resumed_speed_run_equals_an_unbroken_one(config, tmp_path, mesh):
    """Several steps a dispatch after the stop."""
    want = train_and_evaluate(config, tmp_path / "whole", mesh=mesh, quiet=True)
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 7

    with pytest.raises(Preempted):
        train_and_evaluate(config, tmp_path / "broken", mesh=mesh, quiet=True, stop=stop)
    grouped = dataclasses.replace(config, steps_per_dispatch=4)
    got = train_and_evaluate(grouped, tmp_path / "broken", mesh=mesh, quiet=True)
    assert_trees_equal(saved(tmp_path / "broken")[0], saved(tmp_path / "whole")[0])
    timeless = lambda result: {k: v for k, v in result.items() if "seconds" not in k}  # noqa: E731
    assert timeless(got) == timeless(want)
    parts = [got[f"{part}_seconds"] for part in ("train", "eval", "compile")]
    assert min(parts) > 0
    assert sum(parts) < got["seconds"]


def test_runs_are_summed_up_with_compilation_apart(tmp_path, capsys, monkeypatch):
    results = [
        {"top1": top1, "start_seconds": 1.0, "train_seconds": 2.0, "eval_seconds": 0.5,
         "compile_seconds": seconds} for top1, seconds in ((0.94, 60.0), (0.96, 1.0), (0.95, 3.0))
    ]  # fmt: skip
    monkeypatch.setattr(cifar10_speedrun, "main", lambda *_, **__: results)
    cifar10_speedrun.command(["--workdir", str(tmp_path)])
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert (runs["n"], runs["top1"]["first"]) == (3, 0.94)
    assert (runs["top1"]["mean"], runs["top1"]["deviation"]) == pytest.approx((0.95, 0.01))
    assert (runs["compile_seconds"]["first"], runs["compile_seconds"]["mean"]) == (60.0, 2.0)
    assert "top1: 0.9500 ± 0.0100, the first 0.9400" in capsys.readouterr().out
