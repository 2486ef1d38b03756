"""A tiny run on the digits, trained once a process, that several modules look into."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
from helpers import tiny_resnet

from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate


def tiny_config(data_dir, **fields):
    """24 steps of a net of one block; the evaluation split does not divide into its batches."""
    defaults = TrainConfig(
        model=tiny_resnet(num_filters=4),
        data=DataConfig(name="sklearn_digits", data_dir=data_dir),
        augment=Augment(flip=True, pad_crop=1),
        optimizer=SGD(learning_rate=0.05),
        batch_size=64,
        eval_batch_size=200,
        num_steps=24,
        log_every_steps=4,
        seed=3,
    )
    return dataclasses.replace(defaults, **fields)


@functools.cache
def tiny_run(data_dir):
    """The run's working directory: it is not to be changed."""
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="flax_resnet_inspected_")) / "run <b>&"
    train_and_evaluate(tiny_config(data_dir), workdir, mesh=data_mesh(jax.devices()[:1]))
    return workdir
