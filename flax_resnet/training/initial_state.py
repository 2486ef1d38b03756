"""The state at step 0: fresh or from pretrained weights, and what is measured on the data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet import models
from flax_resnet.data.batches import Data
from flax_resnet.data.normalization import normalize, statistics, statistics_shape
from flax_resnet.distributed import sharding
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet, WeightsError, initializer
from flax_resnet.models.variables import split_top
from flax_resnet.records import text_tables
from flax_resnet.training import metrics
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.step import TrainState, create_state
from flax_resnet.weights import open_weights
from flax_resnet.weights.loading import check_same, is_path
from flax_resnet.weights.pretrained import Pretrained

Variables = Mapping[str, Any]
# Training images that a network starts from, at most (``fitted``): as many as airbench takes.
MOST_FITTED = 5000


def starter(
    config: TrainConfig, tx: optax.GradientTransformation, image_shape: tuple[int, int, int]
) -> Callable[[int], TrainState]:
    """Seed to the state at step 0, but for statistics that are measured on the data."""
    model = config.model
    opened = None if config.weights is None else open_for(model, config.weights)
    if opened is None:
        fresh = initializer(model, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))

    def init(key: jax.Array, images: Any) -> Any:
        if opened is None:
            return fresh(key)
        variables, is_fresh = start_from(model, opened.variables, key, images)
        say(f"starts from {config.weights}" + (", its head afresh" if is_fresh else ""))
        return variables

    if config.normalization == "weights":
        stats = normalization_of(opened, config.weights, image_shape)
    else:
        shapes = statistics_shape(config.normalization, image_shape)
        stats = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    ema = config.ema_decay is not None

    def start(seed: int) -> TrainState:
        try:
            return create_state(model, tx, seed, image_shape, stats, ema=ema, init=init)
        except WeightsError:
            raise
        except (ValueError, TypeError, ZeroDivisionError) as error:
            name = type(model).__name__
            raise UserError(
                f"{name} with the fields given does not take images of {image_shape}: {error}"
            ) from error

    return start


def open_for(model: nn.Module, weights: str) -> Pretrained:
    """The weights for a network that a config's ``weights`` names."""
    name = models.name_of(model)
    if name is None and not is_path(weights):
        raise UserError(
            f"weights {weights!r}: tags are for networks that have a name, with the fields that it "
            "stands for; give a weight file, or undo what was changed"
        )
    opened = open_weights(weights, name)
    check_same(opened, model, name or f"this {type(model).__name__}")
    return opened


def start_from(
    model: nn.Module, given: Variables, key: jax.Array, images: Any
) -> tuple[dict[str, Any], bool]:
    """(variables given, with a top drawn from ``key`` where theirs does not fit; whether it is).

    Args:
      model: the network.
      given: variables of it, perhaps without a head or with another one.
      key: random key of a fresh top.
      images: (N, H, W, C), or their shape and dtype.

    Raises:
      WeightsError: anything but the top does not fit.
    """
    want = models.variable_shapes(model, images)
    shapes = [jax.tree.map(np.shape, split_top(tree["params"])[1]) for tree in (want, given)]
    if fresh := shapes[0] != shapes[1]:
        if isinstance(model, ResNet):
            # What init would draw for them: a layer's draw follows from its name.
            features = jnp.zeros((1, model.num_features))
            drawn = jax.jit(lambda k: model.init(k, features, method="classify"))(key)
        else:
            drawn = models.initialize(model, key, images)
        trunk, top = split_top(given["params"])[0], split_top(drawn["params"])[1]
        given = {**given, "params": {**trunk, **top}}
    return models.match_variables(model, want, given), fresh


def normalization_of(
    opened: Pretrained | None, what: str | None, image_shape: tuple[int, int, int]
) -> Any:
    """The statistics that pretrained weights want images of ``image_shape`` normalised by."""
    reason = "they do not say how"
    if opened is not None and opened.preprocessing is not None:
        stats = opened.preprocessing.statistics()
        shape = np.shape(stats["std"])
        if shape in (image_shape, image_shape[-1:]):
            return stats
        reason = f"they were normalised as {shape}, and the images are {image_shape}"
    raise UserError(
        f"normalization='weights' with weights={what}: {reason}; use --normalization imagenet or "
        "channel"
    )


