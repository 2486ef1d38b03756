"""The run that the tests of trackers train."""

import pytest
from helpers import tiny_resnet

from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.data.config import DataConfig
from flax_resnet.optim.optimizers import Adam
from flax_resnet.training.config import TrainConfig


@pytest.fixture(scope="module")
def config(digits_dir):
    return TrainConfig(
        model=tiny_resnet(),
        data=DataConfig(data_dir=digits_dir),
        optimizer=Adam(),
        batch_size=360,
        eval_batch_size=200,
        num_steps=12,
        log_every_steps=3,
        checkpoint=CheckpointConfig(every_steps=6),
    )
