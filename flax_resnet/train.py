"""The one loop: a config and a workdir in, a trained network and its record out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_resnet import (
    dispatch,
    distributed,
    figures,
    hosts,
    metrics,
    models,
    profiling,
    tables,
    tracking,
)
from flax_resnet.checkpoints.checkpoints import Checkpoints
from flax_resnet.config import TrainConfig, check_workdir, claimed, write_json
from flax_resnet.guards import Diverged, all_finite, check_loss
from flax_resnet.preemption import Preempted, Signals
from flax_resnet.records.configs import flatten, to_record
from flax_resnet.resume import changes, check_current
from flax_resnet.run import Run
from flax_resnet.setup import opening_line, set_up
from flax_resnet.watch import (
    COMPILING,
    EVALUATING,
    RECORDING,
    SAVING,
    SETTING_UP,
    STEP,
    WAITING,
    Watch,
)

# Dispatch is asynchronous: without a bound the host would queue every batch of the run.
MOST_DISPATCHES_IN_FLIGHT = 2


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
      stop: asked after each step and each evaluation batch; where it says so the run saves and
        ends there, as by Ctrl-C, with several processes all of them.

    Returns:
      What result.json holds; of a run that is not finished yet, in the lead alone.

    Raises:
      UserError: bad input, and the workdir has not been touched; or the run cannot go on.
      Preempted: SIGTERM, SIGINT or ``stop`` ended it early; all is saved, and called again it
        goes on. It is a KeyboardInterrupt.
    """
    workdir = Path(workdir).expanduser()
    with hosts.watching(config.guard.report_after) as watch:
        watch.at(SETTING_UP, 0)
        record = flatten(to_record(config), "config")
        del record["config.data.data_dir"]  # each host may have its own copy of the data
        hosts.check_alike({**record, "workdir": str(workdir)})
        return _train(config, workdir, mesh, quiet, stop, watch)


def _train(
    config: TrainConfig,
    workdir: Path,
    mesh: Mesh | None,
    quiet: bool,
    stop: Callable[[], bool] | None,
    watch: Watch,
) -> dict[str, Any]:
    check_workdir(workdir, config)
    # The lead's word: another may not see the file yet, or see it already.
    if distributed.same_everywhere(finished(workdir) is not None):
        result = finished(workdir) or {}
        if result and not quiet and distributed.is_lead():
            print(
                f"{workdir} is finished: {result['step']} steps, top-1 {100 * result['top1']:.2f} "
                "%. Nothing to do; another --workdir trains again."
            )
        return result
    lead = distributed.is_lead()
    if lead:
        config.tracking.check()
    run = set_up(config, workdir, distributed.data_mesh() if mesh is None else mesh)
    watch.at(COMPILING, run.step)
    steps = run.compile()  # what can be wrong has been by now; only then is anything written
    with claimed(workdir, config):
        watch.at(SETTING_UP, run.step)
        check_current(run)
        with tracking.following({workdir: config.tracking} if lead else {}) as followers:
            log = metrics.RunLog(
                workdir,
                run.step,
                run.num_steps,
                lead=lead,
                quiet=quiet,
                events=config.tracking.events,
                follower=followers.get(workdir),
            )
            go(run, *steps, log, watch, stop)
            watch.at(RECORDING, run.step)
            result = conclude(run, quiet=quiet) if lead else {}
        distributed.same_everywhere(run.step)  # nobody leaves before the record is whole
        return result


