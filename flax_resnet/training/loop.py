"""The one loop: a config and a workdir in, a trained network and its record out.

``train_and_evaluate`` sets a run up, compiles its steps and claims its directory;
``train_to_end`` takes the steps, logs, evaluates and saves; ``conclude`` writes the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_resnet import figures, models, tracking
from flax_resnet.checkpoints.checkpoints import Checkpoints
from flax_resnet.distributed import hosts, sharding, watchdog
from flax_resnet.distributed.preemption import Preempted, Signals
from flax_resnet.distributed.watchdog import Watch
from flax_resnet.records import text_tables
from flax_resnet.records.configs import flatten, to_record
from flax_resnet.records.run_dir import RESULT, finished, read_metrics, write_json
from flax_resnet.tracking.run_log import RunLog, RunLogs, Timer
from flax_resnet.training import metrics
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.guards import Diverged, all_finite, check_loss
from flax_resnet.training.resume import check_current
from flax_resnet.training.run import Run
from flax_resnet.training.setup import opening_lines, set_up
from flax_resnet.training.step_programs import Compiled, by_step, step_memory, steps_in
from flax_resnet.training.workdir import check_workdir, claimed
from flax_resnet.xla import trace

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
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(hosts.watching(config.guard.report_after))
        watch.at(watchdog.SETTING_UP, 0)
        record = flatten(to_record(config), "config")
        del record["config.data.data_dir"]  # each host may have its own copy of the data
        hosts.check_alike({**record, "workdir": str(workdir)})
        config = check_workdir(workdir, config)
        lead = sharding.is_lead()
        # The lead's word: another may not see the file yet, or see it already.
        if sharding.same_everywhere(finished(workdir) is not None):
            result = finished(workdir) or {}
            if result and lead and not quiet:
                text_tables.say(
                    f"{workdir} is finished: {result['step']} steps, top-1 "
                    f"{100 * result['top1']:.2f} %. Nothing to do; another --workdir trains again."
                )
            return result
        if lead:
            config.tracking.check()

        # The data, the model, the optimizer and their state, at step 0 or from a checkpoint.
        run = set_up(config, workdir, sharding.data_mesh() if mesh is None else mesh)
        watch.at(watchdog.COMPILING, run.progress.step)
        programs = run.programs.compile(run.dispatch_lengths)
        run.finish_check()

        # What can be wrong has been by now; only then is anything written.
        stack.enter_context(claimed(workdir, config, run.data.contents))
        watch.at(watchdog.SETTING_UP, run.progress.step)
        check_current(run)
        with tracking.following({workdir: config.tracking} if lead else {}) as followers:
            log = open_log(run, workdir, config, followers, lead=lead, quiet=quiet)
            train_to_end(run, programs, log, watch, stop)
            watch.at(watchdog.RECORDING, run.progress.step)
            result = conclude(run, quiet=quiet) if lead else {}
        sharding.same_everywhere(run.progress.step)  # nobody leaves before the record is whole
        return result


def train_to_end(
    run: Run,
    programs: Compiled,
    log: RunLog | RunLogs,
    watch: Watch,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Takes a run that is set up and compiled to its end; closes ``log``."""
    config, progress = run.config, run.progress
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        directory = config.checkpoint.place(run.workdir)
        checkpoints = Checkpoints(directory, config.checkpoint, progress.step)
        stack.callback(checkpoints.close)
        signals = stack.enter_context(Signals(stop))
        stack.enter_context(step_memory(config, run.mesh))
        # The workdir of networks that train together goes when they are finished.
        profiles = (run.workdir.parent.parent if run.members else run.workdir) / "profile"
        count, step = config.profile_steps, programs.train_step
        tracing = trace.traced(step, count, profiles, log.message, lambda _, x: steps_in(x))
        train_step = stack.enter_context(tracing)
        for line in opening_lines(run):
            log.message(line)
        log.message(f"compiled in {programs.seconds:.1f} s")
        stack.enter_context(_last_good_named(checkpoints, run, watch))

        began = time.perf_counter() - progress.seconds - programs.seconds
        progress.spent["compile"] += programs.seconds
        loop = _Loop(
            run, programs.eval_step, checkpoints, log, signals, watch, began, progress.step
        )
        loop.finish_what_was_stopped()
        watch.at(watchdog.WAITING, progress.step)
        for batch in loop.timer.waiting(run.dispatches()):
            watch.at(watchdog.STEP, progress.step)
            loop.step(train_step, batch)
            progress.owes_evaluation = loop.is_due((run.eval_every,))
            saves = loop.is_due(run.save_every)
            if saves or progress.step % config.log_every_steps == 0:
                # Saves end an interval too, so that a resumed run logs what an unbroken one does.
                loop.log_interval()
            if signals():
                loop.save_and_stop()
            evaluates = progress.owes_evaluation
            if evaluates:
                loop.evaluate()
            if saves:
                loop.save(loop.scores() if evaluates else None)
                loop.timer.reset()
            watch.at(watchdog.WAITING, progress.step)
        if run.confusion is None:  # the last checkpoint was the end, the record was not written
            loop.evaluate(is_logged=True)
            progress.seconds = time.perf_counter() - began
        watch.at(watchdog.SAVING, progress.step)
        checkpoints.wait()


