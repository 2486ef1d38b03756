"""Optax transformations that treat parameters by their names, as the networks here give them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

# A stage's number that no network has.
LAST = 10**6


def scale_by_stage(decay: float, starts: Sequence[int] = ()) -> optax.GradientTransformation:
    """Scales the updates of a stage by ``decay ** d``; last in a chain.

    Args:
      decay: d is 0 for the head, 1 for the last stage (and a last norm), and so on to the stem.
      starts: steps from which d = 1, 2, ... are updated; those beyond the end never are. Empty:
        all from the start.
    """

    def init(params: Any) -> Any:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        numbers = [_stage(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
        stages = max((n for n in numbers if n is not None and n != LAST), default=0)

        def scaled(path: Any, update: jax.Array) -> jax.Array:
            stage = _stage(path)
            distance = 0 if stage is None else stages + 1 - min(stage, stages)
            scale = jnp.asarray(decay**distance, update.dtype)
            if distance and starts:
                late = distance > len(starts)
                moves = False if late else state.count >= starts[distance - 1]
                scale = jnp.where(moves, scale, 0).astype(update.dtype)
            return scale * update

        count = optax.safe_increment(state.count)
        return jax.tree_util.tree_map_with_path(scaled, updates), state._replace(count=count)

    return optax.GradientTransformation(init, update)


def _stage(path: Any) -> int | None:
    """Stage of a parameter: 0 the stem, None the top; a last norm is past every stage."""
    for name in _names(path):
        if found := re.match(r"stage(\d+)_", name):
            return int(found[1])
        if name.startswith("stem_"):
            return 0
        if name == "final_norm":
            return LAST
    return None


def _names(path: Any) -> list[str]:
    return [str(getattr(key, "key", "")) for key in path]


def is_norm_bias(path: Any) -> bool:
    """True for the offset of a norm."""
    *_, owner, name = ["", *_names(path)]
    return "norm" in owner and name == "bias"


def is_hidden_kernel(params: Any) -> Any:
    """A tree of bools: True at the kernels of layers before the head."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _names(path)[-1] == "kernel" and "head" not in _names(path), params
    )


def as_matrices(kernels: Any) -> Any:
    """How Muon reads kernels as matrices: all axes but the last one by the last."""
    return jax.tree.map(
        lambda x: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), (x.ndim - 1,)),
        kernels,
    )


def scale_where(which: Callable[[Any], bool], factor: float) -> optax.GradientTransformation:
    """Multiplies the updates at the paths where ``which`` says so."""

    def one(path: Any, update: jax.Array) -> jax.Array:
        return update * jnp.asarray(factor, update.dtype) if which(path) else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(one, updates))
