"""Learning-rate schedules: shapes in shares of the run, that learn its length when it is built."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

import optax
import optax.contrib

from flax_resnet.errors import UserError, check_types


def check_shares(name: str, values: Sequence[float], owner: str = "schedule") -> None:
    """Raises UserError unless each value is a share of the run, 0 up to 1."""
    for value in values:
        if not 0 <= value < 1:
            raise UserError(
                f"{owner}.{name}={value}: expected a share of the run, 0 up to 1 (30 of 90 epochs "
                "is 0.3333)"
            )


@dataclasses.dataclass(frozen=True)
class Shape(abc.ABC):
    """Base of every schedule, and of one of your own: a frozen dataclass with ``build``."""

    @abc.abstractmethod
    def build(self, peak: float, num_steps: int) -> optax.Schedule:
        """The optax schedule, step (int) to learning rate, for a run of ``num_steps``."""


@dataclasses.dataclass(frozen=True)
class Constant(Shape):
    """The peak learning rate throughout, after an optional linear warm-up."""

    warmup: float = 0.0
    """Share of the run spent rising linearly to the peak (Goyal et al. 2017: 5 / 90)."""
    warmup_start: float = 0.0
    """Learning rate at step 0 of the warm-up, as a share of the peak."""

    def __post_init__(self) -> None:
        check_types(self, "schedule.")
        check_shares("warmup", [self.warmup])

    def build(self, peak: float, num_steps: int) -> optax.Schedule:
        """The optax schedule, step (int) to learning rate, for a run of ``num_steps``."""
        warmup_steps = min(round(self.warmup * num_steps), num_steps - 1)
        rest = self._after_warmup(peak, num_steps - warmup_steps)
        if not warmup_steps:
            return rest
        rise = optax.linear_schedule(peak * self.warmup_start, peak, warmup_steps)
        return optax.join_schedules([rise, rest], [warmup_steps])

    def _after_warmup(self, peak: float, num_steps: int) -> optax.Schedule:
        return optax.constant_schedule(peak)


@dataclasses.dataclass(frozen=True)
class Piecewise(Constant):
    """Multiplied by ``factor`` at each boundary (He et al. 2016, section 4.2: 32k, 48k of 64k)."""

    boundaries: tuple[float, ...] = (0.5, 0.75)
    """Where to drop, as shares of the steps after the warm-up."""
    factor: float = 0.1
    """What the rate is multiplied by at each boundary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares("boundaries", self.boundaries)

    def _after_warmup(self, peak: float, num_steps: int) -> optax.Schedule:
        drops = {round(share * num_steps): self.factor for share in self.boundaries}
        return optax.piecewise_constant_schedule(peak, drops)


@dataclasses.dataclass(frozen=True)
class Cosine(Constant):
    """Half a cosine from the peak to ``final`` of it (Loshchilov and Hutter 2017, no restarts)."""

    final: float = 0.0
    """The last learning rate, as a share of the peak."""

    def _after_warmup(self, peak: float, num_steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(peak, num_steps, self.final)


@dataclasses.dataclass(frozen=True)
class OneCycle(Shape):
    """Up to the peak and down to near zero, both by half cosines (Smith and Topin 2018)."""

    rise: float = 0.3
    """Share of the run spent rising."""
    start_divisor: float = 25.0
    """The first rate is the peak over this."""
    final_divisor: float = 1e4
    """The last rate is the first over this."""

    def __post_init__(self) -> None:
        check_types(self, "schedule.")
        check_shares("rise", [self.rise])

    def build(self, peak: float, num_steps: int) -> optax.Schedule:
        """The optax schedule, step (int) to learning rate, for a run of ``num_steps``."""
        return optax.cosine_onecycle_schedule(
            num_steps, peak, self.rise, self.start_divisor, self.final_divisor
        )


@dataclasses.dataclass(frozen=True)
class ReduceOnPlateau(Constant):
    """Multiplied by ``factor`` when the training loss, averaged over an epoch, stops falling."""

    factor: float = 0.1
    """What the rate is multiplied by."""
    patience: int = 5
    """Epochs without improvement before it is."""
    min_improvement: float = 1e-4
    """Relative fall of the loss that counts as improvement."""
    min_scale: float = 1e-4
    """The product of all reductions stops here."""

    def reductions(self, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
        """The transformation that reduces updates when the loss, ``value=``, stops falling."""
        return optax.contrib.reduce_on_plateau(
            self.factor,
            self.patience,
            rtol=self.min_improvement,
            accumulation_size=steps_per_epoch,
            min_scale=self.min_scale,
        )


Schedule = Constant | Piecewise | Cosine | OneCycle | ReduceOnPlateau | Shape
