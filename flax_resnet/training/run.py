"""A run that is set up: its state, how far it has come, and what its steps are."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from flax_resnet.data.batches import Data
from flax_resnet.distributed import sharding
from flax_resnet.distributed.preemption import Preempted
from flax_resnet.optim.optimizers import learning_rate_at
from flax_resnet.records.configs import to_record
from flax_resnet.training import features, metrics
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.step import Batch, TrainState
from flax_resnet.training.step_programs import Group, StepPrograms, dispatch_lengths, eval_memory


@dataclasses.dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside the state; older ones lack some.

    Attributes:
      step: optimizer steps done.
      seconds: since the run began, up to its last checkpoint.
      train_seconds: of these, in which it did not "compile", "evaluate" or "save".
      spent: seconds in which it did these.
      start_seconds: before, to start the network from training images, where it does.
      open_interval: sums of the log interval that the run was stopped in.
      owes_evaluation: it was stopped before the evaluation that is due at its step.
      first_loss: mean training loss of its first log interval, in nats; of several networks the
        largest.
    """

    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    spent: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"compile": 0.0, "evaluate": 0.0, "save": 0.0}
    )
    start_seconds: float = 0.0
    open_interval: dict[str, Any] | None = None
    owes_evaluation: bool = False
    first_loss: float | None = None


@dataclasses.dataclass
class Run:
    """A run that is set up, and how far it has come.

    Attributes:
      start: seed to the state at step 0, but for statistics that are measured on the data.
      whole: the whole state, where ``state`` is only the top of a frozen network.
      evaluation: metrics of the last evaluation; of networks that train together arrays (S,).
      confusion: int (K, K) counts of the last evaluation; None before the first.
      resumed_on: what ``ran_on`` said where it was saved.
      shared_by: networks that trained in the program whose ``progress.seconds`` these are.
      finish_check: waits until all images have been decoded once, or raises what is wrong.
      members: configs of S networks that train together, which differ by their seed; () for one.
    """

    config: TrainConfig
    workdir: Path
    mesh: Mesh
    data: Data
    num_steps: int
    steps_per_epoch: int
    schedule: optax.Schedule
    state: TrainState
    start: Callable[[int], TrainState]
    progress: Progress = dataclasses.field(default_factory=Progress)
    whole: TrainState | None = None
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    confusion: np.ndarray | None = None
    resumed_on: dict[str, Any] | None = None
    shared_by: int = 1
    members: tuple[TrainConfig, ...] = ()
    finish_check: Callable[[], None] = lambda: None

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.progress.step / self.steps_per_epoch

    @property
    def parameters(self) -> int:
        """Parameters of the network, or of all networks that train together."""
        return sum(x.size for x in jax.tree.leaves((self.whole or self.state).params))

    @property
    def leading_axes(self) -> tuple[int, ...]:
        """Leading axes of the state and of a batch: (S,) when S networks train together, or ()."""
        return (len(self.members),) if self.members else ()

    @property
    def programs(self) -> StepPrograms:
        """What makes and compiles the steps."""
        axes = self.leading_axes
        return StepPrograms(self.config, self.mesh, self.data, self.num_steps, self.state, axes)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return max(1, round(self.config.eval_every_epochs * self.steps_per_epoch))

    @property
    def save_every(self) -> tuple[int, ...]:
        """The loop saves after steps that one of these divides."""
        config = self.config.checkpoint
        return self.eval_every * config.every_evals, config.every_steps or self.num_steps

    @property
    def dispatch_lengths(self) -> Iterator[int]:
        """Steps of each dispatch that is left."""
        pauses = (self.config.log_every_steps, self.eval_every, *self.save_every)
        size = self.programs.group_size
        return dispatch_lengths(self.progress.step, self.num_steps, size, pauses)

    def learning_rate(self) -> Any:
        """The rate of the last step: a float, or one for each network (S,)."""
        rate = learning_rate_at(self.schedule, self.state.opt_state, self.progress.step - 1)
        # ReduceOnPlateau reduces the rate of each network by itself.
        axes = self.leading_axes
        return np.broadcast_to(np.asarray(rate, float), axes) if axes else float(rate)

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = self.state
        return (state if self.whole is None else features.with_trunk(state, self.whole)).arrays()

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says beside its arrays, as JSON values."""
        return {
            **dataclasses.asdict(self.progress),
            **self.data.describe(),
            "evaluated_on": self.data.eval_part,
            "ran_on": self.ran_on(),
            "config": to_record(self.config),
        }

    def ran_on(self) -> dict[str, Any]:
        """What a resumed run may have otherwise, and changes the last bits; as JSON values."""
        mesh, size = sharding.describe(self.mesh), self.programs.group_size
        return {**mesh, "sharding": self.config.sharding, "steps_per_dispatch": size}

    def dispatches(self) -> Iterator[Any]:
        """What is left to train on, as a compiled train step takes it: batches, and Groups."""
        split = sharding.group_sharding(self.mesh)
        seeds = [config.seed for config in self.members] or self.config.seed
        size, step = self.config.batch_size, self.progress.step
        parts = self.data.host_batches(seeds, size, step, self.num_steps)
        with contextlib.closing(parts):
            for count in self.dispatch_lengths:
                several = list(itertools.islice(parts, count))
                if count == 1:
                    yield self.data.place(several[0])
                else:
                    stacked = jax.tree.map(lambda *x: np.stack(x), *several)
                    yield Group(sharding.put_local(split, stacked))

    def evaluate(
        self, step: Callable[..., metrics.Sums], stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Evaluates the state on the whole evaluation split; Preempted where ``stop`` says so."""

        def batches() -> Iterator[Batch]:
            for batch in self.data.in_order("eval", self.config.eval_batch_size):
                if stop():
                    raise Preempted
                yield batch

        jax.block_until_ready(self.state)  # the last steps are no part of the evaluation
        began = time.perf_counter()
        try:
            with eval_memory(self.config, self.mesh):
                self.evaluation, self.confusion = evaluate(step, self.state, batches())
        finally:  # one that was stopped took its time too
            self.progress.spent["evaluate"] += time.perf_counter() - began


def evaluate(
    step: Callable[..., metrics.Sums], state: TrainState, batches: Iterable[Batch]
) -> tuple[dict[str, float], np.ndarray]:
    """(means of the metrics over all examples of ``batches``, int (K, K) confusion counts)."""
    outputs = metrics.outputs(functools.partial(step, state), batches)
    total = metrics.totals(sums for _, sums in outputs)
    confusion = total.pop("confusion").astype(np.int64)
    return metrics.means([total]), confusion
