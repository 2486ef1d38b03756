"""What stops a run that goes wrong: a loss that diverges, and memory that does not suffice."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.errors import POSITIVE, UserError, check_range, check_types


@dataclasses.dataclass(frozen=True)
class Guard:
    """What to do when a run goes wrong."""

    times_chance: float = 100.0
    """The run has diverged when the training loss is not a number, or, on average over a log
    interval, so many times that of the first one and of guessing (ln of the classes; of
    binary_cross_entropy ln 2)."""
    report_after: float = 60.0
    """Seconds without a batch, a step or a save after which the terminal says so."""

    def __post_init__(self) -> None:
        check_types(self, "guard.")
        check_range("guard.times_chance", self.times_chance, POSITIVE)
        check_range("guard.report_after", self.report_after, POSITIVE)

    def limit(self, loss: str, num_classes: int, first: float | None) -> float:
        """The largest mean loss that does not count as diverged, in nats.

        ``first`` is the mean loss of the run's first log interval, which may be large with a fresh
        head on features of any size; None: this is that interval, and any loss is good.
        """
        if first is None:
            return math.inf
        chance = math.log(2) if loss == "binary_cross_entropy" else math.log(max(2, num_classes))
        return self.times_chance * max(chance, first)


class Diverged(UserError):
    """The training loss is not a number any more, or far above what guessing gives."""


def check_loss(sums: Sequence[Mapping[str, Any]], step: int, limit: float) -> None:
    """Raises Diverged where the mean loss of a log interval is above ``limit``, or no number.

    ``sums`` are those of each step up to ``step``, on the host. Networks that train together, whose
    sums have a leading axis, diverge when all do.
    """
    totals = np.array([one["loss"] for one in sums], np.float64)
    counts = np.array([one["count"] for one in sums], np.float64)

    def is_good(loss: np.ndarray) -> bool:
        return bool(np.any(np.isfinite(loss) & (loss <= limit)))

    if not is_good(totals.sum(0) / counts.sum(0)):
        losses = totals / counts
        first = next((i for i, loss in enumerate(losses) if not is_good(loss)), len(sums) - 1)
        bad = step - len(sums) + 1 + first
        shown = np.max(losses[first])
        raise Diverged(f"the run diverged: the training loss is {shown:.4g} nats at step {bad}")


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number in a tree is finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


@contextlib.contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turns running out of memory into one line, which ends with what helps."""
    try:
        yield
    except MemoryError as error:
        raise UserError(
            "out of this machine's memory: take fewer --data.num-workers, a smaller "
            "--data.resident-mb, or smaller batches"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "ut of memory")):
            raise
        raise UserError(f"out of memory: {advice} ({first[:120]})") from error
