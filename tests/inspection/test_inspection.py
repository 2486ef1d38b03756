"""What is computed for the pictures is what straight code gives."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import noisy, tiny_resnet
from inspection_helpers import tiny_config, tiny_run

from flax_resnet import inspection
from flax_resnet.data.normalization import normalize
from flax_resnet.errors import UserError
from flax_resnet.inspection import lr_finder
from flax_resnet.models import DropBlockResNet, MiniModel, PreActBasicBlock
from flax_resnet.optim.optimizers import SGD
from flax_resnet.training.step import TrainState, train_step


@pytest.fixture(scope="module")
def workdir(digits_dir):
    return tiny_run(digits_dir)


@pytest.fixture(scope="module")
def run(workdir):
    return inspection.open_run(workdir, "latest")


@pytest.fixture(scope="module")
def found(run):
    return inspection.predictions(run)


@pytest.fixture(scope="module")
def whole_split(run):
    """(images, labels) of the evaluation split, and what the network says, computed straight."""
    batches = [jax.device_get(b) for b in run.data.in_order("eval", 355)]
    (batch,) = batches
    images = normalize(jnp.asarray(batch["image"]), run.stats)
    logits = jax.jit(run.module.apply)(run.variables, images)
    return batch["image"], batch["label"], np.asarray(logits, np.float64)


def test_predictions_are_the_networks_of_every_example_once(run, found, whole_split, workdir):
    _, labels, logits = whole_split
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    losses = -np.log(p[np.arange(355), labels])
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(found.probabilities, p, atol=1e-5)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4, atol=1e-5)
    result = json.loads((workdir / "result.json").read_text())
    assert found.top1 == pytest.approx(result["top1"], abs=1e-9)
    assert found.losses.mean() == pytest.approx(result["loss"], rel=1e-5)
    assert np.trace(found.confusion) == round(355 * result["top1"])
    np.testing.assert_array_equal(found.confusion.sum(axis=1), np.bincount(labels, minlength=10))
    _, correct, counts, error = found.reliability()
    assert (counts.sum(), correct.sum()) == (355, round(355 * result["top1"]))
    assert error == found.calibration_error


def test_features_are_the_heads_inputs(run, found, whole_split, monkeypatch):
    monkeypatch.setattr(sys.modules[inspection.predictions.__module__], "MOST_FEATURES", 7)
    few = inspection.predictions(run)
    np.testing.assert_array_equal(few.rows, np.linspace(0, 354, 7).round())
    np.testing.assert_allclose(few.features, found.features[few.rows], atol=1e-6)
    head = run.variables["params"]["head"]
    logits = found.features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(logits, whole_split[2], atol=1e-4)
    np.testing.assert_array_equal(found.rows, np.arange(355))


def test_worst_are_the_largest_losses_with_their_images(run, found, whole_split):
    images, labels, _ = whole_split
    rows = inspection.worst(found, 5)
    want = sorted(range(355), key=lambda row: (-found.losses[row], row))[:5]
    assert rows.tolist() == want
    pixels, true = inspection.eval_images(run, [354, 3, 199, 200])
    np.testing.assert_array_equal(pixels, images[[354, 3, 199, 200]])
    np.testing.assert_array_equal(true, labels[[354, 3, 199, 200]])


def jitted_forward(module, variables, images):
    return jax.jit(lambda v, x: inspection.forward(module, v, x))(variables, images)


NETS = {
    "resnet": tiny_resnet(stage_sizes=(1, 1), num_filters=4),
    "preact": tiny_resnet(stage_sizes=(1, 1), num_filters=4, block_cls=PreActBasicBlock),
    "mini": MiniModel(stage_sizes=(1, 1), num_filters=4),
}


@pytest.mark.parametrize("name", NETS)
def test_grad_cam_after_a_global_average_is_the_heads_weighted_map(name, rng):
    module = NETS[name]
    images = jnp.asarray(rng.normal(size=(3, 8, 8, 3)), jnp.float32)
    variables = noisy(module, images)
    stages = inspection.stage_maps(module, variables, images)
    last = np.asarray(list(stages.values())[-1])
    assert [x.shape[1:] for x in stages.values()] == [(8, 8, 4), (4, 4, 8)]
    assert last.min() == 0
    _, features = jitted_forward(module, variables, images)
    np.testing.assert_allclose(features, last.mean(axis=(1, 2)), rtol=1e-5)
    kernel = np.asarray(variables["params"]["head"]["kernel"])
    logits = last.mean(axis=(1, 2)) @ kernel + np.asarray(variables["params"]["head"]["bias"])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for asked in (None, [1, 7, 7]) if name == "resnet" else ([1, 7, 7],):
        classes = logits.argmax(axis=1) if asked is None else np.array(asked)
        maps, said, share = inspection.grad_cam(module, variables, images, asked)
        np.testing.assert_array_equal(said, classes)
        np.testing.assert_allclose(share, p[np.arange(3), classes], rtol=1e-4)
        want = np.maximum(np.einsum("nhwc,nc->nhw", last, kernel[:, classes].T / 16), 0)
        np.testing.assert_allclose(maps, want, rtol=1e-3, atol=1e-6)


def test_grad_cam_before_dense_layers_is_their_gradients(rng):
    module = DropBlockResNet(num_classes=5, stage_filters=(3, 4), dense_features=(6,))
    images = jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = noisy(module, images)
    stages = inspection.stage_maps(module, variables, images)
    assert {k: v.shape[1:] for k, v in stages.items()} == {
        "DropBlock_0": (8, 8, 3), "DropBlock_1": (4, 4, 4),
    }  # fmt: skip
    p = variables["params"]

    def logit(last):
        x = nn.max_pool(last, (3, 3), (2, 2), "SAME").reshape(2, -1)
        x = nn.relu(x @ p["dense1"]["kernel"] + p["dense1"]["bias"])
        return jnp.sum(
            (x @ p["head"]["kernel"] + p["head"]["bias"])[jnp.arange(2), jnp.array([4, 0])]
        )

    last = stages["DropBlock_1"]
    weights = np.asarray(jax.jit(jax.grad(logit))(last)).mean(axis=(1, 2))
    want = np.maximum(np.einsum("nhwc,nc->nhw", last, weights), 0)
    maps, _, _ = inspection.grad_cam(module, variables, images, [4, 0])
    np.testing.assert_allclose(maps, want, rtol=1e-4, atol=1e-7)
    logits, features = jitted_forward(module, variables, images)
    assert (logits.shape, features.shape) == ((2, 5), (2, 6))


def test_heat_is_resized_to_the_image_and_peaks_at_one():
    maps = np.zeros((2, 2, 2), np.float32)
    maps[0] = [[0, 1], [2, 4]]
    over = inspection.heat(maps, 4, 4)
    assert over.shape == (2, 4, 4)
    assert (over[0].max(), over[0, 0, 0], over[0, 3, 3], over[1].max()) == (1, 0, 1, 0)
    assert over[0, 3, 0] == pytest.approx(0.5)


def test_a_network_without_maps_or_head_says_so(rng):
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3)(x.reshape(len(x), -1))

    images = jnp.zeros((2, 8, 8, 3))
    variables = Flat().init(jax.random.key(0), images)
    assert inspection.stage_maps(Flat(), variables, images) == {}
    for ask, line in (
        (lambda: inspection.grad_cam(Flat(), variables, images), "has no maps"),
        (lambda: inspection.forward(Flat(), variables, images), "no layer named 'head'"),
        (lambda: inspection.first_filters(Flat(), variables, (8, 8, 3)), "has no convolution"),
    ):
        with pytest.raises(UserError, match=line):
            ask()


def test_pca_has_numpys_variances_and_fixed_signs(rng):
    features = rng.normal(size=(50, 6)) @ np.diag([5, 3, 1, 1, 0.5, 0.1]) + 7
    points, axes = inspection.pca(features)
    variances = np.linalg.eigvalsh(np.cov(features.T))[::-1]
    np.testing.assert_allclose(points.var(axis=0, ddof=1), variances[:2])
    assert points[features[:, 0].argmax(), 0] > 0
    share = 100 * variances[0] / variances.sum()
    assert axes[0] == f"principal component 1 ({share:.1f} % of variance)"


def test_tsne_repeats(rng):
    features = rng.normal(size=(24, 5))
    points, _ = inspection.tsne(features, seed=1)
    np.testing.assert_array_equal(inspection.tsne(features, seed=1)[0], points)
    with pytest.raises(UserError, match="4 examples are too few"):
        inspection.tsne(features[:4])


def test_augmented_is_what_the_steps_see(run, monkeypatch):
    """The real train_step, from the checkpoint's key, is handed what is drawn."""
    # A Beta distribution takes seconds to compile.
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: jax.random.uniform(key))
    augment = dataclasses.replace(run.config.augment, mixup=0.4)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, augment=augment))
    config = run.config
    batch = next(iter(run.data.train_batches(config.seed, config.batch_size, 0, 1)))

    @jax.jit
    def seen_by_step(step):
        seen = []

        def spy(key, batch, run_key):
            seen.append(config.augment(key, batch, run_key))
            return seen[0]

        spy.pixels = config.augment.pixels

        state = TrainState.create(
            apply_fn=run.module.apply, params=run.variables["params"], tx=SGD().build(2, 1)[0],
            batch_stats=run.variables["batch_stats"], key=run.key, normalization=run.stats,
        )  # fmt: skip
        train_step(state.replace(step=step), batch, augment=spy)
        return {"image": seen[0]["image"], "mix": seen[0]["mix"]}

    got = inspection.augmented(run)
    np.testing.assert_array_equal(got.originals, np.asarray(batch["image"])[:6])
    mean, std = np.asarray(run.stats["mean"]), np.asarray(run.stats["std"])
    for step in range(6):
        want = jax.device_get(seen_by_step(jnp.int32(step)))
        pixels = np.clip(np.round(255 * (want["image"][:6] * std + mean)), 0, 255)
        np.testing.assert_allclose(got.draws[step], pixels, atol=1)
        np.testing.assert_allclose(got.shares[step], want["mix"][:6], rtol=1e-6)
    np.testing.assert_array_equal(got.mixed[0], np.asarray(batch["label"])[::-1][:6])
    assert (got.draws[0] != got.draws[1]).any()


