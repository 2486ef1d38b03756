"""The state split over devices gives the numbers that a whole one does; runs move between both."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import max_difference, tiny_resnet

from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import split_shardings
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training import setup
from flax_resnet.training.config import TrainConfig


@pytest.fixture
def config(digits_dir):
    return TrainConfig(
        model=tiny_resnet(num_filters=8),
        data=DataConfig(data_dir=digits_dir),
        augment=Augment(width_shift=0.1, mixup=0.2),
        optimizer=SGD(weight_decay=1e-3, max_grad_norm=1.0),
        batch_size=64,
        eval_batch_size=400,
        num_steps=5,
        log_every_steps=5,
        ema_decay=0.9,
    )


def test_the_largest_even_axis_is_split_the_last_of_equal_ones(meshes):
    shapes = {"a": (3, 3, 16, 32), "b": (8, 8), "c": (3, 5), "d": (64,), "e": (16, 3), "f": ()}
    tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = {name: tuple(s.spec) for name, s in split_shardings(meshes[1], tree).items()}
    assert specs == {
        "a": (None, None, None, "data"),
        "b": (None, "data"),
        "c": (),
        "d": (),
        "e": ("data", None),
        "f": (),
    }


def share(tree):
    """Bytes of a tree on the first device over all of its bytes."""
    leaves = jax.tree.leaves(tree)
    mine = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    return mine / sum(x.nbytes for x in leaves)


@pytest.mark.parametrize(
    ("kind", "accum_steps"), [pytest.param("zero", 1, marks=pytest.mark.slow), ("fsdp", 2)]
)
def test_split_and_whole_states_agree_to_1e_10_in_x64_after_5_steps(
    config, tmp_path, meshes, kind, accum_steps
):
    with jax.enable_x64(True):
        model = config.model.clone(dtype="float64", param_dtype="float64")
        config = dataclasses.replace(config, model=model, accum_steps=accum_steps)
        states, evaluations = {}, {}
        for how, mesh in [("replicated", meshes[0]), (kind, meshes[1])]:
            run = setup.set_up(dataclasses.replace(config, sharding=how), tmp_path / how, mesh)
            step, evaluate, _ = run.programs.compile(run.dispatch_lengths)
            for batch in run.dispatches():
                run.state, _ = step(run.state, batch)
            run.evaluate(evaluate)
            states[how], evaluations[how] = run.state.arrays(), run.evaluation
        for name in ("params", "batch_stats", "ema", "opt_state"):
            assert max_difference(states[kind][name], states["replicated"][name]) < 1e-10, name
        assert evaluations[kind] == pytest.approx(evaluations["replicated"], rel=1e-10)
    assert share(states[kind]["opt_state"]) < 0.2
    assert share(states[kind]["ema"]["params"]) < 0.2
    parameters = share(states[kind]["params"])
    assert parameters == 1 if kind == "zero" else parameters < 0.2
