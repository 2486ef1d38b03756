"""One small run of each benchmark, the figures that follow from its times, and bad input."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import line_of_bad_input, max_difference, random_batch, tiny_resnet

from experiments.benchmarks import (
    airbench,
    common,
    driver,
    eval_step,
    input,
    input_worker,
    numbers,
    scaling,
    seeds,
    steps,
    train_step,
)
from experiments.benchmarks.peers import comparison
from flax_resnet import models
from flax_resnet.data import sources
from flax_resnet.distributed import sharding
from flax_resnet.training.step import create_state
from flax_resnet.training.step import train_step as plain_step

BEST = steps.Peak(100.0, "float32", 64, {"jax": 100.0, "torch": "none"})


def lines(capfd):
    """(rows of JSON, lines for people) that a benchmark printed."""
    out, err = capfd.readouterr()
    return [json.loads(line) for line in out.splitlines()], err.splitlines()


@pytest.fixture
def tiny(monkeypatch):
    """Flags of a network of one block; the machine's peak is not measured."""
    monkeypatch.setattr(steps, "machine_peak", lambda *_: BEST)
    monkeypatch.setattr(models, "create", lambda name, **fields: tiny_resnet(**fields))
    return ["--models", "resnet20", "--image-size", "8", "--batch-size", "2", "--steps", "2",
            "--rounds", "3"]  # fmt: skip


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_steps_row_has_times_work_and_memory(kind, tiny, capfd):
    several = ["--steps", "3", "--steps-per-dispatch", "2"] if kind == "train" else []
    {"train": train_step.main, "eval": eval_step.main}[kind]([*tiny, *several])
    (row,), text = lines(capfd)
    assert (row["benchmark"], row["model"]) == (f"{kind}_step", "resnet20")
    times = row["step_seconds"]
    assert times["n"] == 3
    assert 0 < times["least"] <= times["median"] <= times["most"]
    assert row["images_per_second"] == pytest.approx(2 / times["median"])
    macs = 8 * 8 * 9 * (3 * 8 + 8 * 8 + 8 * 8) + 8 * 10  # three convolutions, the head
    assert row["gflop_a_step"] == pytest.approx({"train": 6, "eval": 2}[kind] * 2 * macs / 1e9)
    assert row["gflops"] == pytest.approx(row["gflop_a_step"] / times["median"])
    assert row["peak_share"] == pytest.approx(row["gflops"] / 100)
    assert row["program_bytes"] > 4 * row["parameters"]
    assert row["hardware"]["jax"] == jax.__version__
    assert text[1] == "peak: 100 GFLOP/s, float32 products of 64 rows (jax 100, torch none)"
    assert text[-1].startswith("| resnet20 | 8 | 2 | ")


def test_an_exports_row_compares_it_with_the_jitted_network(tiny, capfd):
    eval_step.main([*tiny, "--export"])
    (row,), text = lines(capfd)
    assert (row["model"], row["image_size"], row["batch_size"]) == ("resnet20", 8, 2)
    assert row["export_over_jitted"]["n"] == row["export_seconds"]["n"] == 3
    assert row["largest_relative_difference"] < 1e-5
    assert text[-1].startswith("| resnet20 | 8 | 2 | ")


def test_the_seeds_row_compares_both_ways(digits_dir, monkeypatch):
    """One step of two networks together, with two steps of one."""
    times = iter([[0.5, 0.25, 1.0], [2.0, 3.0, 1.0]])
    ready = []
    monkeypatch.setattr(seeds, "step_seconds", lambda run: ready.append(run) or next(times))
    settings = seeds.Settings((2,), depth=8, image_size=8, batch_size=16, data_dir=digits_dir)
    row = seeds.measure(settings, 2)
    assert [run.leading_axes for run in ready] == [(), (2,)]
    assert (row["one_step_seconds"]["median"], row["together_step_seconds"]["median"]) == (0.5, 2.0)
    assert row["together_over_in_turn"] == 2.0


@pytest.fixture
def tiny_scaling(monkeypatch):
    """Settings of the scaling benchmark with two devices and a network of one block."""
    monkeypatch.setattr(scaling.models, "create", lambda name, **fields: tiny_resnet(**fields))
    return scaling.Settings((2,), image_size=8, images_per_device=2, steps=1, rounds=2)


