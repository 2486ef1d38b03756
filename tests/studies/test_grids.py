import dataclasses
import re

import pytest
from helpers import tiny_resnet

from flax_resnet.data.augment import Augment
from flax_resnet.errors import UserError
from flax_resnet.models import MiniModel
from flax_resnet.optim.optimizers import SGD
from flax_resnet.studies.grids import grid, replaced
from flax_resnet.training.config import TrainConfig


@pytest.fixture
def base():
    return TrainConfig(model=tiny_resnet(num_filters=4), optimizer=SGD(learning_rate=0.05))


def test_a_grid_is_every_combination_with_every_seed(base):
    configs = grid(
        base,
        {"model.connection": ("plain", "residual"), "optimizer.learning_rate": (0.1, 0.01)},
        seeds=2,
    )
    assert len(configs) == 8
    one = configs["connection=plain,learning_rate=0.01/seed1"]
    assert (one.model.connection, one.optimizer.learning_rate, one.seed) == ("plain", 0.01, 1)
    assert one == dataclasses.replace(
        base,
        model=tiny_resnet(num_filters=4, connection="plain"),
        optimizer=SGD(learning_rate=0.01),
        seed=1,
    )


def test_labels_name_variants_and_grids_join(base):
    nets = {"mini": MiniModel(stage_sizes=(1,)), "wide": tiny_resnet(num_filters=9)}
    both = {"crop": {"augment": Augment(pad_crop=2), "num_steps": 9}}
    configs = grid(base, {"model": nets}, seeds=(4,)) | grid(base, {"": both}) | grid(base, {})
    assert list(configs) == ["mini/seed4", "wide/seed4", "crop/seed0", "base/seed0"]
    assert configs["mini/seed4"].model == nets["mini"]
    assert (configs["crop/seed0"].augment.pad_crop, configs["crop/seed0"].num_steps) == (2, 9)
    assert configs["base/seed0"] == base
    assert replaced(base, "optimizer.schedule.warmup", 0.5).optimizer.schedule.warmup == 0.5
    for seeds in ((), 0, (1, 1)):
        with pytest.raises(UserError, match="expected one or more, each once"):
            grid(base, {}, seeds)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"model.conection": ("plain",)}, r"no field 'conection' \(did you mean 'connection'\?\)"),
        ({"optimiser": (1,)}, r"TrainConfig has no field 'optimiser' \(did you mean 'optimizer'"),
        ({"seed.x": (1,)}, "seed has no fields, 'seed.x' names one"),
        ({"batch_size": ()}, "batch_size=(): expected some values"),
        ({"model.connection": "plain"}, "model.connection='plain': expected some values"),
        ({"model.connection": ("plian",)}, "connection='plian': expected one of"),
        ({"data.folder": ("a/b",)}, "a variant would be called 'folder=a/b', which is no name"),
        ({"": (1,)}, "expected {label: {dotted field: value}}"),
        ({"batch_size": (8, 8)}, "two variants are called 'batch_size=8'"),
        ({"seed": (5, 6)}, "the axis seed: seeds are the runs of a variant"),
        ({"": {"x": {"seed": 1}}}, "the axis seed: seeds are the runs of a variant"),
        ({"batch_size": ("8",)}, "batch_size='8': expected a whole number"),
        ({"loss": ("crossentropy",)}, "loss='crossentropy': expected one of"),
        ({"model": (tiny_resnet(),)}, "a variant would be called 'model=ResNet( # attributes"),
        ({"num_steps": {"table.csv": 3}}, "a variant would be called 'table.csv'"),
        ({"num_steps": {"a" * 150: 3}, "seed_": {}}, "seed_={}: expected some values"),
        ({"num_steps": {"a" * 150: 3}, "batch_size": {"b" * 60: 8}}, "a variant would be called"),
    ],
)
def test_a_bad_grid_is_one_line(base, axes, message):
    with pytest.raises(UserError) as error:
        grid(base, axes)
    assert message in str(error.value) or re.search(message, str(error.value))
    assert "\n" not in str(error.value)
