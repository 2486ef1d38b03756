"""The one loop: a config and a workdir in, a trained network and its record out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_resnet import distributed, figures, metrics
from flax_resnet.checkpoint import Checkpoints
from flax_resnet.config import TrainConfig, check_workdir, claimed, write_json
from flax_resnet.run import Run, set_up

# Dispatch is asynchronous: without a bound the host would queue every batch of the run.
MOST_STEPS_IN_FLIGHT = 2


def train_and_evaluate(
    config: TrainConfig,
    workdir: str | Path,
    *,
    mesh: Mesh | None = None,
    quiet: bool = False,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Trains, evaluates, and leaves the record in ``workdir``; resumes a run that is there.

    Args:
      config: the run.
      workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/, curves.png,
        confusion.png and, when the run is finished, result.json.
      mesh: devices to run on; by default all.
      quiet: print nothing; for runs side by side.
      stop: asked after each step; where it says so the run ends there, as by Ctrl-C.

    Returns:
      What result.json holds; in a process that does not lead, nothing.

    Raises:
      UserError: bad input; the workdir has not been touched then.
    """
    workdir = Path(workdir).expanduser()
    check_workdir(workdir, config)
    if (result := finished(workdir)) is not None:
        if not quiet:
            print(
                f"{workdir} is finished: {result['step']} steps, top-1 {100 * result['top1']:.2f} "
                "%. Nothing to do; another --workdir trains again."
            )
        return result
    run = set_up(config, workdir, distributed.data_mesh() if mesh is None else mesh)
    steps = run.compile()  # what can be wrong has been by now; only then is anything written
    lead = distributed.is_lead()
    with claimed(workdir, config):
        log = metrics.RunLog(workdir, run.step, run.num_steps, lead=lead, quiet=quiet)
        go(run, *steps, workdir / "checkpoints", log, stop)
        return conclude(run, quiet=quiet) if lead else {}


