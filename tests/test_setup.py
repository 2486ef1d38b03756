import dataclasses

import pytest
from helpers import assert_trees_equal, max_difference, tiny_resnet

from flax_resnet import setup
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig


@pytest.fixture
def config(digits_dir):
    model = tiny_resnet(num_filters=4)
    return TrainConfig(
        model=model, data=DataConfig(data_dir=digits_dir), batch_size=96, num_steps=80
    )


def test_every_seed_starts_as_a_run_of_its_own(config, tmp_path, mesh):
    here = setup.prepare(config, tmp_path, mesh)
    other = setup.prepare(dataclasses.replace(config, seed=7), tmp_path, mesh)
    assert_trees_equal(here.start(7).params, other.state.params)
    assert max_difference(here.state.params, other.state.params) > 0.01
