"""Every experiment says what it claims, its config builds and fits its recipe, and takes a step."""

import dataclasses
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
from helpers import class_folders
from recipe_helpers import shrunk

import experiments
from experiments import (
    ablations,
    cifar10_highway,
    cifar10_preact,
    cifar10_resnet,
    table,
    wide_resnet,
)
from flax_resnet.models import create
from flax_resnet.records.configs import from_record, to_record
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate

MODULES = {
    name: importlib.import_module(f"experiments.{name}")
    for _, name, is_package in pkgutil.iter_modules(experiments.__path__)
    if not is_package
}
ABLATIONS = [f"ablations.{one.name}" for one in pkgutil.iter_modules(ablations.__path__)]
NAMES = [name for name, module in MODULES.items() if hasattr(module, "get_config")]
DEPTHS = [
    *((cifar10_resnet, f"resnet{depth}", depth) for depth in (20, 32, 44, 56, 110, 1202)),
    *((cifar10_preact, f"preresnet{depth}", depth) for depth in (110, 164, 1001)),
    *((cifar10_highway, f"highway{depth}", depth) for depth in (19, 32)),
    (wide_resnet, "wrn_28_10", 28),
]
# Others' configs are of the same kind, and make a step in the slow tests.
LIKE_OTHERS = {"cifar10_highway", "cifar10_plain", "cifar10_preact", "cifar100_dropblock",
               "finetune", "imagenet_resnet", "mnist_transfer", "wide_resnet"}  # fmt: skip


@pytest.fixture(params=NAMES)
def module(request):
    return MODULES[request.param]


def one_step_of(names):
    """The quick ones' parameters, and the others' marked slow."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=slow) if name in LIKE_OTHERS else name for name in names]


@pytest.mark.parametrize("name", [*NAMES, "gradient_flow", *ABLATIONS])
def test_docstring_states_claim_command_hardware_and_published_figure(name):
    text = inspect.getdoc(importlib.import_module(f"experiments.{name}"))
    said = {label: table.field(text, label) for label in table.LABELS}
    assert min(map(len, said.values())) >= len("none."), said
    assert said["Command"].startswith(f"python -m experiments.{name}")


def test_config_builds_and_records(module):
    config = module.get_config()
    assert isinstance(config, TrainConfig)
    assert from_record(to_record(config)) == config


@pytest.mark.parametrize(
    ("module", "name", "depth"), DEPTHS, ids=[f"{m.__name__[12:]}-{d}" for m, _, d in DEPTHS]
)
def test_each_depth_of_a_paper_is_its_network(module, name, depth):
    assert module.get_config(depth).model == create(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes of two random 8x8 images."""
    names = [f"class{label}" for label in range(10)]
    return class_folders(tmp_path_factory.mktemp("images"), names, 2, (8, 8))


@pytest.mark.parametrize("module", one_step_of(NAMES), indirect=True)
def test_one_step_on_synthetic_images(module, tmp_path, mesh, folder, monkeypatch):
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "cache"))
    config = shrunk(module.get_config(), folder)
    side = 8 * getattr(config.model, "stem_stride", 1)
    data = dataclasses.replace(config.data, image_size=side)
    config = dataclasses.replace(config, data=data)
    result = train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    assert (result["step"], result["num_eval"]) == (1, 10)
    assert np.isfinite(result["loss"])


def rates(config, *steps):
    """Learning rates at some steps of a run as long as the config says."""
    schedule = config.optimizer.schedule.build(config.optimizer.learning_rate, config.num_steps)
    return [float(schedule(step)) for step in steps]


def test_cifar10_resnet_is_the_papers_recipe():
    config = cifar10_resnet.get_config()
    optimizer = config.optimizer
    assert (config.num_steps, config.batch_size) == (64_000, 128)
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.nesterov) == (0.9, 1e-4, False)
    assert (config.augment.pad_crop, config.augment.flip) == (4, True)
    drops = rates(config, 0, 31_999, 32_001, 47_999, 48_001, 63_999)
    np.testing.assert_allclose(drops, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


@pytest.mark.parametrize("config", [cifar10_resnet.get_config(110), cifar10_preact.get_config()])
def test_deep_ones_rise_first_and_drop_where_the_others_do(config):
    found = rates(config, 0, 200, 400, 31_999, 32_001, 47_999, 48_001)
    wanted = [0.01, 0.055, 0.1, 0.1, 0.01, 0.01, 0.001]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_wide_resnet_is_the_papers_recipe():
    config = wide_resnet.get_config()
    optimizer = config.optimizer
    assert (config.num_epochs, config.batch_size, config.augment.pad_mode) == (200, 128, "reflect")
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.nesterov) == (0.9, 5e-4, True)
    whole = dataclasses.replace(config, num_steps=200 * 391)
    found = rates(whole, *(391 * epoch + 1 for epoch in (0, 59, 60, 119, 120, 159, 160, 199)))
    wanted = [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_cifar100_dropblock_is_the_tutorials_recipe():
    config = importlib.import_module("experiments.cifar100_dropblock").get_config()
    model = config.model
    assert (model.stage_filters, model.dense_features) == ((128, 256, 512, 1024), (4096, 4096))
    assert (config.batch_size, config.eval_batch_size, model.num_classes) == (250, 250, 100)
    epochs = config.dropblock_rise * config.num_epochs
    assert (epochs, model.dropblock_rate / epochs) == (40, pytest.approx(0.005))
    assert config.eval_every_epochs == config.num_epochs
    assert config.data.eval_split is None  # the test images


def test_cifar10_mini_is_the_tutorials_recipe():
    config = importlib.import_module("experiments.cifar10_mini").get_config()
    steps_per_epoch = -(-50_000 // config.batch_size)
    assert (steps_per_epoch, config.num_epochs * steps_per_epoch) == (391, 19_550)
    assert (config.optimizer.learning_rate, config.optimizer.eps) == (1e-3, 1e-7)
    assert config.augment.width_shift * 32 == 5
    assert (config.normalization, config.model.dropout_rate) == ("pixel", 0.25)
