"""The compiled programs of a run: one training step, several in one dispatch, one evaluation step.

Which steps go together in a dispatch follows from their numbers alone: groups of n begin at
multiples of n, and where something is logged, evaluated or saved inside of one, or the run ends,
its steps are taken singly. So a run that is resumed, with the same n or another, takes the same
steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from flax_resnet.data.batches import Data
from flax_resnet.data.order import take
from flax_resnet.distributed import sharding
from flax_resnet.training import guards
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.step import LOSSES, TrainState, eval_step, look_ahead, train_step
from flax_resnet.xla import backend

SPLIT_PARTS: Mapping[str, tuple[str, ...]] = {
    "replicated": (),
    "zero": ("opt_state", "ema"),
    "fsdp": ("opt_state", "ema", "params"),
}


class Group(NamedTuple):
    """What n steps get; networks that train together have a second axis of their own."""

    batch: Any
    """Rows of a resident set, int32 (n, B), as ``Data.host_batches`` says; else (n, B, ...)."""


class Compiled(NamedTuple):
    """The programs of a run, and the seconds that compiling took."""

    train_step: Callable[..., Any]
    """(state, a batch or a Group) to (state, metric sums); the state is donated."""
    eval_step: Callable[..., Any]
    """(state, batch) to metric sums."""
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepPrograms:
    """Makes and compiles the steps of a run.

    Attributes:
      config: the run; of networks that train together, the first of their configs.
      state: the state that the steps take, or its shapes and shardings.
      leading_axes: (S,) where the state is that of S networks that train together, or ().
    """

    config: TrainConfig
    mesh: Mesh
    data: Data
    num_steps: int
    state: TrainState
    leading_axes: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Steps that go together in a dispatch, where so many do."""
        return min(self.config.steps_per_dispatch, self.num_steps)

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
        gathered = partial(sharding.gathered, self.mesh)
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
        if self.leading_axes:
            return jax.vmap(step), jax.vmap(evaluate, in_axes=(0, None))
        return step, evaluate

    def compile(self, lengths: Iterable[int]) -> Compiled:
        """Compiles what dispatches of so many steps need, and the eval step."""
        began = time.perf_counter()
        steps = self._compile_training(set(lengths) or {1}), self.compile_evaluation()
        return Compiled(*steps, time.perf_counter() - began)

    def _compile_training(self, lengths: set[int]) -> Callable[..., Any]:
        """The programs of one step, of ``group_size`` steps, or both."""
        single = {1: self.compile_step()} if 1 in lengths else {}
        if lengths == {1}:
            return single[1]
        several, resident = self.compile_group()

        def step(state: Any, batch: Any) -> Any:
            if isinstance(batch, Group):
                return several(state, resident, batch.batch)
            return single[1](state, batch)

        return step

    def compile_step(self) -> Callable[..., Any]:
        """The train step, compiled for the mesh, its state donated."""
        batch = self._batch(*self.leading_axes, self.config.batch_size)
        memory = step_memory(self.config, self.mesh)
        return self._compiled(self.steps()[0], self._shardings, memory, batch, donate_argnums=0)

    def compile_group(self) -> tuple[jax.stages.Compiled, Any]:
        """(program of ``group_size`` train steps, the training split where it is resident).

        The program takes the state, the split, and what ``Group.batch`` is; it gives the state and
        the sums of every step, stacked.
        """
        config, mesh, resident = self.config, self.mesh, self.data.resident
        split, constrain = sharding.group_sharding(mesh), jax.lax.with_sharding_constraint

        def batch_of(arrays: Any, rows: Any) -> Any:
            return constrain(take(arrays, rows), sharding.batch_sharding(mesh))

        of_state, of_sums = self._shardings
        # In a while loop a convolution's backward pass is some 20 times slower on a CPU.
        steps = grouped(
            self.steps()[0],
            lambda state: constrain(state, of_state),
            batch_of if resident else None,
            unroll=backend.is_cpu(),
        )
        like = self._batch(self.group_size, *self.leading_axes, config.batch_size, placed=split)
        if resident:
            like = {"row": like["label"]} | {n: x for n, x in like.items() if n == "epoch"}
        arrays = self.data.train_arrays if resident else None
        out = of_state, split if self.leading_axes else of_sums
        memory = step_memory(config, mesh)
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
        memory = eval_memory(self.config, self.mesh)
        return self._compiled(self.steps()[1], self._shardings[1], memory, batch)

    def _compiled(
        self, step: Callable[..., Any], out: Any, memory: Any, *like: Any, **options: Any
    ) -> jax.stages.Compiled:
        """``step``, compiled for the mesh, of the state and what ``like`` describes."""
        options |= {"out_shardings": out, "compiler_options": backend.compiler_options()}
        with memory:
            return jax.jit(step, **options).lower(self.state, *like).compile()

    @property
    def _shardings(self) -> tuple[Any, NamedSharding]:
        """Shardings of the state and of metric sums; devices share networks that train together."""
        if self.leading_axes:
            return (sharding.batch_sharding(self.mesh),) * 2
        state = state_sharding(self.state, self.mesh, self.config.sharding)
        return state, sharding.replicated(self.mesh)

    def _batch(self, *images: int, placed: NamedSharding | None = None) -> dict[str, Any]:
        """Shapes, dtypes and sharding of a training batch with leading axes ``images``."""
        placed = placed or sharding.batch_sharding(self.mesh)
        kind = jnp.float32 if self.config.cache_features else jnp.uint8
        image = jax.ShapeDtypeStruct((*images, *self.data.batch_shape), kind, sharding=placed)
        label = jax.ShapeDtypeStruct(images, jnp.int32, sharding=placed)
        rows = {"row": label, "epoch": label} if self.config.augment.alternating_flip else {}
        return {"image": image, "label": label, **rows}


