"""Several training steps in one call of a compiled program: which, what they get, what they do.

Which steps go together follows from their numbers alone: groups of n begin at multiples of n, and
where something is logged, evaluated or saved inside of one, or the run ends, its steps are taken
singly. So a run that is resumed, with the same n or another, takes the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Group(NamedTuple):
    """What n steps get; networks that train together have a second axis of their own."""

    batch: Any
    """Rows of a resident set, int32 (n, B), as ``Data.host_batches`` says; else (n, B, ...)."""


def num_steps(batch: Any) -> int:
    """Steps that a call with ``batch`` takes."""
    return len(jax.tree.leaves(batch.batch)[0]) if isinstance(batch, Group) else 1


def lengths(first: int, end: int, size: int, pauses: Sequence[int]) -> Iterator[int]:
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
    """(state, held, batch of a Group) to (state, sums with an axis of steps): to be jitted.

    Args:
      step: the step of one batch.
      place: fixes how the state lies on the devices between two steps.
      rows_of: (held, rows) to a batch; None: the rows are the batch.
      unroll: write the steps behind one another, and no loop.
    """

    def train_steps(state: Any, held: Any, batch: Any) -> Any:
        def one(state: Any, rows: Any) -> Any:
            state, sums = step(state, rows if rows_of is None else rows_of(held, rows))
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
