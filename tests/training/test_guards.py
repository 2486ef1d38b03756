import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_resnet
from run_helpers import saved

from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.preemption import Preempted
from flax_resnet.errors import UserError
from flax_resnet.optim.optimizers import SGD, ReduceOnPlateau
from flax_resnet.training import guards
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.guards import Diverged, Guard, all_finite, check_loss
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.training.step_programs import StepPrograms, step_memory


def sums(*losses, count=4):
    return [{"loss": np.float32(x) * count, "count": np.int32(count)} for x in losses]


def test_the_limit_is_in_times_of_guessing():
    assert Guard().limit("cross_entropy", 10, 0.1) == pytest.approx(100 * math.log(10))
    assert Guard(times_chance=3).limit("binary_cross_entropy", 10, 0.1) == 3 * math.log(2)
    assert Guard().limit("cross_entropy", 10, 30_000.0) == 3_000_000
    assert Guard().limit("cross_entropy", 10, None) == math.inf


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((1, 2, math.nan, 1), "nan nats at step 8"),
        ((1, math.inf, math.nan), "inf nats at step 8"),
        ((1, 1, 1, 900), "900 nats at step 9"),
    ],
)
def test_the_first_bad_step_is_named(losses, message):
    with pytest.raises(Diverged, match=message):
        check_loss(sums(*losses), 9, 200.0)


def test_one_bad_batch_of_many_is_no_divergence_nor_one_network_of_several():
    check_loss(sums(1, 1, 300, 1), 4, 200.0)
    together = [{"loss": np.array([4.0, math.nan]), "count": np.array([4, 4])}]
    check_loss(together, 1, 200.0)
    with pytest.raises(Diverged):
        check_loss([{"loss": np.full(2, math.nan), "count": np.array([4, 4])}], 1, 200.0)


def test_finiteness_looks_at_every_float():
    tree = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2), jnp.bfloat16)}, "n": jnp.int32(1)}
    assert all_finite(tree)
    tree["b"]["c"] = tree["b"]["c"].at[1, 1].set(jnp.inf)
    assert not all_finite(tree)


def test_out_of_memory_names_the_batch_and_the_levers():
    levers = "a larger --accum-steps .* --model.remat .* bfloat16, --sharding fsdp .* or a smaller"
    said = f"out of memory: batch_size=256, 16 images at once on each of 8 devices; set {levers}"
    config, eight = TrainConfig(batch_size=256, accum_steps=2), types.SimpleNamespace(size=8)
    with pytest.raises(UserError, match=said), step_memory(config, eight):
        jnp.zeros((1 << 50,), jnp.float32).block_until_ready()
    said = "out of this machine's memory: take fewer --data"
    with pytest.raises(UserError, match=said), guards.memory_advice("x"):
        raise MemoryError
    with pytest.raises(jax.errors.JaxRuntimeError), guards.memory_advice("x"):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: x")


@pytest.fixture
def config(digits_dir):
    return TrainConfig(
        model=tiny_resnet(num_filters=4),
        data=DataConfig(data_dir=digits_dir),
        optimizer=SGD(0.05),
        batch_size=64,
        eval_batch_size=400,
        num_steps=20,
        log_every_steps=2,
        checkpoint=CheckpointConfig(every_steps=5, keep_last=9),
    )


@pytest.fixture
def after_steps(monkeypatch):
    """Sets a function of what every training step gives, whose result it gives instead."""

    def set_to(change):
        steps = StepPrograms.steps

        def changed(self):
            step, evaluate = steps(self)
            return lambda state, batch: change(*step(state, batch)), evaluate

        monkeypatch.setattr(StepPrograms, "steps", changed)

    return set_to


def nan_from(step):
    """The loss and the parameters are no numbers after so many steps."""

    def change(state, sums):
        lost = jnp.where(state.step == step, jnp.nan, 0.0)
        params = jax.tree.map(lambda x: x + lost, state.params)
        return state.replace(params=params), {**sums, "loss": sums["loss"] + lost}

    return change


def hundredfold(state, sums):
    return state, {**sums, "loss": sums["loss"] * jnp.where(state.step < 9, 1, 500)}


def infinite_parameters(state, sums):
    lost = jnp.where(state.step == 5, jnp.inf, 0.0)
    return state.replace(params=jax.tree.map(lambda x: x + lost, state.params)), sums


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            nan_from(13),
            r"the run diverged: the training loss is nan nats at step 13; checkpoints: the last "
            r"good one is 10, in .*/w/checkpoints. Lower --optimizer.learning-rate or set ",
        ),
        (nan_from(1), r"step 1; checkpoints: no checkpoint was saved before"),
        (hundredfold, r"loss is 1\d\d\d nats at step 9; .* good one is 5"),
        (infinite_parameters, "the parameters are not finite any more at step 5"),
    ],
)
def test_a_run_that_diverges_stops_before_it_is_saved(
    config, tmp_path, mesh, after_steps, change, message
):
    after_steps(change)
    with pytest.raises(Diverged, match=message):
        train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    if "good one is 10" in message:
        state, meta = saved(tmp_path / "w")
        assert meta["step"] == 10
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))


def test_a_plateaus_infinite_best_loss_is_no_divergence(config, tmp_path, mesh):
    plateau = SGD(0.05, schedule=ReduceOnPlateau())
    early = dataclasses.replace(config, optimizer=plateau, num_steps=3)
    with pytest.raises(Preempted):
        train_and_evaluate(early, tmp_path / "w", mesh=mesh, stop=lambda: True)
    assert saved(tmp_path / "w")[1]["step"] == 1
