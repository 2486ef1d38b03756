"""Optimizers: frozen dataclasses that build optax transformations.

An optimizer holds a peak learning rate and a schedule. A schedule is a shape in shares of the run
and learns the run's length only when it is built: a config cut down to a trial keeps its shape.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from flax_resnet.errors import POSITIVE, UserError, check_range, check_types
from flax_resnet.optim.schedules import Constant as Constant
from flax_resnet.optim.schedules import Cosine as Cosine
from flax_resnet.optim.schedules import OneCycle as OneCycle
from flax_resnet.optim.schedules import Piecewise as Piecewise
from flax_resnet.optim.schedules import ReduceOnPlateau as ReduceOnPlateau
from flax_resnet.optim.schedules import Schedule as Schedule
from flax_resnet.optim.schedules import check_shares
from flax_resnet.optim.transforms import (
    as_matrices,
    is_hidden_kernel,
    is_norm_bias,
    scale_by_stage,
    scale_where,
)


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
    norm_bias_scale: float = 1.0
    """What the gradient of the norms' offsets is multiplied by, before decay is added: with SGD
    their learning rate over the others' (64 in K. Jordan 2024). Adam takes no notice."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        for name in ("learning_rate", "weight_decay", "stage_decay", "norm_bias_scale"):
            check_range(f"optimizer.{name}", getattr(self, name), 0)
        if self.max_grad_norm != math.inf:  # clips nothing, as None does
            check_range("optimizer.max_grad_norm", self.max_grad_norm, POSITIVE)
        check_shares("unfreeze", self.unfreeze, "optimizer")
        if list(self.unfreeze) != sorted(self.unfreeze):
            raise UserError(
                f"optimizer.unfreeze={self.unfreeze}: expected rising shares, the last stage first"
            )

    def build(
        self, num_steps: int, steps_per_epoch: int
    ) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
        """(transformation, schedule) for a run of so many steps, and steps an epoch.

        ``transformation.update`` takes ``value=``, the loss, which only ReduceOnPlateau reads.
        """
        schedule, parts = self.schedule.build(self.learning_rate, num_steps), []
        if self.max_grad_norm is not None:
            parts.append(optax.clip_by_global_norm(self.max_grad_norm))
        if self.norm_bias_scale != 1:
            parts.append(scale_where(is_norm_bias, self.norm_bias_scale))
        parts += self._core(schedule, True if self.decay_norm_and_bias else is_kernel)
        if isinstance(self.schedule, ReduceOnPlateau):
            parts.append(self.schedule.reductions(steps_per_epoch))
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
        decay: Any = {"weight_decay": self.weight_decay, "mask": mask}
        return [optax.adamw(schedule, self.b1, self.b2, self.eps, **decay)]


@dataclasses.dataclass(frozen=True)
class LARS(SGD):
    """Layer-wise adaptive rates for large batches (You, Gitman and Ginsburg 2017)."""

    trust_coefficient: float = 0.001
    """Share of the weight norm that one step may move; kernels only."""

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        return [
            optax.lars(
                *(schedule, self.weight_decay, mask, self.trust_coefficient),
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


@dataclasses.dataclass(frozen=True)
class Muon(_Optimizer):
    """Momentum made orthogonal, for the kernels before the head (K. Jordan 2024, "Muon").

    A convolution's kernel is the matrix of all its taps by its filters. What is left, the head and
    what is no kernel, goes by Nesterov's momentum at a rate of its own.
    """

    learning_rate: float = 0.02
    """Peak learning rate; the schedule shapes it."""
    momentum: float = 0.95
    """Share of the averaged gradient kept at each step."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    ns_steps: int = 5
    """Steps of the Newton-Schulz iteration that makes it orthogonal."""
    rest_scale: float = 5.0
    """Learning rate of what is left over that of the kernels."""
    rest_momentum: float = 0.9
    """Its share of the velocity kept at each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("optimizer.momentum", self.momentum, 0, 1)
        check_range("optimizer.ns_steps", self.ns_steps, 1)
        check_range("optimizer.rest_scale", self.rest_scale, 0)

    def _core(self, schedule: optax.Schedule, mask: Any) -> list[optax.GradientTransformation]:
        muon = optax.contrib.scale_by_muon(
            ns_steps=self.ns_steps,
            beta=self.momentum,
            nesterov=self.nesterov,
            weight_dimension_numbers=as_matrices,
        )
        momentum = optax.trace(self.rest_momentum, self.nesterov)
        rest = optax.chain(momentum, optax.scale(self.rest_scale))
        return [
            optax.partition({True: muon, False: rest}, is_hidden_kernel),
            *_l2(self.weight_decay, mask),
            optax.scale_by_learning_rate(schedule),
        ]


Optimizer = SGD | Adam | AdamW | LARS | LAMB | Muon


def decoupled(
    learning_rate: float, weight_decay: float, momentum: float, batch_size: int
) -> dict[str, Any]:
    """SGD's fields for airbench's rate and decay (K. Jordan 2024; Page 2019).

    Both are for a sum of losses over 1024 examples. Nesterov's momentum, which makes steps
    1 + 1 / (1 - momentum) times as long, is divided out.

    Args:
      learning_rate: of 1024 examples.
      weight_decay: of 1024 examples, not multiplied by the learning rate.
      momentum: Nesterov's.
      batch_size: images in a step; the loss is their mean.

    Returns:
      "learning_rate", "weight_decay" and "momentum" of an SGD with nesterov.
    """
    longer = 1 + 1 / (1 - momentum)
    return {
        "learning_rate": learning_rate * batch_size / 1024 / longer,
        "weight_decay": weight_decay / learning_rate,
        "momentum": momentum,
    }


def linear_scaled_lr(base: float, batch_size: int) -> float:
    """The linear scaling rule of Goyal et al. 2017, section 2.1: ``base * batch_size / 256``."""
    return base * batch_size / 256


def is_kernel(params: Any) -> Any:
    """A tree of bools shaped like ``params``: True at leaves named ``kernel``.

    By name and not by rank, so it also holds for parameters stacked over blocks or seeds.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == "kernel", params
    )


def learning_rate_at(schedule: optax.Schedule, opt_state: Any, step: int) -> jax.Array:
    """The rate that the update from ``step`` to ``step + 1`` uses, plateau reductions included."""
    kind = optax.contrib.ReduceLROnPlateauState
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    scale = next((node.scale for node in nodes if isinstance(node, kind)), 1.0)
    return jnp.asarray(schedule(step)) * scale


def _l2(weight_decay: float, mask: Any) -> list[optax.GradientTransformation]:
    if weight_decay == 0:
        # The optimizer's state has the same shape as with a decay; checkpoints hold it.
        return [optax.masked(optax.identity(), mask)]
    return [optax.add_decayed_weights(weight_decay, mask)]
