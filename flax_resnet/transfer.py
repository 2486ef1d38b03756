"""Starting from pretrained weights: the new head, BatchNorm measured anew, cached features.

A frozen trunk gives the same features of an image in every epoch. They are computed once, kept on
disk under a hash of all that they follow from, and the head trains on them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet import models
from flax_resnet.augment import normalize
from flax_resnet.data import SPLITS, Data, Split
from flax_resnet.datasets.decode import PACKAGES
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet
from flax_resnet.records.configs import to_record
from flax_resnet.records.files import cache_dir, digest, replacing
from flax_resnet.records.provenance import source_hash, versions
from flax_resnet.step import TrainState
from flax_resnet.weights import Pretrained, check_same, is_path, open_weights

Variables = Mapping[str, Any]


def open_for(model: nn.Module, weights: str) -> Pretrained:
    """The weights for a network that a config's ``weights`` names.

    Raises:
      UserError: they cannot be had, or are of another network.
    """
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
    """Variables to start from: those given, with a fresh top where theirs does not fit.

    Args:
      model: the network.
      given: variables of it, perhaps without a head or with another one.
      key: random key of a fresh top.
      images: (N, H, W, C), or their shape and dtype.

    Returns:
      (variables, whether the top is fresh).

    Raises:
      WeightsError: anything but the top does not fit.
    """
    want = models.variable_shapes(model, images)
    shapes = [jax.tree.map(np.shape, _top(tree["params"])) for tree in (want, given)]
    if fresh := shapes[0] != shapes[1]:
        if isinstance(model, ResNet):
            # What init would draw for them: a layer's draw follows from its name.
            features = jnp.zeros((1, model.num_features))
            drawn = jax.jit(lambda k: model.init(k, features, method="classify"))(key)
        else:
            drawn = models.initialize(model, key, images)
        params = {**_trunk(given["params"]), **_top(drawn["params"])}
        given = {**given, "params": params}
    return models.match_variables(model, want, given), fresh


def normalization_of(
    opened: Pretrained | None, what: str | None, image_shape: tuple[int, int, int]
) -> Any:
    """The statistics that pretrained weights want images of ``image_shape`` normalised by.

    Raises:
      UserError: there are no weights, they do not say, or for images of another shape.
    """
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


def _top(params: Variables) -> dict[str, Any]:
    """The parameters of the head and of hidden layers before it."""
    return {k: v for k, v in params.items() if k == "head" or k.startswith("hidden")}


def _trunk(params: Variables) -> dict[str, Any]:
    return {k: v for k, v in params.items() if k not in _top(params)}


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
    sums: dict[Any, Any] = {}
    count = data.num_train // size
    for batch in itertools.islice(data.in_order("train", size), count):
        measured = of_batch(variables, state.normalization, batch["image"])["batch_stats"]
        # In float64: a mean far from zero leaves little of a variance's bits otherwise.
        wide = jax.tree.map(np.float64, jax.device_get(measured))
        for path, x in flatten_dict(_moments(wide, 1)).items():
            sums[path] = sums.get(path, 0) + x
    means = _moments(unflatten_dict({path: x / count for path, x in sums.items()}), -1)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), means, state.batch_stats)


def _moments(tree: Any, sign: int) -> Any:
    """Statistics with the second moment in place of each variance (sign 1), and back (-1)."""
    flat = flatten_dict(tree)
    for path, x in flat.items():
        if path[-1] == "var":
            flat[path] = np.maximum(x + sign * flat[*path[:-1], "mean"] ** 2, 0)
    return unflatten_dict(flat)


def with_cached_features(
    state: TrainState, model: Any, data: Data, batch_size: int, say: Callable[[str], None]
) -> Data:
    """The data with the features that the frozen trunk gives in place of the images.

    They are read from the cache where they are there: files named by a hash of the trunk's weights,
    the decoded images, the normalisation, the network, the platform and this library's source.

    Args:
      state: has the trunk's variables and the normalisation.
      model: the network, frozen up to its head.
      data: both splits are read, ``batch_size`` images at a time.
      batch_size: images.
      say: called with a line about each split.
    """
    trunk = model.clone(include_top=False, pooling="avg")
    variables = {"params": _trunk(state.params), "batch_stats": state.batch_stats}
    program = None
    if not trunk.block_cls.__module__.startswith("flax_resnet."):
        # A block of one's own: what it computes, since its source may call anything.
        images = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)
        program = digest([str(jax.make_jaxpr(trunk.apply)(variables, images))])
    common = {
        "arrays": digest(_parts((variables, state.normalization))),
        "network": to_record(trunk),
        "program": program,
        "versions": {"jax": jax.__version__, "own": source_hash(), **versions(PACKAGES)},
        "platform": jax.devices()[0].device_kind,
    }
    features, labels = {}, {}
    for split in SPLITS:
        key = {**common, "images": data.fingerprint(split)}
        name = digest([json.dumps(key, sort_keys=True)])
        path = cache_dir() / "features" / f"{name}.npz"
        stored = _read(path)
        say(f"{'read' if stored else 'computes'} the features of the {split} split: {path}")
        if stored is None:
            stored = _compute(trunk, variables, state.normalization, data, split, batch_size)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial, partial.open("wb") as file:
                    np.savez(file, features=stored[0], labels=stored[1])
            except OSError as error:
                say(f"the features are not kept, for {path} cannot be written: {error}")
        features[split], labels[split] = stored
    return data.with_features(features, labels)


def top_of(state: TrainState) -> TrainState:
    """The state of the top alone, in parameters, optimizer state and average.

    What is frozen is then neither handed to a step nor back: hundreds of arrays.
    """
    cut = lambda node: _top(node) if _has_top(node) else node  # noqa: E731
    ema = state.ema and {**state.ema, "batch_stats": {}}
    return jax.tree.map(cut, state.replace(batch_stats={}, ema=ema), is_leaf=_has_top)


def with_trunk(top: TrainState, whole: TrainState) -> TrainState:
    """The inverse of ``top_of``: the newer top on the trunk of ``whole``."""
    ema = whole.ema and {**top.ema, "batch_stats": whole.ema["batch_stats"]}
    top = top.replace(apply_fn=whole.apply_fn, batch_stats=whole.batch_stats, ema=ema)
    graft = lambda old, new: {**old, **new} if _has_top(old) else new  # noqa: E731
    return jax.tree.map(graft, whole, top, is_leaf=_has_top)


def _has_top(node: Any) -> bool:
    return isinstance(node, Mapping) and "head" in node


def _parts(tree: Any) -> list[Any]:
    """Names and values of a tree's arrays, for a hash."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [p for path, x in leaves for p in (jax.tree_util.keystr(path), np.asarray(x))]


def _compute(
    trunk: nn.Module, variables: Any, normalization: Any, data: Data, split: Split, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(features float32 (N, F), labels int32 (N,)) of a split."""

    @jax.jit
    def run(variables: Any, images: jax.Array) -> jax.Array:
        return trunk.apply(variables, normalize(images, normalization))  # type: ignore[return-value]

    found, labels = [], []
    for batch in data.in_order(split, batch_size):
        mask = np.asarray(batch["mask"])
        found.append(np.asarray(run(variables, batch["image"]), np.float32)[mask])
        labels.append(np.asarray(batch["label"])[mask])
    return np.concatenate(found), np.concatenate(labels)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What the cache holds; None where that is nothing, or its archive's checksums do not hold."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return stored["features"], stored["labels"]
    except Exception:  # whatever a damaged archive raises: it is computed again
        return None
