import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_resnet

from flax_resnet import config as config_module
from flax_resnet.augment import Augment
from flax_resnet.checkpoint import CheckpointConfig
from flax_resnet.config import (
    TrainConfig,
    check_workdir,
    claimed,
    differences,
    find_class,
    flatten,
    from_record,
    to_record,
    write_record,
)
from flax_resnet.data import DataConfig
from flax_resnet.errors import UserError
from flax_resnet.models import MiniModel
from flax_resnet.optim import LAMB, SGD, Cosine, Piecewise

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
    "name", ["os:system", "subprocess:Popen", "flax_resnet.config:json", "nowhere:X", "x", ""]
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


def test_differences_leave_out_what_a_resumed_run_may_change():
    base = TrainConfig()
    free = dataclasses.replace(
        base,
        log_every_steps=7,
        eval_every_epochs=3.0,
        checkpoint=CheckpointConfig(every_steps=4, keep_last=9),
        data=dataclasses.replace(base.data, data_dir="elsewhere", num_workers=5, resident_mb=1),
    )
    assert differences(to_record(base), free) == []
    other = dataclasses.replace(base, seed=1, optimizer=SGD(learning_rate=0.2))
    assert differences(to_record(base), other) == [
        "optimizer.learning_rate: there 0.1, here 0.2",
        "seed: there 0, here 1",
    ]


def test_workdir_of_the_same_config_is_taken_and_of_another_refused(tmp_path):
    workdir = tmp_path / "w"
    check_workdir(workdir, TrainConfig())
    assert not workdir.exists()
    workdir.mkdir()
    write_record(workdir, TrainConfig())
    check_workdir(workdir, TrainConfig())
    with pytest.raises(
        UserError, match=r"another config \(seed: there 0, here 5\): choose another"
    ):
        check_workdir(workdir, TrainConfig(seed=5))
    with pytest.raises(
        UserError, match=r"smoothing.*; model: there ResNet, here MiniModel.*; and \d+ more\)"
    ):
        check_workdir(workdir, TrainConfig(seed=5, label_smoothing=0.1, model=MiniModel()))


def test_workdirs_that_cannot_hold_a_run(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match=r"file is not a directory\): choose another"):
        check_workdir(file / "w", TrainConfig())
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds checkpoints and no config.json"):
        check_workdir(tmp_path / "old", TrainConfig())
    (tmp_path / "odd").mkdir()
    for text in ("{}", "[]", "", '{"config": {}}'):
        (tmp_path / "odd" / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json is not a run's record"):
            check_workdir(tmp_path / "odd", TrainConfig())
    monkeypatch.setattr(config_module.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"w cannot be written \(.* is not writable\)"):
        check_workdir(tmp_path / "w", TrainConfig())


def test_a_workdir_in_use_is_not_shared(tmp_path):
    with claimed(tmp_path, TrainConfig()):
        before = (tmp_path / "config.json").read_text()
        second = claimed(tmp_path, TrainConfig())
        with pytest.raises(UserError, match="is in use by another process"), second:
            pytest.fail("claimed twice")
        assert (tmp_path / "config.json").read_text() == before
    with claimed(tmp_path, TrainConfig()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_the_record_says_what_ran_and_keeps_every_start(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["digits.py", "--seed", "0"])
    write_record(tmp_path, TrainConfig())
    write_record(tmp_path, TrainConfig())
    record = json.loads((tmp_path / "config.json").read_text())
    assert from_record(record["config"]) == TrainConfig()
    assert len(record["starts"]) == 2
    start = record["starts"][1]
    assert start["argv"] == ["digits.py", "--seed", "0"]
    assert start["devices"] == ["cpu"] * 8
    assert start["packages"]["jax"].count(".") == 2
    assert set(start["packages"]) == set(config_module.RECORDED_PACKAGES)
    git = pathlib.Path(__file__).parents[1] / ".git"
    assert start["git"] is None or len(start["git"]["commit"]) == 40
    assert (start["git"] is not None) == git.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"eval_batch_size": -1},
        {"accum_steps": 0},
        {"accum_steps": 3},
        {"log_every_steps": 0},
        {"num_epochs": 0},
        {"eval_every_epochs": 0},
        {"num_steps": 0},
        {"label_smoothing": 1.0},
        {"ema_decay": 1.0},
        {"seed": -1},
        {"seed": 2**32},
        {"num_epochs": float("nan")},
        {"num_epochs": float("inf")},
        {"eval_every_epochs": float("inf")},
    ],
)
def test_bad_fields(fields):
    with pytest.raises(UserError, match=f"{next(iter(fields))}="):
        TrainConfig(**fields)


def test_a_typo_fails_in_python():
    with pytest.raises(TypeError, match="num_epoch"):
        TrainConfig(num_epoch=3)
