"""Optimizers and learning-rate schedules: frozen dataclasses that build optax transformations.

An optimizer holds a peak learning rate and a schedule. A schedule is a shape in shares of the run
and learns the run's length only when it is built: a config cut down to a trial keeps its shape.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flax_resnet.errors import POSITIVE, UserError, check_range

# A stage's number that no network has.
LAST = 10**6


def _check_shares(name: str, values: Sequence[float], owner: str = "schedule") -> None:
    for value in values:
        if not 0 <= value < 1:
            raise UserError(
                f"{owner}.{name}={value}: expected a share of the run, 0 up to 1 (30 of 90 epochs "
                "is 0.3333)"
            )


@dataclasses.dataclass(frozen=True)
class Constant:
    """The peak learning rate throughout, after an optional linear warm-up."""

    warmup: float = 0.0
    """Share of the run spent rising linearly to the peak (Goyal et al. 2017: 5 / 90)."""
    warmup_start: float = 0.0
    """Learning rate at step 0 of the warm-up, as a share of the peak."""

    def __post_init__(self) -> None:
        _check_shares("warmup", [self.warmup])

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
        _check_shares("boundaries", self.boundaries)

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
class OneCycle:
    """Up to the peak and down to near zero, both by half cosines (Smith and Topin 2018)."""

    rise: float = 0.3
    """Share of the run spent rising."""
    start_divisor: float = 25.0
    """The first rate is the peak over this."""
    final_divisor: float = 1e4
    """The last rate is the first over this."""

    def __post_init__(self) -> None:
        _check_shares("rise", [self.rise])

    def build(self, peak: float, num_steps: int) -> optax.Schedule:
        """The optax schedule, step (int) to learning rate, for a run of ``num_steps``."""
        return optax.cosine_onecycle_schedule(
            num_steps, peak, self.rise, self.start_divisor, self.final_divisor
        )


@dataclasses.dataclass(frozen=True)
class ReduceOnPlateau(Constant):
    """Multiplied by ``factor`` when the training loss, averaged over an epoch, stops falling.

    The decision is taken inside the compiled step from optimizer state, so it is resumed with
    the rest and works under vmap. It watches the training loss, not an evaluation.
    """

    factor: float = 0.1
    """What the rate is multiplied by."""
    patience: int = 5
    """Epochs without improvement before it is."""
    min_improvement: float = 1e-4
    """Relative fall of the loss that counts as improvement."""
    min_scale: float = 1e-4
    """The product of all reductions stops here."""


Schedule = Constant | Piecewise | Cosine | OneCycle | ReduceOnPlateau


@dataclasses.dataclass(frozen=True)
class _Optimizer:
    learning_rate: float = 1e-3
    """Peak learning rate; the schedule shapes it."""
    schedule: Schedule = Constant()
    """Shape of the learning rate over the run."""
    weight_decay: float = 0.0
    """Weight decay, applied to convolution and dense kernels only."""
    decay_norm_and_bias: bool = False
    """Decay BatchNorm scales, offsets and biases too."""
    max_grad_norm: float | None = None
    """Clip the gradient to this global L2 norm; None does not clip."""
    stage_decay: float = 1.0
    """Learning rate of each stage over that of the next; the head has the full one, and the stem
    the smallest (Howard and Ruder 2018, section 3.2, discriminative fine-tuning)."""
    unfreeze: tuple[float, ...] = ()
    """Shares of the run at which the last stage, the one before it, ... and the stem begin to
    move; those not named never do. Empty: all from the start (section 3.3, gradual unfreezing)."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            if not isinstance(getattr(self, name), jax.Array):  # of networks that train together
                check_range(f"optimizer.{name}", getattr(self, name), 0)
        if self.max_grad_norm != math.inf:  # clips nothing, as None does
            check_range("optimizer.max_grad_norm", self.max_grad_norm, POSITIVE)
        check_range("optimizer.stage_decay", self.stage_decay, 0)
        _check_shares("unfreeze", self.unfreeze, "optimizer")
        if list(self.unfreeze) != sorted(self.unfreeze):
            raise UserError(
                f"optimizer.unfreeze={self.unfreeze}: expected rising shares, the last stage first"
            )

    def build(
        self, num_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
        """Builds the transformation and the schedule that it follows.

        Args:
          num_steps: optimizer steps in the run.
          steps_per_epoch: optimizer steps an epoch.

        Returns:
          (transformation, schedule). ``transformation.update`` takes ``value=``, the loss,
          which only ReduceOnPlateau reads.
        """
        schedule = self.schedule.build(self.learning_rate, num_steps)
        parts = (
            [] if self.max_grad_norm is None else [optax.clip_by_global_norm(self.max_grad_norm)]
        )
        parts += self._core(schedule, True if self.decay_norm_and_bias else is_kernel)
        if isinstance(self.schedule, ReduceOnPlateau):
            parts.append(
                optax.contrib.reduce_on_plateau(
                    factor=self.schedule.factor,
                    patience=self.schedule.patience,
                    rtol=self.schedule.min_improvement,
                    accumulation_size=steps_per_epoch,
                    min_scale=self.schedule.min_scale,
                )
            )
        if self.stage_decay != 1 or self.unfreeze:
            starts = tuple(round(share * num_steps) for share in self.unfreeze)
            parts.append(scale_by_stage(self.stage_decay, starts))
        return optax.with_extra_args_support(optax.chain(*parts)), schedule

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SGD(_Optimizer):
    """Stochastic gradient descent; weight decay is added to the gradient, as in the papers."""

    learning_rate: float = 0.1
    """Peak learning rate; the schedule shapes it."""
    momentum: float = 0.9
    """Share of the velocity kept at each step."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        return [
            *_l2(self.weight_decay, mask),
            optax.sgd(schedule, self.momentum or None, self.nesterov),
        ]


@dataclasses.dataclass(frozen=True)
class Adam(_Optimizer):
    """Adam (Kingma and Ba 2015); weight decay is added to the gradient."""

    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment (the paper's; Keras says 1e-7)."""

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        return [*_l2(self.weight_decay, mask), optax.adam(schedule, self.b1, self.b2, self.eps)]


@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    weight_decay: float = 1e-2
    """Decoupled decay, multiplied by the learning rate; kernels only."""

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        return [
            optax.adamw(
                schedule, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=mask
            )
        ]


@dataclasses.dataclass(frozen=True)
class LARS(SGD):
    """Layer-wise adaptive rates for large batches (You, Gitman and Ginsburg 2017)."""

    trust_coefficient: float = 0.001
    """Share of the weight norm that one step may move; kernels only."""

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        return [
            optax.lars(
                schedule,
                self.weight_decay,
                mask,
                self.trust_coefficient,
                trust_ratio_mask=is_kernel,
                momentum=self.momentum,
                nesterov=self.nesterov,
            )
        ]


@dataclasses.dataclass(frozen=True)
class LAMB(AdamW):
    """Adam with layer-wise trust ratios (You et al. 2020)."""

    eps: float = 1e-6
    """Added to the root of the second moment."""

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        return [optax.lamb(schedule, self.b1, self.b2, self.eps, 0.0, self.weight_decay, mask)]


Optimizer = SGD | Adam | AdamW | LARS | LAMB


def linear_scaled_lr(base: float, batch_size: int, base_batch_size: int = 256) -> float:
    """The linear scaling rule of Goyal et al. 2017, section 2.1: ``base * batch / base_batch``."""
    return base * batch_size / base_batch_size


def is_kernel(params: Any) -> Any:
    """A tree of bools shaped like ``params``: True at leaves named ``kernel``.

    By name and not by rank, so it also holds for parameters stacked over blocks or seeds.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


def scale_by_stage(decay: float, starts: Sequence[int] = ()) -> optax.GradientTransformation:
    """Scales the updates of a stage by its distance from the head; last in a chain.

    Args:
      decay: the scale is decay ** d, with d 0 for the head, 1 for the last stage (and a last
        norm), and so on to the stem.
      starts: steps from which d = 1, 2, ... are updated; those beyond the end never are. Empty:
        all from the start. Moments are gathered before that too.
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
    for key in path:
        name = str(getattr(key, "key", ""))
        if found := re.match(r"stage(\d+)_", name):
            return int(found[1])
        if name.startswith("stem_"):
            return 0
        if name == "final_norm":
            return LAST
    return None


def learning_rate_at(schedule: optax.Schedule, opt_state: Any, step: int) -> jax.Array:
    """The rate that the update from ``step`` to ``step + 1`` uses, plateau reductions included."""
    states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_plateau) if _is_plateau(leaf)]
    scale = states[0].scale if states else 1.0
    return jnp.asarray(schedule(step)) * scale


def _is_plateau(node: Any) -> bool:
    return isinstance(node, optax.contrib.ReduceLROnPlateauState)


def _l2(weight_decay: float, mask: Any) -> list[optax.GradientTransformation]:
    if not isinstance(weight_decay, jax.Array) and weight_decay == 0:
        # With the state of one that decays, so that networks with and without train together.
        return [optax.masked(optax.identity(), mask)]
    return [optax.add_decayed_weights(weight_decay, mask)]