def open_log(
    run: Run, workdir: Path, config: TrainConfig, followers: Mapping[Path, Any], **options: bool
) -> RunLog:
    """The log of a run in ``workdir``, from the run's step on; ``options`` are RunLog's."""
    follower, events = followers.get(workdir), config.tracking.events
    step, num_steps = run.progress.step, run.num_steps
    return RunLog(workdir, step, num_steps, events=events, follower=follower, **options)


@contextlib.contextmanager
def _last_good_named(checkpoints: Checkpoints, run: Run, watch: Watch) -> Iterator[None]:
    """Adds the last good checkpoint to the message of a run that diverged."""
    try:
        yield
    except Diverged as error:
        watch.at(watchdog.SAVING, run.progress.step)
        checkpoints.wait()
        last = checkpoints.latest_step()
        good = f"the last good one is {last}" if last else "no checkpoint was saved before"
        raise Diverged(
            f"{error}; checkpoints: {good}, in {checkpoints.directory}. Lower "
            "--optimizer.learning-rate or set --optimizer.max-grad-norm, in another --workdir"
        ) from error


@dataclasses.dataclass
class _Loop:
    """What ``train_to_end`` does with a run: steps, log lines, evaluations and checkpoints."""

    run: Run
    eval_step: Callable[..., Any]
    checkpoints: Checkpoints
    log: RunLog | RunLogs
    stop: Callable[[], bool]
    watch: Watch
    began: float
    saved: int  # the step of the newest checkpoint, or 0
    timer: Timer = dataclasses.field(default_factory=Timer)  # of the log interval
    pending: list[Any] = dataclasses.field(default_factory=list)  # sums not yet logged

    def finish_what_was_stopped(self) -> None:
        """Takes up the log interval and the evaluation that the run was stopped in."""
        run, progress = self.run, self.run.progress
        if progress.open_interval is not None:
            self.pending = [{name: np.asarray(x) for name, x in progress.open_interval.items()}]
            progress.open_interval = None
        if progress.owes_evaluation:
            self.evaluate()
            if self.is_due(run.save_every):
                self.checkpoints.rate(progress.step, self.scores())

    def step(self, train_step: Callable[..., Any], batch: Any) -> None:
        """Dispatches the steps of a batch or a Group."""
        run, steps = self.run, steps_in(batch)
        self.timer.images += steps * math.prod(run.leading_axes) * run.config.batch_size
        run.state, sums = train_step(run.state, batch)
        self.run.progress.step += steps
        self.pending.append(sums)
        if len(self.pending) > MOST_DISPATCHES_IN_FLIGHT:
            jax.block_until_ready(self.pending[-1 - MOST_DISPATCHES_IN_FLIGHT])

    def is_due(self, every: Sequence[int]) -> bool:
        """Whether one of ``every`` divides the step, or the run ends with it."""
        step = self.run.progress.step
        return step == self.run.num_steps or any(step % n == 0 for n in every)

    def _sums(self) -> list[dict[str, Any]]:
        return by_step(self.pending, len(self.run.leading_axes))

    def scores(self) -> dict[str, float]:
        """Metrics of the last evaluation, of several networks their means."""
        return {name: float(np.mean(value)) for name, value in self.run.evaluation.items()}

    def log_interval(self) -> None:
        """Logs the training metrics since the last line; raises Diverged by their loss."""
        run, progress, sums = self.run, self.run.progress, self._sums()
        config, means = run.config, metrics.means(sums)
        limit = config.guard.limit(config.loss, config.model.num_classes, progress.first_loss)
        check_loss(sums, progress.step, limit)
        if progress.first_loss is None:
            progress.first_loss = float(np.nanmax(means["loss"]))
        values = {**means, "learning_rate": run.learning_rate(), **self.timer.summary()}
        self.log.write("train", progress.step, run.epoch, values)
        self.pending.clear()
        self.timer.reset()

    def evaluate(self, is_logged: bool = False) -> None:
        """Evaluates the state, and logs it unless that ``is_logged`` already."""
        run, progress = self.run, self.run.progress

        def stop() -> bool:
            self.watch.at(watchdog.EVALUATING, progress.step)
            return self.stop()

        try:
            run.evaluate(self.eval_step, stop)
        except Preempted:
            self.save_and_stop()
        progress.owes_evaluation = False
        if not is_logged:
            self.log.write("eval", progress.step, run.epoch, run.evaluation)

    def save(self, scores: dict[str, float] | None) -> None:
        """Saves a checkpoint, rated by ``scores`` where it has just been evaluated."""
        run, progress = self.run, self.run.progress
        self.watch.at(watchdog.SAVING, progress.step)
        state = jax.block_until_ready(run.state)
        now = time.perf_counter()
        # Not the optimizer's state: the best loss of ReduceOnPlateau begins at infinity.
        if not run.leading_axes and not all_finite((state.params, state.batch_stats, state.ema)):
            raise Diverged(
                f"the run diverged: the parameters are not finite any more at step {progress.step}"
            )
        progress.seconds = now - self.began
        progress.train_seconds = progress.seconds - sum(progress.spent.values())
        self.checkpoints.save(progress.step, run.arrays(), run.meta(), scores)
        progress.spent["save"] += time.perf_counter() - now
        self.saved = progress.step

    def save_and_stop(self) -> None:
        """Saves where the run stands, so that it goes on as if it had not been stopped."""
        progress, sums = self.run.progress, self._sums()
        if sums:
            # The mean is judged when the interval is whole.
            check_loss(sums, progress.step, math.inf)
            totals = metrics.totals(sums)
            progress.open_interval = {name: np.asarray(x).tolist() for name, x in totals.items()}
        if self.saved != progress.step:  # it was restored, and has only been evaluating since
            self.save(None)
        self.checkpoints.wait()
        at = f"stopped at step {progress.step} of {self.run.num_steps}, which is saved"
        self.log.message(f"{at}: the same command goes on")
        raise Preempted