def test_images_come_back_from_their_normalisation(run, rng):
    images = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    stats = {"mean": np.float32([0.4, 0.5, 0.6]), "std": np.float32([0.2, 0.3, 0.25]),
             "order": np.array([2, 1, 0])}  # fmt: skip
    other = dataclasses.replace(run, stats=stats)
    back = inspection.samples.displayed(np.asarray(other.normalized(images)), other)
    np.testing.assert_array_equal(back, images)


def test_images_of_a_folder_take_the_runs_size(run, photos):
    (photos / "broken.png").write_bytes(b"no image")
    said = []
    names, images = inspection.folder_images(run, [photos], 4, said.append)
    assert (names, images.shape) == (["a.jpg", "b.png", "d.bmp", "c.PNG"], (4, 8, 8, 1))
    assert said == [f"skipped {photos / 'broken.png'}: it is no image that Pillow reads"]
    oblong = dataclasses.replace(run, image_shape=(8, 9, 1))
    with pytest.raises(UserError, match="images are 8x9"):
        inspection.folder_images(oblong, [photos], 4)
    with pytest.raises(UserError, match="could be read"):
        inspection.folder_images(run, [photos / "notes.txt"], 4)


def test_best_and_latest_checkpoints(workdir, run):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = max((r for r in records if r["split"] == "eval"), key=lambda r: (r["top1"], r["step"]))
    assert run.step == 24
    assert inspection.open_run(workdir).step == best["step"]
    assert run.title == "ResNet on sklearn_digits"
    assert run.class_name(3) == "3"
    assert run.class_name(12) == "class 12"


