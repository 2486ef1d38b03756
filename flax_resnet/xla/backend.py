"""The backend that programs are compiled for, and compiler options for a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import jax

YNN = "xla_cpu_experimental_ynn_fusion_type"
# By default XLA gives convolutions to YNNPACK, which has no fast gradient of a kernel, and sums
# over the batch to its own loops; the other way round both are faster.
FUSION_TYPES = "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"

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


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compiler_options() -> dict[str, Any] | None:
    """What to give ``jax.jit(..., compiler_options=...)``: options for a CPU, None elsewhere.

    A choice in $XLA_FLAGS stands.
    """
    if not is_cpu() or YNN in os.environ.get("XLA_FLAGS", ""):
        return None
    return {YNN: FUSION_TYPES}