def finished(workdir: Path) -> dict[str, Any] | None:
    """What a finished run's result.json holds; None of a run that is not."""
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def go(
    run: Run,
    step_fn: Callable[..., Any],
    eval_fn: Callable[..., Any],
    directory: Path,
    log: metrics.RunLog | metrics.RunLogs,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Takes a run that is set up and compiled to its end.

    Args:
      run: is at its last step afterwards.
      step_fn: what ``run.compile()`` gave.
      eval_fn: likewise.
      directory: of the checkpoints.
      log: is closed afterwards.
      stop: as of ``train_and_evaluate``.
    """
    try:
        checkpoints = Checkpoints(directory, run.config.checkpoint)
        try:
            log.message(_opening_line(run))
            _loop(run, step_fn, eval_fn, checkpoints, log, stop)
            checkpoints.wait()
        finally:
            checkpoints.close()
    finally:
        log.close()


def _loop(
    run: Run,
    step_fn: Callable[..., Any],
    eval_fn: Callable[..., Any],
    checkpoints: Checkpoints,
    log: metrics.RunLog | metrics.RunLogs,
    stop: Callable[[], bool] | None,
) -> None:
    """Trains from ``run.step`` to the end; evaluates, logs and saves on the way."""
    config = run.config
    began = time.perf_counter() - run.seconds - run.compile_seconds
    log.message(f"compiled in {run.compile_seconds:.1f} s")
    eval_every = max(1, round(config.eval_every_epochs * run.steps_per_epoch))
    save_every = (eval_every * config.checkpoint.every_evals,
                  config.checkpoint.every_steps or run.num_steps)  # fmt: skip
    pending: list[metrics.Sums] = []
    timer = metrics.Timer()
    for batch in timer.waiting(run.batches(), math.prod(run.lead) * config.batch_size):
        run.state, sums = step_fn(run.state, batch)
        run.step += 1
        if stop is not None and stop():
            raise KeyboardInterrupt
        pending.append(sums)
        if len(pending) > MOST_STEPS_IN_FLIGHT:
            jax.block_until_ready(pending[-1 - MOST_STEPS_IN_FLIGHT])
        evaluates = run.step == run.num_steps or run.step % eval_every == 0
        saves = run.step == run.num_steps or any(run.step % every == 0 for every in save_every)
        if saves or run.step % config.log_every_steps == 0:
            # Saves end an interval too, so that a resumed run logs what an unbroken one does.
            rate = {"learning_rate": run.learning_rate()}
            values = {**metrics.means(pending), **rate, **timer.summary()}
            log.write("train", run.step, run.epoch, values)
            pending.clear()
            timer.reset()
        if evaluates:
            run.evaluate(eval_fn)
            log.write("eval", run.step, run.epoch, run.evaluation)
        if saves:
            run.seconds = time.perf_counter() - began
            scores = {name: float(np.mean(value)) for name, value in run.evaluation.items()}
            checkpoints.save(run.step, run.arrays(), run.meta(), scores if evaluates else None)
            timer.reset()
    if run.confusion is None:  # the last checkpoint was the end, and the record was not written
        run.evaluate(eval_fn)


def _opening_line(run: Run) -> str:
    data, devices = run.data, run.mesh.devices.flat
    parameters = sum(x.size for x in jax.tree.leaves((run.whole or run.state).params))
    members = math.prod(run.lead)
    return (
        (f"{members} x " if run.lead else "")
        + f"{type(run.config.model).__name__}, {parameters // members:,} parameters; "
        f"{run.config.data.title}: "
        f"{data.num_train:,} training and {data.num_eval:,} evaluation images of "
        f"{data.sizes}, {'resident' if data.resident else 'streamed'}; "
        f"{run.num_steps} steps, {run.steps_per_epoch} an epoch, on {run.mesh.size} x "
        f"{devices[0].device_kind}" + (f"; resumes at step {run.step}" if run.step else "")
    )


def conclude(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Draws the figures, prints the closing table, and writes result.json last."""
    workdir, records = run.workdir, metrics.read_metrics(run.workdir)
    best = max((r for r in records if r["split"] == "eval"), key=lambda r: (r["top1"], r["step"]))
    last = [r for r in records if r["split"] == "train"][-1]
    name = f"{type(run.config.model).__name__} on {run.config.data.title}"
    figures.curves(records, workdir / "curves.png", f"{name}, seed {run.config.seed}")
    title = f"{name}: top-1 {100 * run.evaluation['top1']:.2f} % of {run.data.num_eval}"
    assert run.confusion is not None
    figures.confusion(run.confusion, run.data.class_names, workdir / "confusion.png", title)
    result = {
        "step": run.step,
        "epochs": run.epoch,
        **run.evaluation,
        "best_top1": best["top1"],
        "best_step": best["step"],
        "train_top1": last["top1"],
        "train_loss": last["loss"],
        "parameters": sum(x.size for x in jax.tree.leaves((run.whole or run.state).params)),
        "seconds": run.seconds / run.shared_by,
        "num_train": run.data.num_train,
        "num_eval": run.data.num_eval,
        **({"together": run.shared_by} if run.shared_by > 1 else {}),
    }
    if not quiet:
        metrics.closing_table(
            name,
            {
                "evaluation top-1": f"{100 * result['top1']:.2f} % of {result['num_eval']} images",
                "evaluation top-5": f"{100 * result['top5']:.2f} %",
                "evaluation loss": f"{result['loss']:.4f} nats",
                "best top-1": f"{100 * best['top1']:.2f} % at step {best['step']}",
                "training top-1": f"{100 * last['top1']:.2f} % (augmented, last interval)",
                "steps": f"{run.step} ({run.epoch:g} epochs)",
                "time": f"{run.seconds:.1f} s, compilation and evaluation included",
                "record": str(workdir),
            },
        )
    write_json(workdir / "result.json", result)
    return result
