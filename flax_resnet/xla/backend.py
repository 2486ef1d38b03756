"""The backend that programs are compiled for, and compiler options for a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import jax

from flax_resnet.errors import UserError

YNN = "xla_cpu_experimental_ynn_fusion_type"
# XLA gives convolutions to YNNPACK and sums to its own loops; the other way round is faster.
FUSION_TYPES = "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"

REFUSED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "jax_disable_jit": (True,),  # the steps are compiled ahead
    "jax_numpy_rank_promotion": ("raise",),
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_transfer_guard": ("disallow", "disallow_explicit"),
    "jax_check_tracer_leaks": (True,),
}
"""{setting of JAX: its values with which the programs of this library, or of flax, do not run}."""

_target: ContextVar[Literal["cpu", "any"] | None] = ContextVar("target", default=None)


def is_cpu() -> bool:
    """Whether programs are compiled for a CPU alone."""
    return (_target.get() or jax.default_backend()) == "cpu"


@contextlib.contextmanager
def traced_for(target: Literal["cpu", "any"]) -> Iterator[None]:
    """What is traced within has the forms for a CPU, or the plain ones for any backend.

    A function under ``jax.jit`` must be a new one: a trace from outside is found in its cache.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)


def check_settings() -> None:
    """Raises UserError where JAX is told to work in a way in which no program here runs."""
    for name, refused in REFUSED_SETTINGS.items():
        value = getattr(jax.config, name)
        if getattr(value, "value", value) in refused:  # some are enums
            raise UserError(
                f"{name.upper()}={value}: programs here do not work with it; unset it in "
                f"the environment, or where your program calls jax.config.update({name!r}, ...)"
            )


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compiler_options() -> dict[str, Any] | None:
    """What to give ``jax.jit(..., compiler_options=...)``; a choice in $XLA_FLAGS stands."""
    if not is_cpu() or YNN in os.environ.get("XLA_FLAGS", ""):
        return None
    return {YNN: FUSION_TYPES}
