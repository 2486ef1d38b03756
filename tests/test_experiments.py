"""Every experiment's config builds, fits its recipe, and takes a step."""

import dataclasses
import importlib
import pkgutil

import numpy as np
import pytest
from PIL import Image

import experiments
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig
from flax_resnet.models import architecture, create
from flax_resnet.record import from_record, to_record
from flax_resnet.train import train_and_evaluate

MODULES = {
    name: importlib.import_module(f"experiments.{name}")
    for _, name, is_package in pkgutil.iter_modules(experiments.__path__)
    if not is_package
}
NAMES = [name for name, module in MODULES.items() if hasattr(module, "get_config")]


@pytest.fixture(params=NAMES)
def module(request):
    return MODULES[request.param]


def test_experiments_are_found():
    assert {"digits", "cifar10_mini", "mnist_transfer", "finetune"} <= set(NAMES)
    assert "gradient_flow" in set(MODULES) - set(NAMES)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_gives_the_command(name):
    assert f"Command: python -m experiments.{name}" in MODULES[name].__doc__
    assert "Claim: " in MODULES[name].__doc__


def test_config_builds_and_records(module):
    config = module.get_config()
    assert isinstance(config, TrainConfig)
    assert from_record(to_record(config)) == config


def shrunk(config, folder):
    """A recipe as it is, on a few small images, one block a stage, from no weights, for a step."""
    model = config.model.clone(stage_sizes=(1,) * len(config.model.stage_sizes), num_classes=10)
    return dataclasses.replace(
        config,
        model=model,
        data=DataConfig(folder=str(folder), holdout_every=2),
        weights=None,
        normalization="imagenet" if config.normalization == "weights" else config.normalization,
        batch_size=4,
        eval_batch_size=4,
        num_steps=1,
    )


def test_one_step_on_synthetic_images(module, tmp_path, mesh, rng, monkeypatch):
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "cache"))
    config = shrunk(module.get_config(), tmp_path / "data")
    side = 8 * getattr(config.model, "stem_stride", 2)
    for label in range(10):
        directory = tmp_path / "data" / f"class{label}"
        directory.mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / f"{i}.png")
    result = train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    assert (result["step"], result["num_eval"]) == (1, 10)
    assert np.isfinite(result["loss"])


def test_cifar10_mini_is_the_tutorials_recipe():
    config = importlib.import_module("experiments.cifar10_mini").get_config()
    steps_per_epoch = -(-50_000 // config.batch_size)
    assert (steps_per_epoch, config.num_epochs * steps_per_epoch) == (391, 19_550)
    assert (config.optimizer.learning_rate, config.optimizer.eps) == (1e-3, 1e-7)
    assert config.augment.width_shift * 32 == 5
    assert (config.normalization, config.model.dropout_rate) == ("pixel", 0.25)


def test_mnist_transfer_is_the_tutorials_recipe():
    config = importlib.import_module("experiments.mnist_transfer").get_config()
    model = config.model
    assert architecture(model) == architecture(create("ResNet152"))
    assert (model.frozen_stages, model.num_classes, len(model.hidden_units)) == (4, 10, 1)
    assert (config.num_epochs, config.optimizer.eps) == (40, 1e-7)
    assert 28 + 2 * config.data.pad == 32
    assert (config.data.channels, config.weights, config.normalization) == (3, "keras", "weights")
