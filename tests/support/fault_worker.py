"""A small run in a process of its own, which says in a shared file what it is doing."""

import os
import pathlib
import sys

from flax_resnet import models
from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.cli import experiment
from flax_resnet.data import augment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed import watchdog
from flax_resnet.optim import optimizers
from flax_resnet.training import config

# A process is forked from one that has imported all this, so that fifty start in little time.

PHASES = ["starting", watchdog.WAITING, watchdog.STEP, watchdog.EVALUATING, watchdog.SAVING]


def get_config() -> config.TrainConfig:
    """Everything random on; 300 steps, a checkpoint every five, an evaluation every twenty."""
    return config.TrainConfig(
        model=models.ResNet((1,), models.BasicBlock, num_classes=10, num_filters=4,
                            stem="cifar", dropout_rate=0.1),
        data=DataConfig(data_dir=os.environ["FAULTS_DATA"]),
        augment=augment.Augment(width_shift=0.1, cutout=2, mixup=0.2),
        optimizer=optimizers.Adam(schedule=optimizers.Cosine(warmup=0.2)),
        batch_size=72,
        eval_batch_size=10,
        num_steps=300,
        eval_every_epochs=1,
        ema_decay=0.9,
        log_every_steps=7,
        checkpoint=CheckpointConfig(every_steps=5),
    )  # fmt: skip


def train(
    workdir: str, phase_file: str, environment: dict[str, str], log: str, *flags: str
) -> None:
    """Trains in ``workdir``; byte 0 of ``phase_file`` is the index of the phase it is in."""
    os.environ.update(environment)
    import jax

    # Its variables were read when jax was imported, in the process that this one is forked from.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    phase = os.open(phase_file, os.O_RDWR | os.O_CREAT)
    os.pwrite(phase, b"\0", 0)
    at = watchdog.Watch.at

    def telling(self, name, step):
        os.pwrite(phase, bytes([PHASES.index(name) if name in PHASES else 0]), 0)
        at(self, name, step)

    watchdog.Watch.at = telling
    sys.argv = ["worker"]
    experiment.main(get_config, workdir, [*flags])


def newest(workdir: pathlib.Path) -> int:
    """The newest sealed step, 0 where there is none."""
    steps = [int(p.parent.name) for p in workdir.glob("checkpoints/*/SEALED.json")
             if p.parent.name.isdecimal()]  # fmt: skip
    return max(steps, default=0)


if __name__ == "__main__":
    experiment.main(get_config, "runs/faults")
