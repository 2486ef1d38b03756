"""Views of an image at test time, and the mean of their logits, against a loop over the views."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import UNIT_STATS, random_batch, tiny_resnet

from flax_resnet.data.normalization import normalize
from flax_resnet.data.tta import averaged_logits, check_views, views
from flax_resnet.errors import UserError
from flax_resnet.models import cifar_resnet
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training import metrics
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.step import create_state, eval_step


def brute_force(image, kind):
    """[(share, view)] of one image (H, W, C), written out."""
    if kind == "none":
        return [(1.0, image)]
    mirror = image[:, ::-1]
    if kind == "flip":
        return [(0.5, image), (0.5, mirror)]
    height, width, _ = image.shape
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="reflect")
    first, last = padded[:height, :width], padded[2:, 2:]
    return [
        (0.25, image),
        (0.25, mirror),
        *((0.125, view) for shift in (first, last) for view in (shift, shift[:, ::-1])),
    ]


@pytest.mark.parametrize("kind", ["none", "flip", "flip_shift"])
def test_logits_are_the_mean_of_the_views(rng, kind):
    images = rng.normal(size=(3, 5, 6, 2)).astype(np.float32)
    weights = rng.normal(size=(60, 4)).astype(np.float32)

    def apply(x):
        return jnp.tanh(x.reshape(len(x), -1) @ weights)

    want = [
        sum(share * np.asarray(apply(view[None]))[0] for share, view in brute_force(image, kind))
        for image in images
    ]
    np.testing.assert_allclose(averaged_logits(apply, images, kind), want, rtol=1e-5, atol=1e-6)
    seen, shares = views(jnp.asarray(images), kind)
    assert float(shares.sum()) == 1
    for own, image in zip(np.asarray(seen), images, strict=True):
        got = sorted((float(s), v.tobytes()) for s, v in zip(shares, own, strict=True))
        assert got == sorted((s, np.ascontiguousarray(v).tobytes())
                             for s, v in brute_force(image, kind))  # fmt: skip


def test_an_evaluation_step_counts_by_the_mean(rng):
    model, batch = tiny_resnet(), random_batch(rng, n=6)
    batch["mask"] = np.arange(6) < 5
    state = create_state(model, SGD().build(2, 1)[0], 0, (8, 8, 3), UNIT_STATS)
    sums = eval_step(state, batch, tta="flip_shift")
    images = np.asarray(normalize(jnp.asarray(batch["image"]), UNIT_STATS))
    seen = [brute_force(image, "flip_shift") for image in images]
    rows = np.stack([view for one in seen for _, view in one])
    logits = np.asarray(state.apply_fn(state.variables(), rows)).reshape(6, 6, 10)
    shares = np.array([share for share, _ in seen[0]])
    mean = jnp.asarray(np.einsum("nvk,v->nk", logits, shares))
    losses = metrics.cross_entropy(mean, np.eye(10, dtype=np.float32)[batch["label"]])
    want = metrics.classification_sums(mean, batch["label"], losses, batch["mask"])
    for name, value in want.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    assert float(sums["loss"]) != float(eval_step(state, batch)["loss"])


def test_unknown_views_are_one_line():
    with pytest.raises(UserError, match=r"^tta='flips': expected one of none, flip, flip_shift$"):
        check_views("flips")


def test_features_have_no_views():
    with pytest.raises(UserError, match="tta='flip' with cache_features"):
        TrainConfig(model=cifar_resnet(20, frozen_stages=3), tta="flip", cache_features=True)