def state_sharding(state: TrainState, mesh: Mesh, kind: sharding.StateSharding) -> Any:
    """A sharding for each array of a state."""
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), state)
    parts = {name: getattr(state, name) for name in SPLIT_PARTS[kind]}
    return shardings.replace(**sharding.split_shardings(mesh, parts))


def step_memory(config: TrainConfig, mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Turns running out of memory in training into one line."""
    size, devices = config.batch_size, mesh.size
    return guards.memory_advice(
        f"batch_size={size}, {size // devices // config.accum_steps} images at once on each of "
        f"{devices} devices; set a larger --accum-steps (the same step in smaller parts), "
        "--model.remat (computes blocks again), --model.dtype bfloat16, --sharding fsdp (on "
        "several devices) or a smaller --batch-size"
    )


def eval_memory(config: TrainConfig, mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Turns running out of memory in evaluation into one line."""
    return guards.memory_advice(
        f"eval_batch_size={config.eval_batch_size} over {mesh.size} devices; set a smaller "
        "--eval-batch-size or --model.dtype bfloat16"
    )


def steps_in(batch: Any) -> int:
    """Steps that a call with ``batch`` takes."""
    return len(jax.tree.leaves(batch.batch)[0]) if isinstance(batch, Group) else 1


def dispatch_lengths(first: int, end: int, size: int, pauses: Sequence[int]) -> Iterator[int]:
    """Steps of each dispatch, ``size`` or 1, from step ``first`` to ``end``.

    The loop does something after the steps that one of ``pauses`` divides.
    """
    while first < end:
        after = first + size
        whole = first % size == 0 and after <= end
        whole = whole and all((first // every + 1) * every >= after for every in pauses)
        yield (taken := size if whole else 1)
        first += taken


def grouped(
    step: Callable[..., Any],
    place: Callable[[Any], Any],
    rows_of: Callable[[Any, Any], Any] | None,
    *,
    unroll: bool,
) -> Callable[..., Any]:
    """(state, resident, batch of a Group) to (state, sums with an axis of steps): to be jitted.

    ``place`` fixes how the state lies on the devices between two steps; ``rows_of`` makes a batch
    of (resident, rows), None where the rows are the batch.
    """

    def train_steps(state: Any, resident: Any, batch: Any) -> Any:
        def one(state: Any, rows: Any) -> Any:
            state, sums = step(state, rows if rows_of is None else rows_of(resident, rows))
            return place(state), sums

        return jax.lax.scan(one, state, batch, unroll=unroll)

    return train_steps


def by_step(sums: Iterable[Mapping[str, Any]], axes: int) -> list[dict[str, Any]]:
    """The sums of each step, on the host, from those of steps and of groups.

    The sums of one step have ``axes`` axes: 1 when networks train together, else 0.
    """
    steps: list[dict[str, Any]] = []
    for one in jax.device_get(list(sums)):
        if np.ndim(one["loss"]) == axes:
            steps.append(dict(one))
        else:
            steps += [{name: x[i] for name, x in one.items()} for i in range(len(one["loss"]))]
    return steps
