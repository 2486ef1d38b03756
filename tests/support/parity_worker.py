"""Trains five steps in each of some ways, and keeps the numbers: parity_worker.py OUT WAY ..."""

import contextlib
import os
import pathlib
import sys

import jax
import numpy as np

from experiments.speedrun import SpeedNet
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed import hosts, sharding
from flax_resnet.models import BasicBlock, ResNet
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training import setup
from flax_resnet.training.config import TrainConfig

# name: (dtype, steps, split, accum_steps, MiB that may live on the device, BatchNorm groups,
# steps in a dispatch)
WAYS = {
    "plain": ("float64", 5, "replicated", 1, 2048, None, 1),
    "plain, accumulated": ("float64", 5, "replicated", 2, 2048, None, 1),
    "fsdp": ("float64", 5, "fsdp", 1, 2048, None, 2),
    "fsdp, accumulated, streamed": ("float64", 5, "fsdp", 2, 0, None, 2),
    "groups, zero": ("float64", 5, "zero", 1, 2048, 8, 1),
    "float32": ("float32", 1, "replicated", 1, 2048, None, 1),
    "whitened": ("float32", 1, "replicated", 1, 2048, None, 1),
}


def run(name: str, out: pathlib.Path) -> None:
    """Writes OUT/NAME.npz: the state's arrays after the steps, and the evaluation."""
    dtype, steps, split, accum_steps, resident_mb, group, at_once = WAYS[name]
    model: ResNet | SpeedNet
    model = ResNet((1,), BasicBlock, num_classes=10, num_filters=8, stem="cifar", dtype=dtype,
                   param_dtype=dtype, bn_group=group)  # fmt: skip
    if name == "whitened":
        model = SpeedNet(num_classes=10, stage_filters=(8,))
    config = TrainConfig(
        model=model,
        data=DataConfig(data_dir=os.environ["FAULTS_DATA"], resident_mb=resident_mb, num_workers=0),
        augment=Augment(width_shift=0.1, cutout=2, mixup=0.2),
        optimizer=SGD(weight_decay=1e-3, max_grad_norm=1.0),
        measure_norms=name in ("plain", "fsdp"),
        batch_size=64,
        eval_batch_size=120,
        num_steps=steps,
        accum_steps=accum_steps,
        sharding=split,
        ema_decay=0.9,
        steps_per_dispatch=at_once,
    )
    mesh = sharding.data_mesh()
    here = setup.set_up(config, out / "nowhere", mesh)
    step, evaluate, _ = here.programs.compile(here.dispatch_lengths)
    for batch in here.dispatches():
        here.state, _ = step(here.state, batch)
    here.evaluate(evaluate)
    whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))
    arrays = jax.device_get(whole(here.state.arrays()))
    if sharding.is_lead():
        leaves = {
            jax.tree_util.keystr(k): x for k, x in jax.tree_util.tree_leaves_with_path(arrays)
        }
        np.savez(out / f"{name}.npz", **leaves, **here.evaluation, confusion=here.confusion)


def main() -> None:
    """The named ways, in this process or as one of several."""
    out, ways = pathlib.Path(sys.argv[1]), sys.argv[2:]
    with hosts.joined(hosts.Hosts()):
        own = np.full(2, jax.process_index(), np.float32)
        np.testing.assert_array_equal(sharding.leads(own), np.zeros(2, np.float32))
        for name in ways:
            with jax.enable_x64(True) if WAYS[name][0] == "float64" else contextlib.nullcontext():
                run(name, out)


if __name__ == "__main__":
    main()
