"""A run that is set up: its state, how far it has come, and what its steps are."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from flax_resnet import cpu, dispatch, distributed, guards, metrics, transfer
from flax_resnet.config import TrainConfig
from flax_resnet.data import Data
from flax_resnet.datasets.rows import take
from flax_resnet.optim import learning_rate_at
from flax_resnet.preemption import Preempted
from flax_resnet.records.configs import to_record
from flax_resnet.step import LOSSES, Batch, TrainState, eval_step, look_ahead, train_step

SPLIT_PARTS: Mapping[str, tuple[str, ...]] = {
    "replicated": (),
    "zero": ("opt_state", "ema"),
    "fsdp": ("opt_state", "ema", "params"),
}
SAVED_FIELDS = ("step", "seconds", "train_seconds", "spent", "start_seconds", "open_interval",
                "owes_evaluation", "first_loss")  # fmt: skip
"""Fields of Run that a checkpoint holds beside the state; older checkpoints lack some."""


@dataclasses.dataclass
class Run:
    """A run that is set up, and how far it has come.

    Attributes:
      whole: the whole state, where ``state`` is only the top of a frozen network.
      open_interval: sums of the log interval that the run was stopped in.
      owes_evaluation: it was stopped before the evaluation that is due at its step.
      first_loss: mean training loss of its first log interval, in nats; of several networks the
        largest.
      resumed_on: what ``ran_on`` said where it was saved.
      seconds: since it began, up to its last checkpoint.
      train_seconds: of these, in which it did not "compile", "evaluate" or "save".
      spent: seconds in which it did these.
      start_seconds: before, to start the network from training images, where it does.
      shared_by: networks that trained in the program whose ``seconds`` these are.
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
    whole: TrainState | None = None
    step: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    spent: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"compile": 0.0, "evaluate": 0.0, "save": 0.0}
    )
    start_seconds: float = 0.0
    compile_seconds: float = 0.0
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    confusion: np.ndarray | None = None
    open_interval: dict[str, Any] | None = None
    owes_evaluation: bool = False
    first_loss: float | None = None
    resumed_on: dict[str, Any] | None = None
    shared_by: int = 1
    members: tuple[TrainConfig, ...] = ()

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = self.state
        return (state if self.whole is None else transfer.with_trunk(state, self.whole)).arrays()

    def learning_rate(self) -> Any:
        """The rate of the last step: a float, or one for each network (S,)."""
        rate = learning_rate_at(self.schedule, self.state.opt_state, self.step - 1)
        # ReduceOnPlateau reduces the rate of each network by itself.
        return np.broadcast_to(np.asarray(rate, float), self.lead) if self.lead else float(rate)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the state and of a batch: (S,) when S networks train together, or ()."""
        return (len(self.members),) if self.members else ()

    @property
    def held(self) -> Any:
        """Sharding of the state; each device has its share of networks that train together."""
        if self.members:
            return distributed.batch_sharding(self.mesh)
        return held(self.state, self.mesh, self.config.sharding)

    @property
    def summed(self) -> NamedSharding:
        """Sharding of the metric sums of a step."""
        mesh = self.mesh
        return distributed.batch_sharding(mesh) if self.members else distributed.replicated(mesh)

    @property
    def seeds(self) -> int | list[int]:
        """Seed of the data order; one for each network when several train together."""
        return [config.seed for config in self.members] or self.config.seed

    @property
    def group(self) -> int:
        """Steps that go together in a dispatch, where so many do."""
        return min(self.config.steps_per_dispatch, self.num_steps)

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
    def taken(self) -> Iterator[int]:
        """Steps of each dispatch that is left."""
        pauses = (self.config.log_every_steps, self.eval_every, *self.save_every)
        return dispatch.lengths(self.step, self.num_steps, self.group, pauses)

    def steps(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(train step, eval step), pure functions of a state and a batch."""
        config, loss, partial = self.config, LOSSES[self.config.loss], functools.partial
        rate = lookahead = None
        if config.dropblock_rise and not config.cache_features:
            rise = max(1, round(config.dropblock_rise * self.num_steps))
            rate = optax.linear_schedule(0.0, config.model.dropblock_rate, rise)
        if config.lookahead_steps and config.ema_decay is not None:
            lookahead = partial(
                look_ahead,
                every=config.lookahead_steps,
                decay=config.ema_decay,
                num_steps=self.num_steps,
            )
        gathered = partial(distributed.gathered, self.mesh)
        step = partial(
            train_step,
            augment=config.augment,
            loss=loss,
            label_smoothing=config.label_smoothing,
            target_threshold=config.target_threshold,
            accum_steps=config.accum_steps,
            ema_decay=config.ema_decay,
            lookahead=lookahead,
            dropblock_rate=rate,
            gather=gathered if config.sharding == "fsdp" else None,
        )
        averaged = None if config.sharding == "replicated" else gathered
        evaluate = partial(eval_step, loss=loss, tta=config.tta, gather=averaged)
        if self.members:
            return jax.vmap(step), jax.vmap(evaluate, in_axes=(0, None))
        return step, evaluate

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says beside its arrays, as JSON values."""
        return {
            **{name: getattr(self, name) for name in SAVED_FIELDS},
            **self.data.describe(),
            "ran_on": self.ran_on(),
            "config": to_record(self.config),
        }

    def ran_on(self) -> dict[str, Any]:
        """What a resumed run may have otherwise, and changes the last bits; as JSON values."""
        mesh = distributed.describe(self.mesh)
        return {**mesh, "sharding": self.config.sharding, "steps_per_dispatch": self.group}

    def compile(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(train step, its state donated; eval step), compiled for the mesh.

        The train step takes what ``dispatches`` gives: a batch, or a Group of them.
        """
        began = time.perf_counter()
        compiled = self._compile_training(), self.compile_evaluation()
        self.compile_seconds = time.perf_counter() - began
        self.spent["compile"] += self.compile_seconds
        return compiled

    def _compile_training(self) -> Callable[..., Any]:
        """The programs that the dispatches left need: of one step, of ``group`` steps, or both."""
        lengths = set(self.taken) or {1}
        single = {1: self.compile_step()} if 1 in lengths else {}
        if lengths == {1}:
            return single[1]
        several, resident = self.compile_group()

        def step(state: Any, batch: Any) -> Any:
            if isinstance(batch, dispatch.Group):
                return several(state, resident, batch.batch)
            return single[1](state, batch)

        return step

    def _compiled(
        self, step: Callable[..., Any], out: Any, memory: Any, *like: Any, **options: Any
    ) -> jax.stages.Compiled:
        """``step``, compiled for the mesh, of the state and what ``like`` describes."""
        options |= {"out_shardings": out, "compiler_options": cpu.compiler_options()}
        with memory:
            return jax.jit(step, **options).lower(self.state, *like).compile()

    def compile_step(self) -> Callable[..., Any]:
        """The train step, compiled for the mesh, its state donated."""
        batch, out = self._batch(*self.lead, self.config.batch_size), (self.held, self.summed)
        return self._compiled(self.steps()[0], out, self.step_memory(), batch, donate_argnums=0)

    def compile_group(self) -> tuple[jax.stages.Compiled, Any]:
        """(program of ``group`` train steps, the training split where it is resident).

        The program takes the state, the split, and what ``dispatch.Group.batch`` is; it gives the
        state and the sums of every step, stacked.
        """
        mesh, resident = self.mesh, self.data.resident
        split, constrain = distributed.group_sharding(mesh), jax.lax.with_sharding_constraint

        def batch_of(arrays: Any, rows: Any) -> Any:
            return constrain(take(arrays, rows), distributed.batch_sharding(mesh))

        # In a while loop a convolution's backward pass is some 20 times slower on a CPU.
        steps = dispatch.grouped(
            self.steps()[0],
            lambda state: constrain(state, self.held),
            batch_of if resident else None,
            unroll=cpu.is_backend(),
        )
        like = self._batch(self.group, *self.lead, self.config.batch_size, sharding=split)
        if resident:
            like = {"row": like["label"]} | {n: x for n, x in like.items() if n == "epoch"}
        arrays = self.data.train_arrays if resident else None
        out, memory = (self.held, split if self.members else self.summed), self.step_memory()
        return self._compiled(steps, out, memory, arrays, like, donate_argnums=0), arrays

    def compile_evaluation(self) -> Callable[..., Any]:
        """The eval step, compiled for the mesh."""
        like = self._batch(self.config.eval_batch_size)
        label, data = like["label"], self.data
        shape = data.batch_shape if self.config.cache_features else data.eval_shape
        batch = {
            "image": like["image"].update(shape=(*label.shape, *shape)),
            "label": label,
            "mask": label.update(dtype=jnp.bool_),
        }
        return self._compiled(self.steps()[1], self.summed, self.eval_memory(), batch)

    def _batch(self, *images: int, sharding: NamedSharding | None = None) -> dict[str, Any]:
        """Shapes, dtypes and sharding of a training batch with leading axes ``images``."""
        sharding = sharding or distributed.batch_sharding(self.mesh)
        kind = jnp.float32 if self.config.cache_features else jnp.uint8
        image = jax.ShapeDtypeStruct((*images, *self.data.batch_shape), kind, sharding=sharding)
        label = jax.ShapeDtypeStruct(images, jnp.int32, sharding=sharding)
        rows = {"row": label, "epoch": label} if self.config.augment.alternating_flip else {}
        return {"image": image, "label": label, **rows}

    def step_memory(self) -> contextlib.AbstractContextManager[None]:
        """Turns running out of memory in training into one line."""
        config = self.config
        advice = guards.step_advice(config.batch_size, config.accum_steps, self.mesh.size)
        return guards.memory_advice(advice)

    def eval_memory(self) -> contextlib.AbstractContextManager[None]:
        """Turns running out of memory in evaluation into one line."""
        size = self.config.eval_batch_size
        return guards.memory_advice(
            f"eval_batch_size={size} over {self.mesh.size} devices; set a smaller "
            "--eval-batch-size or --model.dtype bfloat16"
        )

    def batches(self) -> Iterator[Batch]:
        """The training batches that are left."""
        size = self.config.batch_size
        return self.data.train_batches(self.seeds, size, self.step, self.num_steps)

    def dispatches(self) -> Iterator[Any]:
        """The same as ``compile``'s train step takes them: batches, and Groups of them."""
        data, size = self.data, self.config.batch_size
        split = distributed.group_sharding(self.mesh)
        parts = data.host_batches(self.seeds, size, self.step, self.num_steps)
        with contextlib.closing(parts):
            for count in self.taken:
                several = list(itertools.islice(parts, count))
                if count == 1:
                    yield data.place(several[0])
                else:
                    stacked = jax.tree.map(lambda *x: np.stack(x), *several)
                    yield dispatch.Group(distributed.put_local(split, stacked))

    def evaluate(
        self, step: Callable[..., metrics.Sums], stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Evaluates the state on the whole evaluation split, every example once.

        Args:
          step: an eval step.
          stop: asked before each batch; where it says so, Preempted is raised.
        """

        def batches() -> Iterator[Batch]:
            for batch in self.data.in_order("eval", self.config.eval_batch_size):
                if stop():
                    raise Preempted
                yield batch

        jax.block_until_ready(self.state)  # the last steps are no part of the evaluation
        began = time.perf_counter()
        try:
            with self.eval_memory():
                self.evaluation, self.confusion = evaluate(step, self.state, batches())
        finally:  # one that was stopped took its time too
            self.spent["evaluate"] += time.perf_counter() - began


def held(state: TrainState, mesh: Mesh, kind: distributed.StateSharding) -> Any:
    """A sharding for each array of a state."""
    shardings = jax.tree.map(lambda _: distributed.replicated(mesh), state)
    parts = {name: getattr(state, name) for name in SPLIT_PARTS[kind]}
    return shardings.replace(**distributed.split_shardings(mesh, parts))


def evaluate(
    step: Callable[..., metrics.Sums], state: TrainState, batches: Iterable[Batch]
) -> tuple[dict[str, float], np.ndarray]:
    """Runs an eval step over batches.

    Returns:
      (means of the metrics over all examples, int (K, K) confusion counts).
    """
    total = metrics.evaluated(functools.partial(step, state), batches)
    confusion = total.pop("confusion").astype(np.int64)
    return metrics.means([total]), confusion
