import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import UNIT_STATS, assert_trees_equal, max_difference, random_batch, tiny_resnet

from flax_resnet.data.config import DataConfig
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training import setup
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.step import create_state, train_step

DROPS = tiny_resnet(num_filters=4, dropblock_rate=0.2, dropblock_size=2)


@pytest.fixture
def config(digits_dir):
    return TrainConfig(
        model=DROPS, data=DataConfig(data_dir=digits_dir), batch_size=96, num_steps=80
    )


def rate_of(config, tmp_path, mesh):
    """The step's DropBlock schedule."""
    return setup.set_up(config, tmp_path, mesh).programs.steps()[0].keywords["dropblock_rate"]


def test_the_tutorials_dropblock_rate_rises_by_0005_an_epoch(config, tmp_path, mesh):
    rising = dataclasses.replace(config, dropblock_rise=0.5)
    rate = rate_of(rising, tmp_path, mesh)
    # 40 of the 80 "epochs" to a keep probability of 0.80.
    np.testing.assert_allclose([1 - rate(k) for k in range(41)], 1 - 0.005 * np.arange(41), 1e-6)
    assert [float(rate(k)) for k in (40, 41, 79)] == pytest.approx([0.2] * 3)
    assert rate_of(config, tmp_path, mesh) is None


def test_the_schedule_is_what_the_network_drops_by(rng):
    batch = random_batch(rng, 8)
    tx, _ = SGD().build(10, 5)
    create = functools.partial(create_state, tx=tx, seed=0, image_shape=(8, 8, 3))
    state = create(DROPS, normalization=UNIT_STATS)
    stepped = jax.jit(functools.partial(train_step, dropblock_rate=lambda step: 0.2 * step))
    at_0, _ = stepped(state, batch)
    without, _ = jax.jit(train_step)(
        state.replace(apply_fn=DROPS.clone(dropblock_rate=0.0).apply), batch
    )
    assert_trees_equal(at_0.params, without.params)
    later = state.replace(step=jax.numpy.int32(1))
    at_1, _ = stepped(later, batch)
    throughout, _ = jax.jit(train_step)(later, batch)
    assert max_difference(at_1.params, throughout.params) < 1e-6
    assert max_difference(at_1.params, at_0.params) > 1e-4