def test_the_scaling_row_has_the_step_with_collectives_and_without(tiny_scaling, monkeypatch):
    settings = dataclasses.replace(tiny_scaling, sharding="fsdp", bn_group=2)
    row = scaling.measure(settings, 2)
    assert row["collectives"]["all-gather"] == 4  # three convolutions, one dense layer
    times = row["step_seconds"], row["alone_step_seconds"]
    assert all(each["n"] == 2 and 0 < each["least"] <= each["median"] for each in times)
    assert row["images_per_second"] == pytest.approx(4 / times[0]["median"])
    share = 1 - times[1]["median"] / times[0]["median"]
    assert row["collectives_share"] == pytest.approx(share)
    monkeypatch.setattr(scaling, "measure", lambda _, n: {**row, "images_per_second": 10.0 + n})
    found = list(scaling.measured(dataclasses.replace(settings, devices=(1, 2))))
    assert [each["efficiency"] for each in found] == [1, pytest.approx(12 / 2 / 11)]
    text = scaling.report(found).splitlines()
    assert text[3].split(" | ")[1:3] == ["12", "55"]
    assert "virtual and share this machine's" in text[-1]


def test_devices_by_themselves_each_take_the_step_of_one_device(tiny_scaling, rng, meshes):
    """What the time of collectives is told by: the same work, and nothing sent."""
    batch = random_batch(rng, 4)
    two = sharding.data_mesh(jax.devices()[:2])
    ready, _ = scaling.set_up(tiny_scaling, two)
    images = sharding.put_batch(two, batch)
    after, _ = scaling.compile_alone(ready, ready.state, images)(ready.state, images)
    single, _ = scaling.set_up(tiny_scaling, meshes[0])
    step = single.programs.compile_step()
    start = jax.device_get(single.state)
    for device in range(2):
        rows = {name: x[2 * device : 2 * device + 2] for name, x in batch.items()}
        state = sharding.put_replicated(meshes[0], start)
        want, _ = step(state, sharding.put_batch(meshes[0], rows))
        got = jax.tree.map(lambda x, i=device: x.addressable_shards[i].data, after)
        assert max_difference(got.params, want.params) < 1e-6
    assert max_difference(want.params, start.params) > 1e-3


# benchmarks.numbers


