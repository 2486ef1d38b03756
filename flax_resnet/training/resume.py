"""Going on from a checkpoint, also on other devices and with the state split otherwise."""

from __future__ import annotations

import contextlib
import dataclasses

from flax_resnet.checkpoints.checkpoints import Checkpoints
from flax_resnet.errors import UserError
from flax_resnet.records.run_dir import RESULT
from flax_resnet.training.run import Progress, Run
from flax_resnet.training.workdir import check_same_run


def restore(run: Run) -> bool:
    """Puts the newest good checkpoint of the run's workdir into it; False where there is none."""
    checkpoints = Checkpoints(run.config.checkpoint.place(run.workdir))
    with contextlib.closing(checkpoints):
        step = checkpoints.latest_step()
        if step is None:
            return False
        meta = checkpoints.meta(step)
        run.data.check_same(meta, run.workdir)
        what = f"checkpoint {step} in {checkpoints.directory} is"
        check_same_run(what, meta, run.config)
        arrays, _ = checkpoints.restore(run.state.arrays(), step)
    run.state = run.state.replace(**arrays)
    names = [field.name for field in dataclasses.fields(Progress) if field.name in meta]
    run.progress = dataclasses.replace(run.progress, **{name: meta[name] for name in names})
    run.resumed_on = meta["ran_on"]
    return True


def check_current(run: Run) -> None:
    """Raises UserError where another process has gone on in the workdir since ``restore``."""
    reader = Checkpoints(run.config.checkpoint.place(run.workdir), say=lambda line: None)
    with contextlib.closing(reader):
        newest = reader.latest_step() or 0
    if newest != run.progress.step or (run.workdir / RESULT).exists():
        raise UserError(
            f"{run.workdir} has gone on to step {newest} while this one was set up at step "
            f"{run.progress.step}: another process was at work there; start again"
        )


def changes(run: Run) -> str:
    """What is otherwise than where the run was saved, for a message; "" where nothing is."""
    here, there = run.ran_on(), run.resumed_on or run.ran_on()
    found = [
        f"{name.replace('_', ' ')} {there[name]}, now {here[name]}"
        for name in here
        if there.get(name, here[name]) != here[name]  # older checkpoints say nothing of some
    ]
    return f"saved with {'; '.join(found)}: the last bits may differ" if found else ""