def measured(config: TrainConfig, data: Data, state: TrainState) -> TrainState:
    """A state at step 0 with what is measured on the training split: normalisation, norms."""
    like = state.normalization
    if config.normalization != "weights":
        stats = statistics(config.normalization, data.image_shape, data.train_images())
        stats = jax.tree.map(lambda new, old: np.asarray(new, old.dtype), stats, like)
        state = state.replace(normalization=sharding.put_replicated(data.mesh, stats))
    if config.measure_norms:
        norms = measure_norms(state, config.model, data, config.eval_batch_size)
        state = state.replace(batch_stats=sharding.put_replicated(data.mesh, norms))
        if state.ema is not None:
            places = jax.tree.map(lambda x: x.sharding, state.ema["batch_stats"])
            averaged = sharding.put(norms, places)
            state = state.replace(ema={**state.ema, "batch_stats": averaged})
    return state


def fitted(config: TrainConfig, data: Data, state: TrainState) -> tuple[TrainState, float]:
    """A state at step 0 with the parameters that its network computes from training images.

    Such a network has ``from_images(params, images)``, which gets normalised images (N, H, W, C),
    evenly spread over the split. With ``weights`` it is not asked. Returns (state, seconds).
    """
    from_images = getattr(config.model, "from_images", None)
    if from_images is None or config.weights is not None:
        return state, 0.0
    began = time.perf_counter()
    stats = jax.device_get(state.normalization)
    images = [np.asarray(normalize(jnp.asarray(x), stats)) for x in data.train_images(MOST_FITTED)]
    new = from_images(state.params, np.concatenate(images))

    def moved(place: jax.Array, old: Any, new: Any) -> jax.Array:
        # Two machines may not compute the same bits.
        return place if new is old else sharding.put(sharding.leads(new), place.sharding)

    changed = {"params": jax.tree.map(moved, state.params, state.params, new)}
    if state.ema is not None:
        averaged = jax.tree.map(moved, state.ema["params"], state.params, new)
        changed["ema"] = {**state.ema, "params": averaged}
    fitted_state = jax.block_until_ready(state.replace(**changed))
    return fitted_state, time.perf_counter() - began


def measure_norms(state: TrainState, model: nn.Module, data: Data, batch_size: int) -> Any:
    """Running statistics of every BatchNorm, measured on the training split.

    The mean and the variance over all batches of ``batch_size``, the parameters as they are (Wu and
    Johnson 2021, "Rethinking Batch in BatchNorm", section 3), also of what is frozen. A last,
    incomplete batch is left out. Returns a tree like ``state.batch_stats``.
    """
    # The statistics of a batch alone, and of all of it: nothing of the old ones is kept.
    unfrozen = model.clone(bn_momentum=0.0, bn_group=None, norm_kind="batch", frozen_stages=-1,
                           drop_path_rate=0.0, dropblock_rate=0.0, dropout_rate=0.0)  # fmt: skip

    # Not by closure: arrays of several processes are no constants of a program.
    @jax.jit
    def of_batch(variables: Any, normalization: Any, images: jax.Array) -> Any:
        images = normalize(images, normalization)
        return unfrozen.apply(variables, images, train=True, mutable=["batch_stats"])[1]

    variables = {"params": state.params, "batch_stats": state.batch_stats}
    devices = data.mesh.size
    size = min(batch_size, data.num_train) // devices * devices
    if not size:
        raise UserError(
            f"measure_norms with {data.num_train} training images on {devices} devices: "
            "each device needs one; use fewer devices"
        )
    count = data.num_train // size
    batches = itertools.islice(data.in_order("train", size), count)
    each = (of_batch(variables, state.normalization, b["image"])["batch_stats"] for b in batches)
    total = metrics.totals(_moments(jax.device_get(norms), 1) for norms in each)
    means = _moments(unflatten_dict({path: x / count for path, x in total.items()}), -1)
    return jax.tree.map(
        lambda x, like: x.astype(like.dtype), unflatten_dict(means), state.batch_stats
    )


def _moments(tree: Any, sign: int) -> dict[Any, Any]:
    """Statistics by path, the second moment in place of each variance (sign 1), or back (-1)."""
    # In float64: a mean far from zero leaves little of a variance's bits otherwise.
    flat = {path: np.float64(x) for path, x in flatten_dict(tree).items()}
    for path, x in flat.items():
        if path[-1] == "var":
            flat[path] = np.maximum(x + sign * flat[*path[:-1], "mean"] ** 2, 0)
    return flat


def say(line: str) -> None:
    """Prints a line, in process 0 alone."""
    if sharding.is_lead():
        text_tables.say(line)