def conclude(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Draws the figures, prints the closing table, and writes result.json last."""
    workdir, records = run.workdir, read_metrics(run.workdir)
    best = max((r for r in records if r["split"] == "eval"), key=lambda r: (r["top1"], r["step"]))
    last = [r for r in records if r["split"] == "train"][-1]
    name = f"{models.network_name(run.config.model)} on {run.config.data.title}"
    with figures.failure_as_one_line(workdir / "curves.png") as path:
        figures.curves(records, path, f"{name}, seed {run.config.seed}")
    title = f"{name}: top-1 {100 * run.evaluation['top1']:.2f} % of {run.data.num_eval}"
    assert run.confusion is not None
    progress, shared_by = run.progress, run.shared_by
    with figures.failure_as_one_line(workdir / "confusion.png") as path:
        figures.confusion(run.confusion, run.data.class_names, path, title)
    result = {
        "step": progress.step,
        "epochs": run.epoch,
        **run.evaluation,
        "best_top1": best["top1"],
        "best_step": best["step"],
        "train_top1": last["top1"],
        "train_loss": last["loss"],
        "parameters": run.parameters,
        "seconds": progress.seconds / shared_by,
        "start_seconds": progress.start_seconds / shared_by,
        "train_seconds": progress.train_seconds / shared_by,
        "compile_seconds": progress.spent["compile"] / shared_by,
        "eval_seconds": progress.spent["evaluate"] / shared_by,
        "num_train": run.data.num_train,
        "num_eval": run.data.num_eval,
        "evaluated_on": run.data.eval_part,
        **({"num_unreadable": run.data.num_unreadable} if run.data.num_unreadable else {}),
        **({"together": shared_by} if shared_by > 1 else {}),
    }
    if not quiet:
        text_tables.show(name, [*text_tables.result_rows(result).items(), ("record", workdir)])
    write_json(workdir / RESULT, result)
    return result
