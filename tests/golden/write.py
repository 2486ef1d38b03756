"""Writes the golden runs: what commit c4826e5 left on disk, which every later version must read.

Command, in a checkout of that commit: python /path/to/tests/golden/write.py DEST

``finished`` is a whole run of a small network on the digits, with an average of the parameters;
``stopped`` is the same run, stopped in its third epoch, between two lines of its log.
``repository`` is what that commit pushes to the Hugging Face hub, model card and all;
evaluation.json and prediction.json hold what its commands say of ``finished``.
"""

import contextlib
import os
import pathlib
import sys

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from flax_resnet import SGD, Augment, CheckpointConfig, Cosine, ResNet, TrainConfig
from flax_resnet.command import command
from flax_resnet.data import DataConfig
from flax_resnet.hub import write_repository
from flax_resnet.preemption import Preempted
from flax_resnet.train import train_and_evaluate

STOP = 60  # counts steps and batches of an evaluation: after step 54, 23 steps make an epoch
OF = ["--weights", "finished"]


def golden_config() -> TrainConfig:
    """Two small stages, an average, dropout and augmentation: all that a checkpoint can hold."""
    return TrainConfig(
        model=ResNet(stage_sizes=(1, 1), num_filters=4, stem="cifar", dropout_rate=0.1),
        data=DataConfig(),
        augment=Augment(rotation=10.0, width_shift=0.1, height_shift=0.1),
        optimizer=SGD(learning_rate=0.1, schedule=Cosine(), weight_decay=1e-4),
        num_epochs=5,
        batch_size=64,
        eval_batch_size=128,
        log_every_steps=7,
        ema_decay=0.95,
        checkpoint=CheckpointConfig(keep_last=1, keep_best=1),
    )


def main(dest: pathlib.Path) -> None:
    """Trains both, and measures the finished one."""
    dest.mkdir(parents=True)
    os.chdir(dest)  # the records name relative places only
    asked = iter(range(1, 10**6))
    with contextlib.suppress(Preempted):
        train_and_evaluate(golden_config(), "stopped", stop=lambda: next(asked) >= STOP)
    train_and_evaluate(golden_config(), "finished")
    Image.fromarray((15.9 * load_digits().images[0]).astype(np.uint8)).save("zero.png")
    command(["evaluate", *OF, "--output", "evaluation.json"])
    command(["predict", "zero.png", *OF, "--format", "json", "--output", "prediction.json"])
    write_repository("finished", "someone/digits", "repository", license="apache-2.0")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
