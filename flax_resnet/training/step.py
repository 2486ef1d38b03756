"""TrainState, and the two pure functions of a run: one training step, one evaluation step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from flax_resnet.data.augment import Augment
from flax_resnet.data.normalization import normalize
from flax_resnet.data.tta import Views, averaged_logits
from flax_resnet.models import initialize, trainable
from flax_resnet.models.arguments import as_dtype
from flax_resnet.training import metrics

Batch = dict[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]
LOSSES: dict[str, Loss] = {
    "cross_entropy": metrics.cross_entropy,
    "binary_cross_entropy": metrics.binary_cross_entropy,
}


class TrainState(train_state.TrainState):
    """Flax's TrainState with what else a step needs.

    Attributes:
      batch_stats: running statistics of the norms.
      key: uint32 key data; everything random in a step is folded from it and ``step``.
      normalization: {"mean", "std"} of the input, from the training split.
      ema: {"params", "batch_stats"} averaged over steps, or None.
    """

    batch_stats: Any
    key: jax.Array
    normalization: Any
    ema: Any = None

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        names = ("step", "params", "opt_state", "batch_stats", "key", "normalization", "ema")
        return {name: getattr(self, name) for name in names}

    def variables(self) -> dict[str, Any]:
        """What is evaluated: the averaged variables where there are some."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, int, int],
    normalization: Any,
    *,
    ema: bool = False,
    init: Callable[[jax.Array, Any], Any] | None = None,
) -> TrainState:
    """The state at step 0.

    Args:
      model: called as ``model.apply(variables, images, train=...)``.
      tx: optimizer; its update may take ``value=``, the loss. Parts of the model that are
        frozen are kept from it.
      seed: initialisation follows from it, and the key of all steps.
      image_shape: (H, W, C).
      normalization: {"mean", "std"}, as normalization.statistics gives; with float64 parameters it
        is float64, and so are the images.
      ema: keep averaged variables beside the trained ones.
      init: gives the variables from a key and the images' shape; by default fresh ones.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = init or functools.partial(initialize, model)
    variables = init(init_key, images)
    params = variables["params"]
    if not all(jax.tree.leaves(trainable(model, params))):
        # Frozen parameters get no gradient; weight decay alone would still move them.
        tx = optax.masked(tx, functools.partial(trainable, model))
    # Flax starts running statistics in float32 and would widen them in the first step.
    computed = as_dtype(getattr(model, "dtype", None)) or jnp.float32
    widest = jnp.result_type(jnp.float32, computed, *jax.tree.leaves(params))
    batch_stats, normalization = jax.tree.map(
        lambda x: jnp.asarray(x, widest if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype),
        (variables.get("batch_stats", {}), normalization),
    )
    averaged = {"params": params, "batch_stats": batch_stats} if ema else None
    return TrainState(
        step=jnp.int32(0),
        apply_fn=model.apply,
        params=params,
        tx=tx,
        opt_state=tx.init(params),
        batch_stats=batch_stats,
        key=jax.random.key_data(run_key),
        normalization=normalization,
        ema=jax.tree.map(jnp.copy, averaged),
    )


def step_keys(
    key_data: jax.Array, step: jax.Array | int, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(key of the augmentation, key of dropout) after ``step`` steps, from TrainState.key.

    Under jax.pmap each device of the mapped axis ``axis_name`` draws its own.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    augment_key, dropout_key = jax.random.split(key)
    return augment_key, dropout_key


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    augment: Augment = Augment(),
    loss: Loss = metrics.cross_entropy,
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
    accum_steps: int = 1,
    ema_decay: float | None = None,
    lookahead: Callable[[TrainState], TrainState] | None = None,
    dropblock_rate: optax.Schedule | None = None,
    gather: Callable[[Any], Any] | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, metrics.Sums]:
    """One optimizer step: a pure function, to be jitted, pmapped or vmapped.

    Args:
      state: before the step.
      batch: "image" uint8 (B, H, W, C), "label" int (B,), and what ``augment`` needs besides.
      augment: changes the images before and after normalisation.
      loss: (logits (N, K), targets (N, K)) to (N,).
      label_smoothing: share of the target spread evenly over the classes.
      target_threshold: classes with a larger share in the target count as wholly there.
      accum_steps: parts that the batch is cut into; BatchNorm sees one part at a time.
      ema_decay: of ``state.ema``; it rises to this as (1 + step) / (10 + step).
      lookahead: ``look_ahead`` with its arguments, in place of the average.
      dropblock_rate: step to the model's DropBlock rate, in place of the model's own.
      gather: brings parameters that are split over devices together for the network; the
        update stays split (ZeRO, Rajbhandari et al. 2020, section 5).
      axis_name: under jax.pmap, the mapped axis to average gradients over. Under jax.jit
        leave it None: there the batch is global.

    Returns:
      (state after the step, sums as metrics.classification_sums gives; with mixed labels
      top-1 and top-5 count the label with the larger share).
    """
    augment_key, dropout_key = step_keys(state.key, state.step, axis_name)
    pixels = augment.pixels(augment_key, batch["image"], state.normalization)
    images = normalize(pixels, state.normalization)
    run_key = jax.random.wrap_key_data(state.key)
    batch = augment(augment_key, {**batch, "image": images}, run_key)
    targets = functools.partial(
        soft_targets, label_smoothing=label_smoothing, threshold=target_threshold
    )
    rates = {} if dropblock_rate is None else {"dropblock_rate": dropblock_rate(state.step)}
    whole = state if gather is None else state.replace(params=gather(state.params))
    grads, batch_stats, sums = _gradients(
        whole, batch, dropout_key, loss, targets, accum_steps, rates
    )
    if axis_name is not None:
        grads, batch_stats = jax.lax.pmean((grads, batch_stats), axis_name)
        sums = jax.lax.psum(sums, axis_name)
    value = sums["loss"] / sums["count"]
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=value)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=batch_stats,
    )
    if lookahead is not None:
        return lookahead(state), sums
    return (state if ema_decay is None else _average(state, ema_decay)), sums


def _gradients(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    loss: Loss,
    targets: Callable[[Batch, int], jax.Array],
    accum_steps: int,
    rates: Mapping[str, Any],
) -> tuple[Any, Any, metrics.Sums]:
    """(gradient of the mean loss, new batch statistics, sums), part by part of the batch."""

    def part_loss(params: Any, batch_stats: Any, part: Batch, key: jax.Array) -> Any:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": batch_stats},
            part["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
            **rates,
        )
        losses = loss(logits, targets(part, logits.shape[-1]))
        sums = metrics.classification_sums(logits, main_label(part), losses)
        return jnp.mean(losses), (updates.get("batch_stats", {}), sums)

    part_grad = jax.grad(part_loss, has_aux=True)
    if accum_steps == 1:
        grads, (batch_stats, sums) = part_grad(state.params, state.batch_stats, batch, key)
        return grads, batch_stats, sums

    def add(carry: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        (grads, sums), batch_stats = carry
        part_grads, (batch_stats, part_sums) = part_grad(state.params, batch_stats, *inputs)
        total = jax.tree.map(jnp.add, (grads, sums), (part_grads, part_sums))
        return (total, batch_stats), None

    parts, keys = cut_batch(batch, accum_steps), jax.random.split(key, accum_steps)
    one = jax.tree.map(lambda x: x[0], parts)
    shapes, (_, sum_shapes) = jax.eval_shape(
        part_grad, state.params, state.batch_stats, one, keys[0]
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes, sum_shapes))
    # In a while loop a convolution's backward pass is some 20 times slower on a CPU.
    unroll = accum_steps if jax.default_backend() == "cpu" else 1
    carry = (zeros, state.batch_stats)
    ((grads, sums), batch_stats), _ = jax.lax.scan(add, carry, (parts, keys), unroll=unroll)
    return jax.tree.map(lambda g: g / accum_steps, grads), batch_stats, sums


def _average(state: TrainState, decay: float) -> TrainState:
    step = jnp.asarray(state.step, jnp.float32)
    return state.replace(ema=_blended(state, jnp.minimum(decay, (1 + step) / (10 + step))))


def _blended(state: TrainState, keep: jax.Array) -> Any:
    """The averaged variables, moved towards those of now; what is frozen keeps every bit."""
    return jax.tree.map(
        lambda average, now: (average + (1 - keep) * (now - average)).astype(average.dtype),
        state.ema,
        {"params": state.params, "batch_stats": state.batch_stats},
    )


def look_ahead(state: TrainState, *, every: int, decay: float, num_steps: int) -> TrainState:
    """After ``every`` steps the average moves towards the network, which then goes on from it.

    The average is ``state.ema``, norms' statistics included. It keeps decay * (step / num_steps)
    ** 3 of itself: nothing at first, so that it follows (Zhang et al. 2019, "Lookahead optimizer";
    the schedule is that of K. Jordan 2024, arXiv:2404.00498, section 3.4).
    """
    share = jnp.asarray(state.step, jnp.float32) / num_steps
    meets = state.step % every == 0
    # Chosen, not branched: on a GPU the host would wait for a branch's condition in every step.
    met = jax.tree.map(
        functools.partial(jnp.where, meets), _blended(state, decay * share**3), state.ema
    )
    now = {"params": state.params, "batch_stats": state.batch_stats}
    return state.replace(**jax.tree.map(functools.partial(jnp.where, meets), met, now), ema=met)


def soft_targets(
    batch: Batch, num_classes: int, label_smoothing: float, threshold: float | None = None
) -> jax.Array:
    """Target shares (B, num_classes) of a batch, mixed labels and smoothing included.

    With a threshold, every class with a larger share has a target of 1, the others of 0, before
    smoothing: a mixed image shows both (Wightman et al. 2021, section 3.2).
    """
    targets = jax.nn.one_hot(batch["label"], num_classes)
    if "mix" in batch:
        share = batch["mix"][:, None]
        targets = share * targets + (1 - share) * jax.nn.one_hot(batch["label_mixed"], num_classes)
    if threshold is not None:
        targets = (targets > threshold).astype(targets.dtype)
    return optax.smooth_labels(targets, label_smoothing) if label_smoothing else targets


def main_label(batch: Batch) -> jax.Array:
    """The label with the larger share: int (B,)."""
    if "mix" not in batch:
        return batch["label"]
    return jnp.where(batch["mix"] >= 0.5, batch["label"], batch["label_mixed"])


def cut_batch(batch: Batch, parts: int) -> Batch:
    """(B, ...) to (parts, B / parts, ...); part i takes every ``parts``-th row from row i.

    So a batch split over devices is cut without moving a row to another device.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )


def eval_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss = metrics.cross_entropy,
    tta: Views = "none",
    gather: Callable[[Any], Any] | None = None,
) -> metrics.Sums:
    """Sums over one evaluation batch: a pure function.

    Args:
      state: its averaged variables are evaluated where there are some.
      batch: "image" uint8 (B, H, W, C), "label" int (B,), "mask" bool (B,), False on padding.
      loss: as of ``train_step``, like ``gather``.
      tta: views of each image that logits are averaged over.
      gather: brings parameters that are split over devices together.

    Returns:
      The scalars of metrics.classification_sums and "confusion" int32 (K, K).
    """
    variables = state.variables() if gather is None else gather(state.variables())
    apply = functools.partial(state.apply_fn, variables)
    logits = averaged_logits(apply, normalize(batch["image"], state.normalization), tta)
    losses = loss(logits, soft_targets(batch, logits.shape[-1], 0.0))
    label, mask = batch["label"], batch["mask"]
    sums = metrics.classification_sums(logits, label, losses, mask)
    return {**sums, "confusion": metrics.confusion_counts(logits, label, mask)}