def finished(workdir: Path) -> dict[str, Any] | None:
    """What a finished run's result.json holds; None of a run that is not."""
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def go(
    run: Run,
    step_fn: Callable[..., Any],
    eval_fn: Callable[..., Any],
    log: metrics.RunLog | metrics.RunLogs,
    watch: Watch,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Takes a run that is set up and compiled (``run.compile()``) to its end; closes ``log``.

    Raises:
      Preempted: it was stopped, and saved.
      UserError: the loss diverged, a checkpoint could not be written, or memory did not suffice.
    """
    config = run.config
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        directory = config.checkpoint.place(run.workdir)
        checkpoints = Checkpoints(directory, config.checkpoint, run.step)
        stack.callback(checkpoints.close)
        signals = stack.enter_context(Signals(stop))
        stack.enter_context(run.step_memory())
        # The workdir of networks that train together goes when they are finished.
        profiles = (run.workdir.parent.parent if run.members else run.workdir) / "profile"
        steps_of = lambda state, batch: dispatch.num_steps(batch)  # noqa: E731
        tracing = profiling.traced(step_fn, config.profile_steps, profiles, log.message, steps_of)
        step_fn = stack.enter_context(tracing)
        log.message(opening_line(run))
        if changed := changes(run):
            log.message(changed)
        if run.group > 1 and set(run.taken) == {1}:
            log.message(
                f"steps_per_dispatch={run.group} and never so many steps with nothing logged, "
                "evaluated or saved between them: each is a dispatch of its own"
            )
        log.message(f"compiled in {run.compile_seconds:.1f} s")
        began = time.perf_counter() - run.seconds - run.compile_seconds
        try:
            loop = _Loop(run, step_fn, eval_fn, checkpoints, log, signals, watch, began, run.step)
            loop.train()
        except Diverged as error:
            watch.at(SAVING, run.step)
            checkpoints.wait()
            last = checkpoints.latest_step()
            none = "no checkpoint was saved before"
            good = none if last is None else f"the last good one is {last}"
            raise Diverged(
                f"{error}; checkpoints: {good}, in {checkpoints.directory}. Lower "
                "--optimizer.learning-rate or set --optimizer.max-grad-norm, in another --workdir"
            ) from error
        watch.at(SAVING, run.step)
        checkpoints.wait()


@dataclasses.dataclass
class _Loop:
    """Trains from ``run.step`` to the end; evaluates, logs and saves on the way."""

    run: Run
    step_fn: Callable[..., Any]
    eval_fn: Callable[..., Any]
    checkpoints: Checkpoints
    log: metrics.RunLog | metrics.RunLogs
    stop: Callable[[], bool]
    watch: Watch
    began: float
    saved: int  # the step of the newest checkpoint, or 0
    timer: metrics.Timer = dataclasses.field(default_factory=metrics.Timer)
    pending: list[Any] = dataclasses.field(default_factory=list)  # sums not yet logged

    def train(self) -> None:
        """The loop."""
        run, config, watch = self.run, self.run.config, self.watch
        if run.open_interval is not None:
            self.pending = [{name: np.asarray(x) for name, x in run.open_interval.items()}]
            run.open_interval = None
        if run.owes_evaluation:
            self._evaluate()
            if self._due(run.save_every):
                self.checkpoints.rate(run.step, self._scores())
        watch.at(WAITING, run.step)
        images = math.prod(run.lead) * config.batch_size
        for batch in self.timer.waiting(run.dispatches()):
            watch.at(STEP, run.step)
            steps = dispatch.num_steps(batch)
            self.timer.images += steps * images
            run.state, sums = self.step_fn(run.state, batch)
            run.step += steps
            self.pending.append(sums)
            if len(self.pending) > MOST_DISPATCHES_IN_FLIGHT:
                jax.block_until_ready(self.pending[-1 - MOST_DISPATCHES_IN_FLIGHT])
            run.owes_evaluation = self._due((run.eval_every,))
            saves = self._due(run.save_every)
            if saves or run.step % config.log_every_steps == 0:
                # Saves end an interval too, so that a resumed run logs what an unbroken one does.
                self._log_interval()
            if self.stop():
                self._save_and_stop()
            evaluates = run.owes_evaluation
            if evaluates:
                self._evaluate()
            if saves:
                self._save(self._scores() if evaluates else None)
                self.timer.reset()
            watch.at(WAITING, run.step)
        if run.confusion is None:  # the last checkpoint was the end, and the record was not written
            self._evaluate(is_logged=True)
            run.seconds = time.perf_counter() - self.began

    def _due(self, every: Sequence[int]) -> bool:
        step = self.run.step
        return step == self.run.num_steps or any(step % n == 0 for n in every)

    def _sums(self) -> list[dict[str, Any]]:
        return dispatch.by_step(self.pending, len(self.run.lead))

    def _scores(self) -> dict[str, float]:
        return {name: float(np.mean(value)) for name, value in self.run.evaluation.items()}

    def _log_interval(self) -> None:
        run, sums = self.run, self._sums()
        config, means = run.config, metrics.means(sums)
        limit = config.guard.limit(config.loss, config.model.num_classes, run.first_loss)
        check_loss(sums, run.step, limit)
        if run.first_loss is None:
            run.first_loss = float(np.nanmax(means["loss"]))
        values = {**means, "learning_rate": run.learning_rate(), **self.timer.summary()}
        self.log.write("train", run.step, run.epoch, values)
        self.pending.clear()
        self.timer.reset()

    def _evaluate(self, is_logged: bool = False) -> None:
        run = self.run

        def stop() -> bool:
            self.watch.at(EVALUATING, run.step)
            return self.stop()

        try:
            run.evaluate(self.eval_fn, stop)
        except Preempted:
            self._save_and_stop()
        run.owes_evaluation = False
        if not is_logged:
            self.log.write("eval", run.step, run.epoch, run.evaluation)

    def _save(self, scores: dict[str, float] | None) -> None:
        run = self.run
        self.watch.at(SAVING, run.step)
        state = jax.block_until_ready(run.state)
        now = time.perf_counter()
        # Not the optimizer's state: the best loss of ReduceOnPlateau begins at infinity.
        if not run.lead and not all_finite((state.params, state.batch_stats, state.ema)):
            raise Diverged(
                f"the run diverged: the parameters are not finite any more at step {run.step}"
            )
        run.seconds = now - self.began
        run.train_seconds = run.seconds - sum(run.spent.values())
        self.checkpoints.save(run.step, run.arrays(), run.meta(), scores)
        run.spent["save"] += time.perf_counter() - now
        self.saved = run.step

    def _save_and_stop(self) -> None:
        """Saves where the run stands, so that it goes on as if it had not been stopped."""
        run, sums = self.run, self._sums()
        if sums:
            check_loss(sums, run.step, math.inf)  # the mean is judged when the interval is whole
            run.open_interval = {n: np.asarray(x).tolist() for n, x in metrics.totals(sums).items()}
        if self.saved != run.step:  # it was restored, and has only been evaluating since
            self._save(None)
        self.checkpoints.wait()
        at = f"stopped at step {run.step} of {run.num_steps}, which is saved"
        self.log.message(f"{at}: the same command goes on")
        raise Preempted


def conclude(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Draws the figures, prints the closing table, and writes result.json last."""
    workdir, records = run.workdir, metrics.read_metrics(run.workdir)
    best = max((r for r in records if r["split"] == "eval"), key=lambda r: (r["top1"], r["step"]))
    last = [r for r in records if r["split"] == "train"][-1]
    name = f"{models.network_name(run.config.model)} on {run.config.data.title}"
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
        "start_seconds": run.start_seconds / run.shared_by,
        "train_seconds": run.train_seconds / run.shared_by,
        "compile_seconds": run.spent["compile"] / run.shared_by,
        "eval_seconds": run.spent["evaluate"] / run.shared_by,
        "num_train": run.data.num_train,
        "num_eval": run.data.num_eval,
        **({"together": run.shared_by} if run.shared_by > 1 else {}),
    }
    if not quiet:
        tables.show(name, [*tables.result_rows(result).items(), ("record", workdir)])
    write_json(workdir / "result.json", result)
    return result
