"""What measurements share: the hardware's record, and times with their spread."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


def hardware() -> dict[str, Any]:
    """The device, the processor and the version of jax that a measurement was made with."""
    devices = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return {**devices, **machine()}


def machine() -> dict[str, Any]:
    """As ``hardware``, but nothing is asked of the devices, which stay free for other processes."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
    }


def _processor() -> str:
    """The processor's name; where there is no /proc/cpuinfo, its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def device_peak() -> int | None:
    """Most bytes of the first device's memory so far; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of something done ``n`` times."""

    median: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Sums up single measurements, one or more."""
        return cls(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}-{self.most:.3g})"


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """A Timing's fields, of seconds over those of a reference, round by round."""
    each = [one / other for one, other in zip(seconds, reference, strict=True)]
    return dataclasses.asdict(Timing.of(each))


def timed(function: Callable[..., Result], *args: Any) -> tuple[Result, float]:
    """(what ``function(*args)`` returns, seconds until its arrays are computed)."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start
