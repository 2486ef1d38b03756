import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.training import metrics


def test_sums_equal_brute_force_and_skip_the_padding(rng):
    logits = rng.normal(size=(40, 9)).astype(np.float32)
    labels = rng.integers(0, 9, 40)
    loss = rng.uniform(size=40).astype(np.float32)
    mask = rng.random(40) < 0.7
    got = metrics.classification_sums(jnp.asarray(logits), labels, loss, mask)
    order = np.argsort(-logits, axis=1)
    assert int(got["count"]) == mask.sum()
    assert int(got["top1"]) == sum(order[i, 0] == labels[i] for i in range(40) if mask[i])
    assert int(got["top5"]) == sum(labels[i] in order[i, :5] for i in range(40) if mask[i])
    assert float(got["loss"]) == pytest.approx(loss[mask].sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "right"),
    [
        (np.zeros((3, 10)), [0, 4, 5], (1, 2)),  # of equal logits the lower class, as argmax
        ([[1.0, np.nan, np.nan], [np.nan] * 3], [0, 1], (0, 0)),
        (np.eye(3), [1, 2, 0], (0, 3)),
    ],
)
def test_ties_and_nan_and_few_classes(logits, labels, right):
    loss = jnp.zeros(len(labels))
    got = metrics.classification_sums(jnp.asarray(logits), jnp.array(labels), loss)
    assert (int(got["top1"]), int(got["top5"])) == right


def test_bins_are_closed_above_and_certainty_is_in_the_last():
    sure, right, counts, error = metrics.reliability(
        np.array([1.0, 1.0, 1 / 15]), np.array([True, False, False])
    )
    assert (sure.tolist(), counts.tolist()) == ([1 / 15, *[0] * 13, 2], [1, *[0] * 13, 2])
    assert right.tolist() == [0] * 14 + [1]
    assert error == pytest.approx((1 / 15 + 1) / 3)


def test_confusion_rows_are_true_classes(rng):
    logits = rng.normal(size=(50, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 50)
    mask = rng.random(50) < 0.5
    want = np.zeros((4, 4), int)
    for i in np.flatnonzero(mask):
        want[labels[i], logits[i].argmax()] += 1
    np.testing.assert_array_equal(metrics.confusion_counts(jnp.asarray(logits), labels, mask), want)


def test_an_evaluation_runs_one_step_ahead():
    begun, seen = [], []

    def step(batch):
        begun.append(batch)
        return {"loss": jnp.full(2, batch), "count": jnp.int32(1)}

    for batch, got in metrics.outputs(step, range(3)):
        seen.append((batch, len(begun), float(got["loss"][0])))
    assert seen == [(0, 2, 0.0), (1, 3, 1.0), (2, 3, 2.0)]
    assert list(metrics.outputs(step, [])) == []


def test_binary_cross_entropy_is_the_mean_over_classes(rng):
    logits = rng.normal(size=(5, 3)).astype(np.float32)
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]] * 0.9 + 0.1 / 3
    p = 1 / (1 + np.exp(-logits))
    want = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(1)
    np.testing.assert_allclose(metrics.binary_cross_entropy(logits, targets), want, rtol=1e-5)


@pytest.mark.parametrize("loss", [metrics.cross_entropy, metrics.binary_cross_entropy])
def test_losses_are_float32_for_bfloat16_logits(loss):
    assert loss(jnp.zeros((2, 3), jnp.bfloat16), jnp.ones((2, 3)) / 3).dtype == jnp.float32
