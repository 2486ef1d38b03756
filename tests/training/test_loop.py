import contextlib
import dataclasses
import io
import json
import math
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal, tiny_resnet
from run_helpers import saved, timeless

from flax_resnet.checkpoints.checkpoints import CheckpointConfig, Checkpoints
from flax_resnet.data import sources
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.data.decode import Decoder
from flax_resnet.distributed.preemption import Preempted
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.errors import UserError
from flax_resnet.models import DropBlockResNet, MiniModel
from flax_resnet.optim.optimizers import LARS, Adam, Cosine
from flax_resnet.records.run_dir import read_metrics
from flax_resnet.tracking.run_log import RunLog
from flax_resnet.training import loop, run
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.training.step_programs import StepPrograms


@pytest.fixture(scope="module")
def config(digits_dir):
    """Twelve steps with everything random on, evaluated every four."""
    return TrainConfig(
        model=tiny_resnet(),
        data=DataConfig(data_dir=digits_dir),
        augment=Augment(rotation=10, width_shift=0.1, cutout=2, mixup=0.2),
        optimizer=Adam(schedule=Cosine(warmup=0.2)),
        normalization="pixel",
        batch_size=360,
        eval_batch_size=200,
        num_steps=12,
        ema_decay=0.9,
        log_every_steps=3,
        checkpoint=CheckpointConfig(every_steps=6),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An unbroken run, which is not to be changed: (its workdir, its result, what it printed)."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result = train_and_evaluate(config, workdir, mesh=data_mesh(jax.devices()[:1]))
    return workdir, result, out.getvalue()


def test_a_run_leaves_its_record(whole):
    workdir, result, table = whole
    assert sorted(p.name for p in workdir.iterdir()) == [
        "checkpoints", "config.json", "confusion.png", "curves.png",
        "metrics.jsonl", "result.json", "tensorboard",
    ]  # fmt: skip
    records = read_metrics(workdir)
    assert [(r["split"], r["step"]) for r in records] == [
        ("train", 3), ("train", 5), ("eval", 5), ("train", 6), ("train", 9),
        ("train", 10), ("eval", 10), ("train", 12), ("eval", 12),
    ]  # fmt: skip
    assert [r["epoch"] for r in records if r["split"] == "eval"] == [1.0, 2.0, 2.4]
    last = records[-1]
    assert json.loads((workdir / "result.json").read_text()) == result
    assert (result["top1"], result["loss"]) == (last["top1"], last["loss"])
    assert result["step"] == 12
    assert (result["num_train"], result["num_eval"]) == (1442, 355)
    assert result["best_top1"] == max(r["top1"] for r in records if r["split"] == "eval")
    assert f"{100 * result['top1']:.2f} % of 355 images" in table
    state, meta = saved(workdir)
    assert int(state["step"]) == meta["step"] == 12
    assert meta["class_names"] == [str(i) for i in range(10)]
    assert meta["config"]["seed"] == 0


def test_evaluation_of_the_loop_equals_brute_force(config, whole, digits_dir):
    workdir, result, _ = whole
    state, _ = saved(workdir)
    (test,) = sources.open_tfds("sklearn_digits", digits_dir, ("test",))
    encoded, labels = test.read(range(355))
    images = np.stack([Decoder(1)(data) for data in encoded])
    stats = state["normalization"]
    logits = np.asarray(
        config.model.apply(state["ema"], (images / 255 - stats["mean"]) / stats["std"])
    )
    rank = np.argsort(-logits, axis=1)
    assert result["top1"] == np.mean(rank[:, 0] == labels)
    assert result["top5"] == np.mean((rank[:, :5] == labels[:, None]).any(1))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert result["loss"] == pytest.approx(-log_p[np.arange(355), labels].mean(), rel=1e-5)


class Stop(Exception):
    """Ends a run in the middle, as a crash would."""


@pytest.fixture
def crash_after(monkeypatch):
    """Makes the loop crash when it has logged training metrics of a step."""

    def arrange(step):
        write = RunLog.write

        def crashing(self, split, at, *rest):
            write(self, split, at, *rest)
            if at >= step:
                raise Stop

        monkeypatch.setattr(RunLog, "write", crashing)

    yield arrange
    monkeypatch.undo()


@pytest.mark.parametrize("crash", [9, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_unbroken_one(
    config, whole, tmp_path, mesh, crash_after, monkeypatch, capsys, crash
):
    (whole, want, _), broken = whole, tmp_path / "broken"
    crash_after(crash)
    with pytest.raises(Stop):
        train_and_evaluate(config, broken, mesh=mesh)
    monkeypatch.undo()
    got = train_and_evaluate(config, broken, mesh=mesh)
    resumed = {3: 0, 9: 6}[crash]
    assert (f"resumes at step {resumed}" in capsys.readouterr().out) == (resumed > 0)
    assert_trees_equal(saved(broken)[0], saved(whole)[0])
    assert_trees_equal(saved(broken, "best")[0], saved(whole, "best")[0])
    assert timeless(read_metrics(broken)) == timeless(read_metrics(whole))
    clock = dict.fromkeys(k for k in want if k.endswith("seconds"))
    assert {**got, **clock} == {**want, **clock}
    assert len(json.loads((broken / "config.json").read_text())["starts"]) == 2


@pytest.mark.slow
def test_a_run_cut_off_after_its_last_checkpoint_is_closed(config, tmp_path, mesh, monkeypatch):
    monkeypatch.setattr(loop, "conclude", lambda *a, **k: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    monkeypatch.undo()
    result = train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    records = read_metrics(tmp_path / "w")
    assert (result["step"], result["top1"]) == (12, records[-1]["top1"])
    assert (tmp_path / "w" / "confusion.png").exists()


def test_a_finished_run_says_so_and_touches_nothing(config, whole, capsys, monkeypatch):
    workdir, want, _ = whole
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    monkeypatch.setattr(loop, "set_up", lambda *args: pytest.fail("nothing may be set up"))
    assert train_and_evaluate(config, workdir) == want
    assert "is finished: 12 steps, top-1 " in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


TWO_SIZES = DataConfig(image_size=4, eval_image_size=8)


def test_streamed_and_resident_runs_are_bit_identical(config, whole, tmp_path, mesh):
    data = dataclasses.replace(config.data, resident_mb=0, num_workers=0)
    streamed = dataclasses.replace(config, data=data)
    train_and_evaluate(streamed, tmp_path / "streamed", mesh=mesh)
    assert_trees_equal(saved(tmp_path / "streamed")[0], saved(whole[0])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, "batch_size=12 is not divisible by the 8 devices: use 8 or 16"),
        ({"batch_size": 72, "accum_steps": 2}, "over 8 devices does not divide into accum_steps=2"),
        ({"model": tiny_resnet(num_classes=3)}, "num_classes=3 and the data has labels 0 to 9"),
        ({"model": tiny_resnet(groups=4)}, "ResNet with .* BasicBlock with groups=4, width_per"),
        (
            {"model": tiny_resnet(include_top=False, pooling="avg")},
            r"ResNet gives \(2, 8\) for two images, expected \(2, 10\) logits: .*include_top=True",
        ),
        (
            {"model": tiny_resnet(scan_blocks=True), "optimizer": LARS()},
            "LARS with model.scan_blocks: it treats each layer by itself",
        ),
        ({"normalization": "imagenet"}, "'imagenet' is for 3 channels, the images have 1"),
        ({"model": tiny_resnet(param_dtype="float64")}, "param_dtype=float64 needs 64-bit JAX"),
        ({"model": tiny_resnet(axis_name="batch")}, "axis_name=batch: it is for your own jax.pmap"),
        (
            {"model": MiniModel(stage_sizes=(1,) * 5, num_filters=2)},
            r"MiniModel with .* images of \(8, 8, 1\): input is",
        ),
        (
            {"data": TWO_SIZES},
            r"normalised by pixel, images of \(4, 4, 1\) in training cannot be \(8, 8, 1\)",
        ),
        (
            {"data": TWO_SIZES, "normalization": "channel",
             "model": DropBlockResNet(10, (2,), (3,))},
            r"DropBlockResNet, trained on images of \(4, 4, 1\), does not take \(8, 8, 1\); leave",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_anything_is_written(config, tmp_path, change, message):
    if "data" in change:
        data = dataclasses.replace(change["data"], data_dir=config.data.data_dir)
        change = {**change, "data": data}
    with pytest.raises(UserError, match=message):
        train_and_evaluate(dataclasses.replace(config, **change), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("what", ["num_train", "num_eval", "class_names"])
def test_other_data_under_the_same_name_is_not_resumed_on(
    config, whole, tmp_path, mesh, monkeypatch, what
):
    shutil.copytree(whole[0], tmp_path / "w")
    (tmp_path / "w" / "result.json").unlink()
    before = (tmp_path / "w" / "config.json").read_text()
    describe = run.Data.describe
    monkeypatch.setattr(run.Data, "describe", lambda self: {**describe(self), what: 7})
    with pytest.raises(UserError, match=f"was trained on data with {what} .* and it is 7 now"):
        train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    assert (tmp_path / "w" / "config.json").read_text() == before


def test_equal_evaluations_name_the_checkpoint_that_is_kept(config, tmp_path, mesh, monkeypatch):
    evaluate = run.evaluate

    def always_the_same(*args):
        values, confusion = evaluate(*args)
        return {**values, "top1": 0.5}, confusion

    monkeypatch.setattr(run, "evaluate", always_the_same)
    result = train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    assert result["best_step"] == saved(tmp_path / "w", "best")[1]["step"] == 12


@pytest.mark.slow
def test_evaluations_need_not_all_save(config, tmp_path, mesh):
    config = dataclasses.replace(
        config,
        num_steps=8,
        eval_every_epochs=2 / math.ceil(1442 / config.batch_size),
        checkpoint=CheckpointConfig(every_evals=3, keep_last=9),
    )
    train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    steps = [r["step"] for r in read_metrics(tmp_path / "w") if r["split"] == "eval"]
    assert steps == [2, 4, 6, 8]
    kept = {int(p.name) for p in (tmp_path / "w" / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {6, 8}


@pytest.mark.parametrize(
    ("asked", "step", "owes"),
    [
        (5, 5, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(2, 2, False), (6, 5, True), (8, 6, False)]
        ),
    ],
)
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(
    config, whole, tmp_path, capsys, asked, step, owes
):
    """Between two logged lines; where an evaluation is due; in one; where a checkpoint is due."""
    workdir, one = tmp_path / "w", data_mesh(jax.devices()[:1])
    times = iter(range(1, 100))
    with pytest.raises(Preempted):
        train_and_evaluate(config, workdir, mesh=one, stop=lambda: next(times) >= asked)
    assert f"stopped at step {step} of 12, which is saved" in capsys.readouterr().out
    state, meta = saved(workdir)
    assert (meta["step"], meta["owes_evaluation"], int(state["step"])) == (step, owes, step)
    train_and_evaluate(config, workdir, mesh=one)
    assert f"resumes at step {step}" in capsys.readouterr().out
    assert timeless(read_metrics(workdir)) == timeless(read_metrics(whole[0]))
    assert_trees_equal(saved(workdir)[0], saved(whole[0])[0])
    assert_trees_equal(saved(workdir, "best")[0], saved(whole[0], "best")[0])


@pytest.mark.slow
def test_a_run_stopped_twice_in_the_same_evaluation_keeps_its_checkpoint(
    config, whole, tmp_path, monkeypatch
):
    workdir, one = tmp_path / "w", data_mesh(jax.devices()[:1])
    once = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=6, keep_last=1))
    for asked in (6, 1):
        answers = iter([*[False] * (asked - 1), True])
        with pytest.raises(Preempted):
            train_and_evaluate(once, workdir, mesh=one, stop=answers.__next__)
        assert saved(workdir)[1]["step"] == 5
        monkeypatch.setattr(Checkpoints, "save", None)  # a second one of step 5 is not written
    monkeypatch.undo()
    train_and_evaluate(once, workdir, mesh=one)
    assert timeless(read_metrics(workdir)) == timeless(read_metrics(whole[0]))


def test_a_run_that_was_set_up_before_another_went_on_does_not_undo_it(
    config, whole, tmp_path, monkeypatch
):
    workdir, one = tmp_path / "w", data_mesh(jax.devices()[:1])
    compile_ = StepPrograms.compile

    def meanwhile(self, lengths):
        monkeypatch.undo()
        shutil.copytree(whole[0], workdir)  # another process runs to its end
        return compile_(self, lengths)

    monkeypatch.setattr(StepPrograms, "compile", meanwhile)
    with pytest.raises(UserError, match=r"has gone on to step 12 while this one was .* step 0"):
        train_and_evaluate(config, workdir, mesh=one)
    assert saved(workdir)[1]["step"] == 12
    assert read_metrics(workdir) == read_metrics(whole[0])
    assert json.loads((workdir / "result.json").read_text())["step"] == 12
