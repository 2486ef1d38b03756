"""Features of a frozen trunk, computed once.

A frozen trunk gives the same features of an image in every epoch. They are computed once, kept on
disk under a hash of all that they follow from, and the head trains on them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.tree_util import keystr, tree_leaves_with_path

from flax_resnet.data.batches import Data
from flax_resnet.data.config import SPLITS, Split
from flax_resnet.data.decode import PACKAGES
from flax_resnet.data.normalization import normalize
from flax_resnet.models.variables import has_top, split_top
from flax_resnet.records.configs import to_record
from flax_resnet.records.files import cache_dir, digest, replacing
from flax_resnet.records.provenance import source_hash, versions
from flax_resnet.training.step import TrainState


def with_cached_features(
    state: TrainState, model: Any, data: Data, batch_size: int, say: Callable[[str], None]
) -> Data:
    """The data with the features that the frozen trunk gives in place of the images.

    They are read from the cache where they are there: files named by a hash of the trunk's weights,
    the decoded images, the normalisation, the network, the platform and this library's source.
    """
    trunk = model.clone(include_top=False, pooling="avg")
    variables = {"params": split_top(state.params)[0], "batch_stats": state.batch_stats}
    program = None
    if not trunk.block_cls.__module__.startswith("flax_resnet."):
        # A block of one's own: what it computes, since its source may call anything.
        images = jax.ShapeDtypeStruct((1, *data.image_shape), jnp.float32)
        program = digest([str(jax.make_jaxpr(trunk.apply)(variables, images))])
    leaves = tree_leaves_with_path((variables, state.normalization))
    common = {
        "arrays": digest([part for path, x in leaves for part in (keystr(path), np.asarray(x))]),
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
            data.check_readable()
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
    cut = lambda node: split_top(node)[1] if has_top(node) else node  # noqa: E731
    ema = state.ema and {**state.ema, "batch_stats": {}}
    return jax.tree.map(cut, state.replace(batch_stats={}, ema=ema), is_leaf=has_top)


def with_trunk(top: TrainState, whole: TrainState) -> TrainState:
    """The inverse of ``top_of``: the newer top on the trunk of ``whole``."""
    ema = whole.ema and {**top.ema, "batch_stats": whole.ema["batch_stats"]}
    top = top.replace(apply_fn=whole.apply_fn, batch_stats=whole.batch_stats, ema=ema)
    graft = lambda old, new: {**old, **new} if has_top(old) else new  # noqa: E731
    return jax.tree.map(graft, whole, top, is_leaf=has_top)


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
