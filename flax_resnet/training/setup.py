"""From a config to a run that is set up: everything checked and opened, and nothing written yet."""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from flax_resnet import models
from flax_resnet.data.batches import Data
from flax_resnet.distributed import sharding
from flax_resnet.training import checks, features, guards
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.initial_state import fitted, measured, say, starter
from flax_resnet.training.resume import changes, restore
from flax_resnet.training.run import Run
from flax_resnet.training.step_programs import state_sharding


def set_up(config: TrainConfig, workdir: Path, mesh: Mesh) -> Run:
    """Checks and opens everything that a run needs, and writes nothing to the workdir."""
    checks.check_batch(config, mesh)
    advice = (
        "the state, the data set and what is measured before the first step; set "
        "--data.resident-mb 0 (the data set streams), --sharding fsdp or a smaller "
        "--eval-batch-size"
    )
    with guards.memory_advice(advice):
        run = prepare(config, workdir, mesh)
        if not restore(run):
            run.finish_check = run.data.begin_check(say)
            state = measured(config, run.data, run.state)
            run.state, run.progress.start_seconds = fitted(config, run.data, state)
        if config.cache_features:
            run.data = features.with_cached_features(
                run.state, config.model, run.data, config.eval_batch_size, say
            )
            classify = functools.partial(config.model.apply, method="classify")
            run.whole, run.state = run.state, features.top_of(run.state).replace(apply_fn=classify)
    return run


def prepare(config: TrainConfig, workdir: Path, mesh: Mesh) -> Run:
    """The run at step 0, before anything is measured on the data or restored."""
    checks.check_config(config, mesh)
    with_rows = config.augment.alternating_flip
    data = Data(config.data, mesh, config.model.num_classes, with_rows=with_rows)
    steps_per_epoch = math.ceil(data.num_train / config.batch_size)
    num_steps = config.num_steps or max(1, round(config.num_epochs * steps_per_epoch))
    data.check_shared_memory(num_steps, config.batch_size, config.eval_batch_size)
    tx, schedule = config.optimizer.build(num_steps, steps_per_epoch)
    start = starter(config, tx, data.image_shape)
    with contextlib.ExitStack() as stack:
        if config.sharding != "replicated":  # it may not fit one device whole
            with contextlib.suppress(RuntimeError):  # JAX was told to leave the CPU alone
                stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        fresh = start(config.seed)
    state = sharding.put(fresh, state_sharding(fresh, mesh, config.sharding))
    checks.check_shapes(config.model, state, data)
    return Run(config, workdir, mesh, data, num_steps, steps_per_epoch, schedule, state, start)


def _imbalance(data: Data) -> list[str]:
    """A line where the largest class has 10 % more training images than the smallest, or more."""
    train, evaluation = data.class_counts("train"), data.class_counts("eval")
    if train is None or evaluation is None or 10 * train.max() < 11 * train.min():
        return []
    most, least = int(np.argmax(train)), int(np.argmin(train))
    name, share = data.class_names[most], evaluation[most] / evaluation.sum()
    return [
        f"the classes differ in size: {train[most]:,} training images of {name!r}, "
        f"{train[least]:,} of {data.class_names[least]!r}; always guessing {name!r} would score "
        f"{100 * share:.2f} % of the evaluation images"
    ]


def opening_lines(run: Run) -> list[str]:
    """What a run is of (network, data, steps, devices), and what is otherwise than expected."""
    data, devices, config = run.data, run.mesh.devices.flat, run.config
    members, size = math.prod(run.leading_axes), run.programs.group_size
    together, at = f", {size} a dispatch" if size > 1 else "", run.progress.step
    lines = [
        (f"{members} x " if run.members else "")
        + f"{models.network_name(config.model)}, {run.parameters // members:,} parameters; "
        f"{config.data.title}: {data.num_train:,} training and {data.num_eval:,} evaluation "
        "images of "
        f"{data.sizes}, {'resident' if data.resident else 'streamed'}; "
        f"{run.num_steps} steps, {run.steps_per_epoch} an epoch{together}, on {run.mesh.size} x "
        f"{devices[0].device_kind}" + (f"; resumes at step {at}" if at else "")
    ]
    lines += _imbalance(data)
    if changed := changes(run):
        lines.append(changed)
    if size > 1 and set(run.dispatch_lengths) == {1}:
        lines.append(
            f"steps_per_dispatch={size} and never so many steps with nothing logged, "
            "evaluated or saved between them: each is a dispatch of its own"
        )
    return [*lines, *data.notes]