@pytest.mark.slow
def test_the_numbers_are_those_of_one_evaluation_and_one_step(monkeypatch):
    monkeypatch.setattr("flax_resnet.create", lambda name, dtype: tiny_resnet(dtype=dtype))
    task = {"network": "x", "dtype": "float32", "image_size": 8, "batch_size": 4}
    found, rate = numbers.outputs(task), 1e-2
    stats = {"mean": np.full(3, 0.5), "std": np.full(3, 0.25)}
    state = create_state(tiny_resnet(), optax.sgd(rate), 0, (8, 8, 3), stats)
    batch = random_batch(np.random.default_rng(0), 4)
    after, _ = jax.jit(plain_step)(state, batch)
    # The gradient is what plain SGD takes off the parameters, over the rate.
    steps_taken = jax.tree.map(lambda a, b: (a - b) / rate, state.params, after.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(steps_taken):
        name = "gradient" + jax.tree_util.keystr(path)
        np.testing.assert_allclose(found[name], leaf, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize(("value", "within"), [(2.0, True), (2.001, False), (np.nan, False)])
def test_what_is_beyond_its_bound_fails_the_command(value, within, monkeypatch, capfd):
    arrays = {"logits": np.ones((4, 3)), "loss": np.array(2.0), "batch_stats['m']": np.ones(2)}
    arrays |= {"gradient['a']": np.ones(3), "gradient['b']": np.full(1, 4.0)}

    def computed(settings, network, dtype, device, path):
        return {**arrays, **({"loss": np.array(value)} if device == "gpu" else {})}, device

    monkeypatch.setattr(numbers, "computed", computed)
    words = ["--models", "mini", "--dtypes", "float32"]
    if within:
        numbers.main(words)
    else:
        with pytest.raises(SystemExit, match="1"):
            numbers.main(words)
    (row,), _ = lines(capfd)
    assert row["within"] == within
    apart = numbers.differences({**arrays, "gradient['a']": np.array([1.0, 1.0, 4.0])}, arrays)
    assert apart == {"logits": 0, "loss": 0, "gradient": 3 / np.sqrt(19), "batch_stats": 0}


# benchmarks.input

SMALL = ["--photographs", "4", "--long-side", "64", "--size", "16", "--batch-size", "3",
         "--batches", "2", "--rounds", "2", "--cores", "1"]  # fmt: skip


@pytest.mark.slow
def test_each_way_of_input_has_a_row(capfd):
    input.main(SMALL)
    rows, _ = lines(capfd)
    assert [row["way"] for row in rows] == list(input_worker.WAYS)
    by_way = {row["way"]: row for row in rows}
    assert by_way["ours"]["error"] is None
    assert by_way["ours"]["crops_per_second_per_core"]["n"] == 2
    assert by_way["decoder"]["crops_per_second"] > 0


@pytest.mark.parametrize("crop", ["random", "centre"])
def test_the_ways_of_input_read_the_same_photographs(crop, tmp_path):
    assert input_worker.make_photographs(tmp_path, 8, 64)["count"] == 8
    input_worker.make_records(tmp_path)

    def batches(way):
        task = input.Settings(size=16, batch_size=3, crop=crop).task(way, tmp_path, 1)
        made = input_worker.WAYS[way](task)[1]()
        return [next(made) for _ in range(2)]

    assert batches("decoder")[0].shape == (3, 16, 16, 3)
    (records,) = sources.open_tfds(input_worker.RECORDS, str(tmp_path), ["train"])
    files = sources.open_folder(str(tmp_path), ["train", "test"], 16, 5)[0]
    stored, labels = records.read(range(8))
    assert dict(zip(stored, labels, strict=True)) == dict(zip(*files.read(range(8)), strict=True))


# What they share


def test_timings_are_medians_with_their_spread():
    timing = common.Timing.of([0.5, 0.1, 0.25])
    assert timing == common.Timing(median=0.25, least=0.1, most=0.5, n=3)
    assert str(timing) == "0.25 (0.1-0.5)"
    assert common.timed(lambda x: x + 1, jnp.ones(3))[0].tolist() == [2, 2, 2]
    rows = [{"a": "x", "t": dataclasses.asdict(timing)}, {"a": "y", "error": "died"}]
    text = driver.table({"way": lambda row: row["a"], "s": driver.timing_cell("t")}, rows)
    assert text.splitlines()[2:] == ["| x | 0.25 (0.1-0.5) |", "| y |  |", "y: died"]


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (train_step.main, "--models resnet21", "network 'resnet21' is not known (did you mean"),
        (train_step.main, "--models resnet50 --image-size 8", "input is 8x8, the least"),
        (eval_step.main, "--steps 0", "--steps=0: expected 1 or more"),
        (seeds.main, "--num-seeds 0", "--num-seeds=0: expected 1 or more"),
        (scaling.main, "--devices 9", "--devices 9: there are 8; on a CPU, JAX_NUM_CPU_DEVICES=9"),
        (scaling.main, "--bn-group 3", "bn_group=3 does not divide a batch of 32 images"),
        (scaling.main, "--accum-steps 3", "does not divide into --accum-steps 3 equal parts"),
        (scaling.main, "--model mini --bn-group 4", "it is no ResNet"),
        (numbers.main, "--dtypes float16", "--dtypes 'float16'"),
        (input.main, "--photographs 1", "--photographs=1: expected 2 or more"),
        (comparison.main, "--models resnet30", "--models 'resnet30': expected some of mini"),
        (comparison.main, "--peers tourch", "did you mean 'torch'?"),
        (comparison.main, "--image-size 12", "--image-size 12: expected a multiple of 8"),
        (comparison.main, "--cores 9999", "--cores 9999: there are "),
        (airbench.main, "--target 97", "--target 97: expected one of (93, 94, 95, 96)"),
    ],
)
def test_bad_input_is_one_line(main, words, said, capfd):
    assert said in line_of_bad_input(main, words.split(), capfd)
