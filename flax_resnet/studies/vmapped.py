"""Several networks trained by one program: a seed axis in front of the state and of each batch.

The step is that of a single run under ``jax.vmap``, in the one loop. On accelerators a small
network leaves most of the device idle, and S of them take little more time than one; on a CPU
they take longer than one after another (measured: 4 times).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_resnet import tracking
from flax_resnet.checkpoints.checkpoints import Checkpoints
from flax_resnet.distributed import hosts, sharding
from flax_resnet.distributed.watchdog import COMPILING, RECORDING, SETTING_UP
from flax_resnet.errors import UserError
from flax_resnet.records.configs import flatten, to_record, varying_fields
from flax_resnet.records.files import digest
from flax_resnet.records.run_dir import finished, write_json
from flax_resnet.studies.grids import replaced
from flax_resnet.tracking.run_log import RunLogs
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.initial_state import fitted, measured
from flax_resnet.training.loop import conclude, open_log, train_to_end
from flax_resnet.training.resume import check_current, restore
from flax_resnet.training.run import Run
from flax_resnet.training.setup import prepare
from flax_resnet.training.workdir import check_workdir, claimed


class NotTogether(UserError):
    """These runs can only be trained in turn."""


def why_not(configs: Sequence[TrainConfig]) -> str | None:
    """What keeps runs from training together, for a message; None where nothing does."""
    varies = varying_fields([flatten(to_record(config)) for config in configs])
    own = ("checkpoint.directory", "tracking")  # where a run's record goes
    if any(name != "seed" and not name.startswith(own) for name in varies):
        return "they differ in more than their seed"
    first = configs[0]
    for name in ("cache_features", "measure_norms"):
        if getattr(first, name):
            return f"{name} is for one network at a time"
    if first.sharding != "replicated":
        return f"sharding={first.sharding} splits one network over the devices"
    if jax.process_count() > 1:
        return "there are several processes"
    return None


def set_up(
    configs: Sequence[TrainConfig], directory: Path, devices: Sequence[jax.Device] | None = None
) -> Run:
    """Checks and opens everything that the runs need; writes nothing.

    Of ``devices``, by default all, the most that divide the runs evenly are used.
    """
    if reason := why_not(configs):
        raise NotTogether(f"these runs do not train together: {reason}; train them in turn")
    devices = jax.devices() if devices is None else devices
    most = max(n for n in range(1, len(devices) + 1) if len(configs) % n == 0)
    config = replaced(configs[0], "checkpoint.directory", None)
    run = prepare(config, directory, sharding.data_mesh(devices[:most]))
    if not run.data.resident:
        raise NotTogether(
            f"{configs[0].data.title} is streamed, and networks that train together need it on the "
            "device: raise --data.resident-mb, or train them in turn"
        )
    stats = measured(config, run.data, run.state).normalization
    states = []
    for one in configs:
        start = run.start(one.seed).replace(normalization=stats)
        state, seconds = fitted(config, run.data, start)
        states.append(state.arrays())
        run.progress.start_seconds += seconds
    stacked = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(states))
    run.state = run.state.replace(**sharding.put_batch(run.mesh, stacked))
    run.members = tuple(configs)
    restore(run)
    return run


def train_together(
    configs: Mapping[Path, TrainConfig],
    directory: Path,
    devices: Sequence[jax.Device] | None = None,
    *,
    stop: Callable[[], bool] | None = None,
) -> list[dict[str, Any]]:
    """Trains runs that differ by their seed alone in one program.

    Each leaves the record that it would alone, in its own workdir, with the last checkpoint
    (the best evaluation is in its metrics); seconds are its share of the program's. What is
    under way is saved in ``directory``, which goes when all are finished. Finished runs are
    left as they are, and those that began together go on together.

    Args:
      configs: workdir to config; ``batch_size`` is each network's.
      directory: of the common checkpoints; the workdirs lie below its parent.
      devices: to run on, by default all.
      stop: as of ``train_and_evaluate``.

    Returns what each result.json holds; NotTogether where they have to be trained in turn.
    """
    configs = {workdir: check_workdir(workdir, config) for workdir, config in configs.items()}
    groups = {}  # {directory of common checkpoints: its runs}
    for record in sorted(directory.glob("*/members.json")):
        members = [directory.parent / name for name in json.loads(record.read_text())]
        missing = [path for path in members if path not in configs]
        if 0 < len(missing) < len(members):
            raise UserError(
                f"{missing[0]} is being trained together with some of these runs: ask for it too, "
                f"or remove {record.parent} to begin them again"
            )
        if not missing:
            groups[record.parent] = members
    begun = {workdir for members in groups.values() for workdir in members}
    fresh = [path for path in configs if path not in begun and finished(path) is None]
    alone = [path for path in fresh if configs[path].checkpoint.place(path).exists()]
    if alone:
        raise NotTogether(f"{alone[0]} was begun by itself: train it on by itself, in turn")
    if fresh:
        names = [path.relative_to(directory.parent).as_posix() for path in fresh]
        groups[directory / digest(names)[:12]] = fresh
    for own, members in groups.items():
        if not all(map(finished, members)):
            _train_group({path: configs[path] for path in members}, own, devices, stop)
        shutil.rmtree(own, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.rmdir()
    return [result for path in configs if (result := finished(path)) is not None]


def _train_group(
    configs: Mapping[Path, TrainConfig],
    own: Path,
    devices: Sequence[jax.Device] | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Trains those that belong together to the end; what a finished one has left stays."""
    with contextlib.ExitStack() as stack:
        first = next(iter(configs.values()))
        watch = stack.enter_context(hosts.watching(first.guard.report_after))
        watch.at(SETTING_UP, 0)
        open_ones = [path for path in configs if finished(path) is None]
        trackings = {path: configs[path].tracking for path in open_ones}
        for chosen in set(trackings.values()):
            chosen.check()
        run = set_up(list(configs.values()), own, devices)
        watch.at(COMPILING, run.progress.step)
        programs = run.programs.compile(run.dispatch_lengths)
        for path in open_ones:
            stack.enter_context(claimed(path, configs[path], run.data.contents))
        own.mkdir(parents=True, exist_ok=True)
        check_current(run)
        names = [path.relative_to(own.parent.parent).as_posix() for path in configs]
        write_json(own / "members.json", names)
        followers = stack.enter_context(tracking.following(trackings))
        logs = [
            open_log(run, path, config, followers, lead=path in open_ones, quiet=True)
            for path, config in configs.items()
        ]
        train_to_end(run, programs, RunLogs(logs, run.num_steps), watch, stop)
        watch.at(RECORDING, run.progress.step)
        for i, path in enumerate(configs):
            if path in open_ones:
                _leave(run, i, path)


def _leave(together: Run, index: int, workdir: Path) -> None:
    """Writes what one network's run of its own would have left."""
    assert together.confusion is not None
    run = dataclasses.replace(
        together,
        config=together.members[index],
        workdir=workdir,
        mesh=sharding.data_mesh(list(together.mesh.devices.flat)[:1]),
        state=jax.tree.map(lambda x: np.asarray(x[index]), together.state),
        evaluation={name: float(np.asarray(x)[index]) for name, x in together.evaluation.items()},
        confusion=together.confusion[index],
        shared_by=len(together.members),
        members=(),
    )
    config = run.config.checkpoint
    with contextlib.closing(Checkpoints(config.place(workdir), config)) as checkpoints:
        if checkpoints.latest_step() != run.progress.step:  # not killed just here before
            checkpoints.save(run.progress.step, run.arrays(), run.meta(), run.evaluation)
            checkpoints.wait()
    conclude(run, quiet=True)