def test_what_is_no_run_is_one_line(tmp_path, workdir, run):
    shutil.copy(workdir / "config.json", tmp_path)
    with pytest.raises(UserError, match="holds no run: expected its checkpoints"):
        inspection.open_run(tmp_path)
    other = dataclasses.replace(run, data_record={**run.data_record, "num_eval": 7})
    with pytest.raises(UserError, match="was trained on data with num_eval 7 and it is 355 now"):
        _ = other.data


def test_rates_rise_by_a_factor_until_the_loss_diverges(digits_dir):
    config = tiny_config(digits_dir)
    search = inspection.find_rate(config, lowest=1e-3, highest=1e6, num_steps=30)
    n = len(search.rates)
    np.testing.assert_allclose(search.rates, np.geomspace(1e-3, 1e6, 30)[:n], rtol=1e-4)
    assert search.diverged
    assert 5 < n < 30
    average = 0.0
    for i, loss in enumerate(search.losses):
        average = 0.9 * average + 0.1 * loss
        assert search.smoothed[i] == pytest.approx(average / (1 - 0.9 ** (i + 1)))
    assert search.smoothed[:-1].max() <= 4 * search.smoothed.min()
    assert search.smoothed[-1] > 4 * search.smoothed[:-1].min() or n < 30
    assert 2 < search.losses[0] < 6


def test_the_suggestion_is_at_the_steepest_fall():
    rates = np.geomspace(1e-5, 1, 101)
    losses = 2 - 1.5 / (1 + np.exp(-4 * np.log(rates / 1e-2))) + np.where(rates > 0.5, 9.0, 0)
    assert lr_finder._steepest(rates, list(losses)) == pytest.approx(1e-2, rel=0.2)
    assert lr_finder._steepest(rates, list(np.linspace(1, 2, 101))) is None
