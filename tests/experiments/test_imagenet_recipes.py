"""The ImageNet recipes: their numbers, and a step of each on small images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import class_folders
from recipe_helpers import shrunk

from experiments.imagenet_resnet import get_config
from flax_resnet.errors import UserError
from flax_resnet.inference.classifier import Classifier
from flax_resnet.optim.optimizers import LAMB
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.training.setup import set_up
from flax_resnet.weights import open_weights

TRAINING_IMAGES = 1_281_167


def schedule(config):
    """(steps an epoch, learning rate by step)."""
    steps = -(-TRAINING_IMAGES // config.batch_size)
    _, rate = config.optimizer.build(round(config.num_epochs * steps), steps)
    return steps, rate


@pytest.mark.parametrize(
    ("recipe", "steps", "epochs", "warmup", "peak"),
    [
        ("90", 5005, 90, 5, 0.1),
        ("nvidia", 626, 90, 8, 2.048),
        ("a1", 626, 600, 5, 5e-3),
        ("a2", 626, 300, 5, 5e-3),
        ("a3", 626, 100, 5, 8e-3),
    ],
)
def test_length_and_learning_rate(recipe, steps, epochs, warmup, peak):
    config = get_config(recipe)
    got, rate = schedule(config)
    assert (got, config.num_epochs) == (steps, epochs)
    start, end = warmup * steps, epochs * steps
    assert float(rate(0)) == 0
    assert float(rate(start // 2)) == pytest.approx(peak / 2, rel=1e-3)
    assert float(rate(start)) == pytest.approx(peak)
    if recipe == "90":
        for epoch, factor in ((30, 0.1), (60, 0.01), (80, 0.001)):
            assert float(rate(epoch * steps - 1)) == pytest.approx(peak * factor * 10, rel=1e-5)
            assert float(rate(epoch * steps)) == pytest.approx(peak * factor, rel=1e-5)
    else:
        assert float(rate((start + end) // 2)) == pytest.approx(peak / 2, rel=1e-3)
        assert float(rate(end)) == pytest.approx(0, abs=1e-6)


def test_ninety_epochs_is_goyals_and_nvidias():
    goyal, nvidia = get_config(), get_config("nvidia")
    assert (goyal.optimizer.momentum, goyal.optimizer.nesterov) == (0.9, False)
    assert (goyal.optimizer.weight_decay, goyal.optimizer.decay_norm_and_bias) == (1e-4, False)
    assert (goyal.model.zero_init_last, goyal.label_smoothing) == (True, 0)
    assert nvidia.optimizer.momentum == 0.875
    assert nvidia.optimizer.weight_decay == 3.0517578125e-05
    assert (nvidia.model.zero_init_last, nvidia.label_smoothing) == (False, 0.1)
    for config in (goyal, nvidia):
        assert (config.data.image_size, config.data.eval_image_size) == (224, None)
        assert 224 / config.data.crop_ratio == 256
        assert config.augment.flip


@pytest.mark.parametrize(
    ("recipe", "size", "decay", "magnitude", "mixup", "repeats", "drop_path", "smoothing"),
    [
        ("a1", 224, 0.01, 7, 0.2, 3, 0.05, 0.1),
        ("a2", 224, 0.02, 7, 0.1, 3, 0.05, 0.0),
        ("a3", 160, 0.02, 6, 0.1, 1, 0.0, 0.0),
    ],
)
def test_table_2_of_resnet_strikes_back(
    recipe, size, decay, magnitude, mixup, repeats, drop_path, smoothing
):
    config = get_config(recipe)
    data, augment = config.data, config.augment
    assert isinstance(config.optimizer, LAMB)
    assert (config.batch_size, config.optimizer.weight_decay) == (2048, decay)
    assert (data.image_size, data.eval_image_size or size, data.crop_ratio) == (size, 224, 0.95)
    assert (augment.randaugment_magnitude, augment.randaugment_std) == (magnitude, 0.5)
    assert (augment.randaugment_ops, augment.mixup, augment.cutmix) == (2, mixup, 1.0)
    assert (data.repeats, config.model.drop_path_rate) == (repeats, drop_path)
    assert (config.loss, config.target_threshold) == ("binary_cross_entropy", 0.2)
    assert (config.label_smoothing, config.ema_decay) == (smoothing, None)


def test_another_recipe_is_refused():
    with pytest.raises(UserError, match=r"recipe 'a4': expected 90, nvidia, a1, a2 or a3"):
        get_config("a4")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten classes of two random images of odd sizes."""
    root = tmp_path_factory.mktemp("photos")
    for label in range(10):
        class_folders(root, [f"class{label}"], 2, (20 + label, 24))
    return root


def small(recipe, photos):
    """A recipe on the photos, its network cut down."""
    config = get_config(recipe)
    sizes = {"image_size": 16, "eval_image_size": config.data.eval_image_size and 24}
    own = {"folder": str(photos), "holdout_every": 2, "num_workers": 0, **sizes}
    return dataclasses.replace(
        shrunk(config, photos),
        data=dataclasses.replace(config.data, **own),
        augment=config.augment,
        batch_size=8,
    )


def test_a_step_can_be_traced(photos, tmp_path, mesh):
    run = set_up(small("a1", photos), tmp_path / "w", mesh)
    (batch,) = run.dispatches()
    assert batch["image"].shape == (8, 16, 16, 3)
    labels = np.asarray(batch["label"])[:6].reshape(2, 3)
    assert (labels == labels[:, :1]).all()
    state, sums = jax.eval_shape(run.programs.steps()[0], run.state, batch)
    assert sums["loss"].dtype == np.float32
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, run.state)


@pytest.mark.slow
def test_a_step_of_a3_and_its_evaluation_at_the_larger_size(photos, tmp_path, mesh):
    result = train_and_evaluate(small("a3", photos), tmp_path / "w", mesh=mesh)
    assert (result["step"], result["num_train"], result["num_eval"]) == (1, 10, 10)
    assert np.isfinite([result["loss"], result["train_loss"]]).all()
    prepared = Classifier(open_weights(tmp_path / "w")).preprocessing
    assert (prepared.size, prepared.shape) == (24, (24, 24, 3))
    image = next(photos.rglob("*.png")).read_bytes()
    assert prepared(image).shape == (24, 24, 3)
