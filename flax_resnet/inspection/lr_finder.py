"""The learning-rate range test: the loss while the rate rises from step to step."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.distributed import sharding
from flax_resnet.errors import POSITIVE, UserError, check_range
from flax_resnet.optim.schedules import Shape
from flax_resnet.training.setup import set_up

SMOOTHING = 0.9
DIVERGED = 4.0


@dataclasses.dataclass(frozen=True)
class Rising(Shape):
    """A schedule from ``lowest`` to the peak, by the same factor at each step."""

    lowest: float

    def build(self, peak: float, num_steps: int) -> Callable[[Any], jax.Array]:
        """Step to learning rate: ``lowest`` at step 0, ``peak`` at the last."""
        factor = math.log(peak / self.lowest) / max(num_steps - 1, 1)
        return lambda step: self.lowest * jnp.exp(factor * jnp.asarray(step, jnp.float32))


@dataclasses.dataclass(frozen=True)
class RateSearch:
    """A range test, up to where it diverged or to its end."""

    rates: np.ndarray
    """Learning rate of each step made, (n,)."""
    losses: np.ndarray
    """Training loss of each step's batch before its update, nats, (n,)."""
    smoothed: np.ndarray
    """The same, averaged exponentially, (n,)."""
    suggestion: float | None
    """The rate at the steepest fall of the smoothed loss before its least; None where there is no
    such fall."""
    diverged: bool
    """It ended because the loss rose beyond 4 times its least, or was not finite."""


def find_rate(
    config: Any, *, lowest: float = 1e-5, highest: float = 10.0, num_steps: int = 100
) -> RateSearch:
    """Trains a fresh state of a run's config while the rate rises (Smith 2017, section 3.3).

    Everything but the rate is the run's: network, data, augmentation, optimizer, loss. The rate
    rises by the same factor at each step, and the test ends where the smoothed loss is 4 times its
    least so far. Nothing is written.

    Args:
      config: the run's TrainConfig.
      lowest: rate of the first step.
      highest: rate of the last one.
      num_steps: steps at most.

    Raises:
      UserError: the range is none, or what the run would say of its config.
    """
    check_range("lowest", lowest, POSITIVE)
    check_range("num_steps", num_steps, 3)
    if not lowest < highest < math.inf:
        raise UserError(f"lowest={lowest} and highest={highest}: expected a range that rises")
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=highest, schedule=Rising(lowest)
    )
    here = dataclasses.replace(config.checkpoint, directory=None)  # not where a run of it is
    config = dataclasses.replace(
        config, optimizer=optimizer, num_steps=num_steps, steps_per_dispatch=1, checkpoint=here
    )
    mesh = sharding.data_mesh(jax.local_devices()[:1])
    with tempfile.TemporaryDirectory() as empty:
        run = set_up(config, Path(empty), mesh)
    step = run.programs.compile_step()
    losses, average, least = [], 0.0, math.inf
    rates: list[float] = []
    smoothed: list[float] = []
    diverged = False
    for batch in run.dispatches():
        run.state, sums = step(run.state, batch)
        run.progress.step += 1
        rates.append(run.learning_rate())
        losses.append(float(sums["loss"]) / float(sums["count"]))
        average = SMOOTHING * average + (1 - SMOOTHING) * losses[-1]
        smoothed.append(average / (1 - SMOOTHING ** len(losses)))
        if not math.isfinite(losses[-1]) or smoothed[-1] > DIVERGED * least:
            diverged = True
            break
        least = min(least, smoothed[-1])
    if diverged and not math.isfinite(losses[-1]):
        del rates[-1], losses[-1], smoothed[-1]
    best = _steepest(np.array(rates), smoothed)
    return RateSearch(np.array(rates), np.array(losses), np.array(smoothed), best, diverged)


def _steepest(rates: np.ndarray, smoothed: list[float]) -> float | None:
    """The rate where the smoothed loss falls fastest by the logarithm of the rate.

    Up to the least smoothed loss, and not in the steps whose average is of a few batches yet.
    """
    first = min(round(1 / (1 - SMOOTHING)), len(rates) // 4)
    end = int(np.argmin(smoothed)) + 1 if smoothed else 0
    if end - first < 3:
        return None
    # Falls over a tenth of the range: from step to step they are noise.
    losses, logs, half = np.array(smoothed), np.log(rates), max(1, len(rates) // 20)
    at = np.arange(len(rates))
    before, after = np.maximum(at - half, 0), np.minimum(at + half, len(rates) - 1)
    slopes = ((losses[after] - losses[before]) / (logs[after] - logs[before]))[first:end]
    best = int(slopes.argmin())
    return float(rates[first + best]) if slopes[best] < 0 else None
