"""Runs go on elsewhere: on other devices, with another split."""

import dataclasses

import jax
import pytest
from helpers import assert_trees_equal, max_difference, tiny_resnet
from run_helpers import saved

from flax_resnet.checkpoints.checkpoints import CheckpointConfig, Checkpoints
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.errors import UserError
from flax_resnet.optim.optimizers import Adam
from flax_resnet.training import setup
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate


@pytest.fixture
def adam(digits_dir):
    return TrainConfig(
        model=tiny_resnet(num_filters=8),
        data=DataConfig(data_dir=digits_dir),
        augment=Augment(width_shift=0.1, mixup=0.2),
        optimizer=Adam(),
        batch_size=64,
        eval_batch_size=400,
        num_steps=6,
        log_every_steps=5,
        ema_decay=0.9,
        checkpoint=CheckpointConfig(every_steps=2, keep_last=9),
    )


def stopping_at(step):
    """A ``stop`` that says so after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= step


@pytest.mark.slow
def test_a_run_goes_from_eight_devices_to_one_to_four_and_from_whole_to_split(
    adam, tmp_path, meshes, capsys
):
    whole = tmp_path / "whole"
    train_and_evaluate(adam, whole, mesh=meshes[0])
    capsys.readouterr()
    moves = [(8, "fsdp", 2), (1, "replicated", 2), (4, "zero", None)]
    workdir = tmp_path / "w"
    for devices, kind, steps in moves:
        config = dataclasses.replace(adam, sharding=kind)
        mesh = data_mesh(jax.devices()[:devices])
        if steps is None:
            train_and_evaluate(config, workdir, mesh=mesh)
            break
        with pytest.raises(KeyboardInterrupt):
            train_and_evaluate(config, workdir, mesh=mesh, stop=stopping_at(steps))
    said = capsys.readouterr().out
    assert "saved with devices 8, now 1; sharding fsdp, now replicated: the last bits may" in said
    assert "saved with devices 1, now 4; sharding replicated, now zero: the last bits may" in said
    gap = max_difference(saved(workdir)[0]["params"], saved(whole)[0]["params"])
    assert gap < 1e-4  # three float32 orders of summing, and Adam divides by small numbers


def save(run, step):
    """A checkpoint of a run as it stands, as if it were at ``step``."""
    run.progress.step = step
    opened = Checkpoints(run.config.checkpoint.place(run.workdir), run.config.checkpoint)
    opened.save(step, run.arrays(), run.meta(), None)
    opened.close()


def test_what_was_saved_is_restored_bit_for_bit_on_other_devices(adam, tmp_path, meshes):
    fsdp = dataclasses.replace(adam, sharding="fsdp")
    save(setup.set_up(fsdp, tmp_path / "w", meshes[1]), 3)
    stored, _ = saved(tmp_path / "w")
    for kind, mesh in [("replicated", meshes[0]), ("zero", meshes[1]), ("fsdp", meshes[1])]:
        run = setup.set_up(dataclasses.replace(adam, sharding=kind), tmp_path / "w", mesh)
        assert run.progress.step == 3
        for name in ("params", "batch_stats", "ema", "key"):
            assert_trees_equal(getattr(run.state, name), stored[name])
        assert run.state.params["head"]["kernel"].sharding.device_set == set(mesh.devices.flat)


def test_another_runs_checkpoints_are_refused(adam, tmp_path, mesh):
    kept = dataclasses.replace(adam.checkpoint, directory=str(tmp_path / "kept"))
    one = dataclasses.replace(adam, checkpoint=kept, num_steps=2)
    save(setup.set_up(one, tmp_path / "a", mesh), 2)
    assert not (tmp_path / "a/checkpoints").exists()
    other = dataclasses.replace(one, seed=5)
    with pytest.raises(UserError, match=r"another config \(seed: there 0, here 5\): choose"):
        setup.set_up(other, tmp_path / "b", mesh)
    again = setup.set_up(one, tmp_path / "c", mesh)
    assert again.progress.step == 2  # the workdir was lost, they are not
