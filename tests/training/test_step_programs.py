"""Several steps in one dispatch give what single steps do, to the bit where XLA compiles alike.

As the tests compile (without most optimizations) it does on a CPU; fully optimized it joins other
operations in a longer program, and the last bits differ.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, device_bytes, max_difference, tiny_resnet
from run_helpers import saved, timeless

from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.inspection.step_cost import collectives
from flax_resnet.optim.optimizers import SGD
from flax_resnet.records.run_dir import read_metrics
from flax_resnet.studies import vmapped
from flax_resnet.tracking import run_log
from flax_resnet.training import setup, step_programs
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.training.step_programs import StepPrograms

BATCH = 32


@pytest.fixture(scope="module")
def plain(digits_dir):
    """Five steps of which nothing is logged before the end."""
    return TrainConfig(
        model=tiny_resnet(num_filters=2),
        data=DataConfig(data_dir=digits_dir),
        optimizer=SGD(),
        batch_size=BATCH,
        eval_batch_size=400,
        num_steps=5,
        log_every_steps=100,
    )


@pytest.fixture(scope="module")
def config(plain):
    """Twelve steps with everything random on, logged after 6 and evaluated and saved after 7."""
    return dataclasses.replace(
        plain,
        model=tiny_resnet(num_filters=2, dropblock_rate=0.1, dropblock_size=2),
        augment=Augment(cutout=2),
        num_steps=12,
        ema_decay=0.9,
        log_every_steps=6,
        eval_every_epochs=7 / 46,
    )


@pytest.fixture
def calls(monkeypatch):
    """Steps of each call of the compiled train step."""
    taken, compiled = [], StepPrograms.compile

    def compile_counting(self, lengths):
        programs = compiled(self, lengths)

        def counting(state, batch):
            taken.append(step_programs.steps_in(batch))
            return programs.train_step(state, batch)

        return programs._replace(train_step=counting)

    monkeypatch.setattr(StepPrograms, "compile", compile_counting)
    return taken


def by(config, steps_per_dispatch):
    return dataclasses.replace(config, steps_per_dispatch=steps_per_dispatch)


def trained(config, workdir, mesh):
    """(state after all steps, their losses)."""
    ready = setup.set_up(config, workdir, mesh)
    return after_all(ready)


def after_all(ready):
    step = ready.programs.compile(ready.dispatch_lengths).train_step
    sums = []
    for batch in ready.dispatches():
        ready.state, one = step(ready.state, batch)
        sums.append(one)
    each = step_programs.by_step(sums, len(ready.leading_axes))
    return ready.state, [one["loss"] for one in each]


# Which steps go together.


@pytest.mark.parametrize(
    ("first", "end", "size", "pauses", "want"),
    [
        (0, 12, 4, (100,), [4, 4, 4]),
        (0, 12, 3, (6, 7), [3, 3, 1, 1, 1, 3]),
        (0, 12, 4, (6, 7), [4, 1, 1, 1, 1, 4]),
        (4, 12, 3, (6, 7), [1, 1, 1, 1, 1, 3]),
        (0, 6, 4, (100,), [4, 1, 1]),
        (0, 3, 2, (1,), [1, 1, 1]),
        (3, 3, 2, (1,), []),
    ],
)
def test_groups_are_aligned_and_cross_nothing(first, end, size, pauses, want):
    assert list(step_programs.dispatch_lengths(first, end, size, pauses)) == want


def test_what_is_left_does_not_depend_on_where_a_run_was_stopped():
    whole = list(step_programs.dispatch_lengths(0, 200, 8, (50, 46)))
    assert whole.count(8) == 19
    for i, step in enumerate(itertools.accumulate(whole, initial=0)):
        assert list(step_programs.dispatch_lengths(step, 200, 8, (50, 46))) == whole[i:]


# Runs.


@pytest.fixture(scope="module")
def singly(config, tmp_path_factory):
    """The workdir of a run in single steps, not to be changed."""
    workdir = tmp_path_factory.mktemp("singly") / "w"
    train_and_evaluate(config, workdir, mesh=data_mesh(jax.devices()[:1]), quiet=True)
    return workdir


def test_groups_leave_the_record_of_single_steps(
    config, singly, tmp_path, mesh, calls, monkeypatch, capsys
):
    summary, images = run_log.Timer.summary, []
    monkeypatch.setattr(
        run_log.Timer, "summary", lambda self: images.append(self.images) or summary(self)
    )
    train_and_evaluate(by(config, 3), tmp_path / "w", mesh=mesh)
    assert calls == [3, 3, 1, 1, 1, 3]
    assert images == [6 * BATCH, BATCH, 5 * BATCH]
    assert "46 an epoch, 3 a dispatch, on 1 x cpu" in capsys.readouterr().out
    assert_trees_equal(saved(tmp_path / "w")[0], saved(singly)[0])
    records = timeless(read_metrics(tmp_path / "w"))
    assert records == timeless(read_metrics(singly))
    assert saved(tmp_path / "w")[1]["ran_on"]["steps_per_dispatch"] == 3


def test_a_run_may_be_one_dispatch_and_compiles_no_other(
    plain, tmp_path, mesh, calls, monkeypatch, capsys
):
    monkeypatch.setattr(StepPrograms, "compile_step", lambda self: pytest.fail("is not needed"))
    short = dataclasses.replace(plain, num_steps=2, steps_per_dispatch=1000)
    result = train_and_evaluate(short, tmp_path / "w", mesh=mesh)
    assert calls == [2]
    assert result["step"] == 2
    assert "2 steps, 46 an epoch, 2 a dispatch" in capsys.readouterr().out


def test_where_no_group_fits_it_is_said(plain, tmp_path, mesh, calls, capsys):
    often = dataclasses.replace(plain, num_steps=2, log_every_steps=1, steps_per_dispatch=2)
    train_and_evaluate(often, tmp_path / "w", mesh=mesh)
    assert calls == [1, 1]
    assert "steps_per_dispatch=2 and never so many steps with nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_streamed_sets_are_stacked_and_batches_cut_in_parts(plain, tmp_path, mesh):
    parts = dataclasses.replace(plain, accum_steps=2)
    state, losses = trained(parts, tmp_path / "resident", mesh)
    streams = dataclasses.replace(plain.data, resident_mb=0, num_workers=0)
    streamed = by(dataclasses.replace(parts, data=streams), 2)
    other, other_losses = trained(streamed, tmp_path / "streamed", mesh)
    assert_trees_equal(other.arrays(), state.arrays())
    assert other_losses == losses
    assert len(losses) == 5


def test_eight_devices_take_the_steps_of_one_to_1e_10_in_x64(plain, tmp_path, meshes, monkeypatch):
    """In a loop, as other devices than a CPU have it, with the state split."""
    grouped = step_programs.grouped
    monkeypatch.setattr(
        step_programs, "grouped", lambda *given, unroll: grouped(*given, unroll=False)
    )
    with jax.enable_x64(True):
        model = plain.model.clone(num_filters=8, dtype="float64", param_dtype="float64")
        one = dataclasses.replace(plain, model=model, num_steps=3)
        state, losses = trained(one, tmp_path / "one", meshes[0])
        many = by(dataclasses.replace(one, sharding="fsdp"), 3)
        ready = setup.set_up(many, tmp_path / "many", meshes[1])
        (group,) = ready.dispatches()
        rows = group.batch["row"]
        assert rows.shape == (3, BATCH)
        assert {x.data.shape for x in rows.addressable_shards} == {(3, BATCH // 8)}
        program, resident = ready.programs.compile_group()
        assert program.memory_analysis().alias_size_in_bytes == device_bytes(ready.state)
        # Each split parameter is gathered in the loop, and no image or row.
        split = [x for x in jax.tree.leaves(ready.state.params) if x.ndim > 1]
        assert collectives(program)["all-gather"] == len(split)
        held, (ready.state, sums) = ready.state, program(ready.state, resident, group.batch)
        assert jax.tree.leaves(held.params)[0].is_deleted()
        assert max_difference(ready.state.arrays(), state.arrays()) < 1e-10
        np.testing.assert_allclose(sums["loss"], losses, rtol=1e-10)


@pytest.mark.slow
def test_networks_train_together_in_groups(plain, tmp_path):
    configs = [dataclasses.replace(plain, seed=seed, num_steps=3) for seed in (0, 1)]
    with jax.enable_x64(True):
        model = plain.model.clone(dtype="float64", param_dtype="float64")
        configs = [dataclasses.replace(c, model=model) for c in configs]
        (state, losses), (grouped, grouped_losses) = (
            after_all(
                vmapped.set_up(
                    [by(c, size) for c in configs], tmp_path / str(size), jax.devices()[:2]
                )
            )
            for size in (1, 2)
        )
        assert len(grouped.step.sharding.device_set) == 2
        assert np.shape(losses) == np.shape(grouped_losses) == (3, 2)
        np.testing.assert_allclose(grouped_losses, losses, rtol=1e-10)
        assert max_difference(grouped.arrays(), state.arrays()) < 1e-10
