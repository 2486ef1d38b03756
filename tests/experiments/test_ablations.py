"""Ablations: the grid is what its docstring says, and flags of the base reach every variant."""

import importlib
import itertools
import pkgutil

import pytest

from experiments import ablations
from flax_resnet.cli import flags
from flax_resnet.records.configs import flatten, to_record
from flax_resnet.training.config import TrainConfig

MODULES = {
    name: importlib.import_module(f"experiments.ablations.{name}")
    for _, name, _ in pkgutil.iter_modules(ablations.__path__)
}
VARYING = {
    "shortcuts": {"model.shortcut"},
    "connections": {"model.connection", "model.stage_sizes"},
    "versions": {"model.block_cls", "model.stage_sizes", "model.shortcut", "model.stride_conv"},
    "zero_init": {"model.zero_init_last", "model.stage_sizes"},
    "bn_momentum": {"model.bn_momentum"},
    "dropblock": {"model.dropblock_rate", "dropblock_rise"},
    "gate_bias": {"model.gate_bias", "optimizer.learning_rate"},
}
COUNTS = {"shortcuts": 3, "connections": 6, "versions": 6, "zero_init": 4, "bn_momentum": 4,
          "dropblock": 7, "gate_bias": 15}  # fmt: skip


def variants(name, seeds=1):
    module = MODULES[name]
    return module.get_grid(module.get_base(), seeds)


def differing(config, base):
    one, other = flatten(to_record(config)), flatten(to_record(base))
    return {field for field in one if one[field] != other[field]}


@pytest.mark.parametrize("name", MODULES)
def test_every_variant_has_its_seeds(name):
    found = variants(name, 2)
    assert all(isinstance(config, TrainConfig) for config in found.values())
    names = {key.rpartition("/")[0] for key in found}
    assert {f"{variant}/seed{seed}" for variant in names for seed in (0, 1)} == set(found)
    assert all(found[f"{variant}/seed1"].seed == 1 for variant in names)


@pytest.mark.parametrize("name", MODULES)
def test_each_reference_is_another_variant(name):
    names = {key.rpartition("/")[0] for key in variants(name)}
    baseline = MODULES[name].BASELINE
    if isinstance(baseline, str):
        baseline = dict.fromkeys(names - {baseline}, baseline)
    assert baseline
    assert {*baseline, *baseline.values()} <= names
    assert all(variant != reference for variant, reference in baseline.items())


@pytest.mark.parametrize("name", ["connections", "depth", "dropblock", "versions", "zero_init"])
def test_a_variant_and_its_own_reference_differ_in_one_field(name):
    """So a difference of the two has one cause; of depths the stages' sizes are that field."""
    found = {key.rpartition("/")[0]: config for key, config in variants(name).items()}
    for variant, reference in MODULES[name].BASELINE.items():
        fields = differing(found[variant], found[reference])
        assert len(fields) == 1, (variant, reference)
        assert fields <= {"model.stage_sizes"} or name != "depth"


@pytest.mark.parametrize("name", VARYING)
def test_nothing_but_the_question_varies(name):
    found = variants(name)
    base = MODULES[name].get_base()
    assert set().union(*(differing(config, base) for config in found.values())) == VARYING[name]
    assert len({repr(config) for config in found.values()}) == len(found) == COUNTS[name]
    if name == "gate_bias":
        pairs = {(c.model.gate_bias, c.optimizer.learning_rate) for c in found.values()}
        assert pairs == set(itertools.product((0, -1, -2, -4, -6), (0.03, 0.1, 0.3)))


@pytest.mark.parametrize("name", VARYING)
def test_flags_of_the_base_reach_every_variant(name):
    module = MODULES[name]
    words = ["--model.dtype", "bfloat16", "--num-steps", "7"]
    base = flags.parse(module.get_base(), "runs/x", words).config
    for config in module.get_grid(base, 1).values():
        assert (config.model.dtype, config.num_steps) == ("bfloat16", 7)


@pytest.mark.parametrize("name", ["dropblock", "gate_bias"])
def test_what_is_tuned_is_tuned_on_training_images_held_out(name):
    for config in variants(name).values():
        assert config.data.train_split == "train[:90%]"
        assert config.data.eval_split == "train[90%:]"
