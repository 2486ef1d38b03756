import dataclasses
import importlib.metadata
import json
import pathlib

import pytest

from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.errors import TryAgain, UserError
from flax_resnet.models import MiniModel
from flax_resnet.optim.optimizers import SGD
from flax_resnet.records.configs import from_record, to_record
from flax_resnet.training import workdir as workdir_module
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.workdir import check_workdir, claimed, differences, write_record


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


def test_a_run_begun_before_a_field_was_there_goes_on_with_its_default():
    there = to_record(TrainConfig(optimizer=SGD(learning_rate=0.2)))
    for name in ("steps_per_dispatch", "tta", "lookahead_steps"):
        del there[name]
    del there["optimizer"]["norm_bias_scale"]
    del there["augment"]["alternating_flip"]
    here = TrainConfig(optimizer=SGD(learning_rate=0.2))
    assert differences(there, here) == []
    changed = dataclasses.replace(
        here, tta="flip", augment=dataclasses.replace(here.augment, alternating_flip=True)
    )
    found = differences(there, changed)
    assert [line.partition(":")[0] for line in found] == ["augment.alternating_flip", "tta"]


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
    monkeypatch.setattr(workdir_module.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"w cannot be written \(.* is not writable\)"):
        check_workdir(tmp_path / "w", TrainConfig())


def test_a_workdir_in_use_is_not_shared(tmp_path):
    with claimed(tmp_path, TrainConfig()):
        before = (tmp_path / "config.json").read_text()
        second = claimed(tmp_path, TrainConfig())
        with pytest.raises(TryAgain, match="is in use by another process"), second:
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
    assert start["packages"]["jax"] == importlib.metadata.version("jax")
    assert set(start["packages"]) == set(workdir_module.RECORDED_PACKAGES)
    git = pathlib.Path(__file__).parents[2] / ".git"
    assert start["git"] is None or len(start["git"]["commit"]) == 40
    assert (start["git"] is not None) == git.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 0},
        {"eval_batch_size": -1},
        {"accum_steps": 0},
        {"steps_per_dispatch": 0},
        {"log_every_steps": 0},
        {"num_epochs": 0},
        {"eval_every_epochs": 0},
        {"num_steps": 0},
        {"label_smoothing": 1.0},
        {"target_threshold": 1.0, "loss": "binary_cross_entropy"},
        {"target_threshold": 0.2},
        {"ema_decay": 1.0},
        {"dropblock_rise": 0.5},
        {"lookahead_steps": 5},
        {"seed": -1},
        {"seed": 2**32},
        {"num_epochs": float("nan")},
        {"num_epochs": float("inf")},
    ],
)
def test_bad_fields(fields):
    with pytest.raises(UserError, match=f"{next(iter(fields))}="):
        TrainConfig(**fields)


@pytest.mark.parametrize("seen", [None, 2, 3])
def test_a_workdir_that_processes_do_not_share_is_named(tmp_path, monkeypatch, seen):
    monkeypatch.setattr(workdir_module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(workdir_module.jax, "process_index", lambda: 1)
    monkeypatch.setattr(workdir_module.sharding, "same_everywhere", lambda value: 3)
    waits = []
    monkeypatch.setattr(workdir_module.time, "sleep", waits.append)
    if seen is not None:  # an old run's record of this host alone, or what the lead has written
        record = {"config": {"class": ""}, "starts": [{}] * seen}
        (tmp_path / "config.json").write_text(json.dumps(record))
    if seen == 3:
        workdir_module._check_shared(tmp_path)
        return
    with pytest.raises(TryAgain, match="is not the same directory in process 1 as in process 0"):
        workdir_module._check_shared(tmp_path)
    assert sum(waits) == 90  # longer than NFS remembers
