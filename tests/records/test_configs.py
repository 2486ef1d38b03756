import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_resnet

from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.errors import UserError
from flax_resnet.models import MiniModel
from flax_resnet.models.regularize import DropBlock
from flax_resnet.optim.optimizers import LAMB, SGD, Cosine, Piecewise
from flax_resnet.records.configs import (
    MOVED_CLASSES,
    REMOVED_FIELDS,
    find_class,
    flatten,
    from_record,
    to_record,
    varying_fields,
)
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.workdir import differences

CONFIGS = [
    TrainConfig(),
    TrainConfig(
        model=MiniModel(num_classes=7, dtype="bfloat16"),
        optimizer=LAMB(schedule=Piecewise(boundaries=(0.1, 0.2))),
        data=DataConfig(folder="somewhere", image_size=64),
        augment=Augment(rotation=3.0),
        checkpoint=CheckpointConfig(every_steps=5),
        num_steps=3,
    ),
]


def test_numpy_scalars_are_recorded_as_their_values():
    """As names of their dtypes two different configs would look the same."""
    assert to_record(np.int64(7)) == 7
    assert to_record(np.float32(0.5)) == 0.5
    assert to_record(jnp.dtype("bfloat16")) == "bfloat16"


@pytest.mark.parametrize("config", CONFIGS)
def test_a_record_gives_the_config_back_through_json(config):
    assert from_record(json.loads(json.dumps(to_record(config)))) == config


def test_dtypes_and_classes_are_recorded_by_name():
    record = to_record(tiny_resnet(dtype=jnp.bfloat16))
    assert record["dtype"] == "bfloat16"
    assert record["block_cls"] == {"class_itself": "flax_resnet.models.blocks:BasicBlock"}
    assert "parent" not in record


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(UserError, match="config value <function"):
        to_record({"x": 1} and (lambda: None))


def test_a_record_with_a_mistyped_field_names_the_nearest():
    record = to_record(TrainConfig())
    record["optimizer"]["learning_rat"] = 1.0
    with pytest.raises(UserError, match=r"no field 'learning_rat' \(did you mean 'learning_rate'"):
        from_record(record)


@pytest.mark.parametrize(
    "name",
    ["os:system", "subprocess:Popen", "flax_resnet.training.config:json", "nowhere:X", "x", ""],
)
def test_a_record_cannot_name_other_peoples_code(name):
    with pytest.raises(UserError, match="is not known: expected one of flax_resnet"):
        find_class(name)


def test_flatten_names_fields_by_dots():
    flat = flatten(to_record(TrainConfig(optimizer=SGD(schedule=Cosine(final=0.5)))))
    assert flat["optimizer"] == "SGD"
    assert flat["optimizer.schedule"] == "Cosine"
    assert flat["optimizer.schedule.final"] == 0.5
    assert flat["model.stage_sizes"] == [3, 3, 3]


def test_a_field_that_was_removed_is_ignored_where_it_was_off_and_else_named(monkeypatch):
    monkeypatch.setitem(REMOVED_FIELDS, "flax_resnet.optim.optimizers:SGD", {"gone": [1, 2]})
    config = TrainConfig()
    record = to_record(config)
    record["optimizer"]["gone"] = [1, 2]
    assert from_record(record) == config
    assert "optimizer.gone" not in flatten(record)
    assert differences(record, config) == []
    record["optimizer"]["gone"] = [1, 3]
    assert differences(record, config) == ["optimizer.gone: there [1, 3], here not a field"]
    with pytest.raises(
        UserError,
        match=r"no field 'gone' any more, and \(1, 3\) in .* write \[1, 2\] there",
    ):
        from_record(record)


def test_what_was_moved_is_found_by_its_old_name(monkeypatch):
    assert find_class("flax_resnet.regularize:DropBlock") is DropBlock
    monkeypatch.setitem(MOVED_CLASSES, "flax_resnet.old:Step", "flax_resnet.optim.optimizers:SGD")
    monkeypatch.setitem(MOVED_CLASSES, "flax_resnet.old:Net", "not_there.speedrun:Net")
    record = to_record(TrainConfig())
    record["optimizer"]["class"] = "flax_resnet.old:Step"
    assert from_record(record) == TrainConfig()
    record["checkpoint"]["class"] = "flax_resnet.checkpoint:CheckpointConfig"
    assert from_record(record) == TrainConfig()
    for name in ("flax_resnet.old:Net", "not_there.speedrun:Net"):
        with pytest.raises(UserError, match=f"'{name}' is in not_there.speedrun, which cannot be"):
            find_class(name)


def test_a_class_of_the_table_is_found_where_nothing_has_imported_it(monkeypatch):
    """A command that evaluates a speed run has not."""
    monkeypatch.delitem(sys.modules, "experiments.speedrun", raising=False)
    found = find_class("experiments.speedrun:SpeedNet")
    assert (found.__module__, found.__name__) == ("experiments.speedrun", "SpeedNet")


def test_fields_that_vary_are_those_that_differ_or_are_not_everywhere():
    records = [{"a": 1, "b": [1, 2], "c": None}, {"a": 1, "b": [1, 3], "d": 0}]
    assert varying_fields(records) == ["b", "c", "d"]
    assert varying_fields(records[:1]) == []
