"""The compile benchmark's rows, and what benchmarks share."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from helpers import (
    count_parameters,
    line_of_bad_input,
    max_difference,
    random_batch,
    tiny_resnet,
)
from jax.experimental.compilation_cache import compilation_cache

from experiments.benchmarks import common, compile, cpu_forms, scaling, seeds, transfer
from flax_resnet import cpu, distributed
from flax_resnet.models import PreActBottleneckBlock, cifar_preact

SMALL = compile.Settings(depths=(20,), image_size=4, batch_size=2, compile_repeats=1, steps=2)
TIMES = ("trace_lower_seconds", "compile_seconds", "compile_cpu_seconds", "step_seconds")


@pytest.fixture(scope="module")
def rows():
    with common.no_compilation_cache():
        return {row["mode"]: row for row in compile.measure(20, SMALL)}


@pytest.mark.slow
def test_rows_have_the_networks_parameters_whatever_the_mode(rows):
    assert list(rows) == ["unrolled", "scanned"]
    want = count_parameters(cifar_preact(20, block_cls=PreActBottleneckBlock), (4, 4, 3))
    assert {(row["depth"], row["parameters"]) for row in rows.values()} == {(20, want)}


@pytest.mark.slow
def test_rows_have_times_and_memory(rows):
    for row in rows.values():
        assert all(0 < row[name]["least"] <= row[name]["median"] for name in TIMES)
        assert [row[name]["n"] for name in TIMES] == [1, 1, 1, 2]
        assert row["temp_megabytes"] > 0
        assert row["instructions"] > 1000


@pytest.mark.slow
def test_both_modes_take_the_same_step(rows):
    first = rows["unrolled"]["first_loss"]
    assert 1 < first < 5
    assert rows["scanned"]["first_loss"] == pytest.approx(first, rel=1e-4)


def test_modes_go_by_depth_and_flags():
    assert compile.Settings().modes(164) == ["unrolled", "scanned"]
    assert compile.Settings(remat=True).modes(173) == ["scanned", "scanned+remat"]


def fake_row(depth, mode, seconds):
    times = {name: {"median": seconds, "least": seconds, "most": seconds, "n": 1} for name in TIMES}
    other = {"parameters": 1000, "instructions": 2000, "temp_megabytes": None}
    return {"depth": depth, "mode": mode, **other, **times}


def test_ratios_compare_depths_and_modes():
    lines = compile.ratios(
        [fake_row(20, "unrolled", 6.0), fake_row(20, "scanned", 2.0), fake_row(56, "scanned", 3.0)]
    )
    assert lines == [
        "scanned, depth 56 / depth 20: trace+lower 1.50, compile 1.50, compile CPU 1.50, "
        "instructions 1.00, step 1.50, memory nan",
        "unrolled / scanned, depth 20: trace+lower 3.00, compile 3.00, compile CPU 3.00, "
        "instructions 1.00, step 3.00, memory nan",
    ]


def test_command_prints_a_line_of_json_a_row_and_then_the_table(monkeypatch, capfd):
    def measure(depth, settings):
        return [fake_row(depth, mode, depth / 10) for mode in settings.modes(depth)]

    monkeypatch.setattr(compile, "measure", measure)
    compile.main(["--depths", "20", "164", "1001", "--batch-size", "4"])
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["depth"], row["mode"]) for row in rows] == [
        (20, "unrolled"), (20, "scanned"), (164, "unrolled"), (164, "scanned"), (1001, "scanned"),
    ]  # fmt: skip
    assert rows[-1]["compile_seconds"]["median"] == 100.1
    assert rows[0]["hardware"] == common.hardware()
    assert rows[0]["hardware"]["jax"] == jax.__version__
    table = [line.split() for line in err.splitlines()]
    assert ["1001", "unrolled", "not", "run"] in table
    assert ["20", "scanned", *["2", "(2-2)"] * 4, "2,000", "not", "known", "1,000"] in table


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--depths", "12"], "--depths 12: expected 9n + 2; the nearest is 11"),
        (["--depths", "2"], "--depths 2: expected 9n + 2; the nearest is 11"),
        (["--steps", "0"], "--steps=0: expected 1 or more"),
        (["--image-size", "3"], "input is 3x3"),
    ],
)
def test_bad_input_is_one_line(argv, line, capfd):
    assert line in line_of_bad_input(compile.main, argv, capfd)


def test_module_says_how_it_is_run():
    assert "Command: python -m experiments.benchmarks.compile" in compile.__doc__


def test_nothing_is_cached_within_no_compilation_cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with common.no_compilation_cache():
            jax.jit(lambda x: jnp.sin(x) * 3)(1.0)
        assert list(tmp_path.iterdir()) == []
        jax.jit(lambda x: jnp.sin(x) * 5)(1.0)
        assert list(tmp_path.iterdir()) != []
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_timing_is_the_median_with_its_spread():
    timing = common.Timing.of([0.5, 0.1, 0.25])
    assert timing == common.Timing(median=0.25, least=0.1, most=0.5, n=3)
    assert str(timing) == "0.25 (0.1-0.5)"


def test_timed_waits_for_the_result():
    result, seconds = common.timed(lambda x: x + 1, jnp.ones(3))
    assert result.tolist() == [2, 2, 2]
    assert seconds > 0


def test_table_is_aligned_to_the_right():
    assert common.table(["a", "bb"], [["100", "2"]]) == "  a  bb\n100   2"


@pytest.mark.slow
def test_transfer_measures_three_ways_of_the_same_training(digits_dir, capsys):
    argv = ["--data-dir", digits_dir, "--name", "sklearn_digits", "--pad", "0", "--model",
            "resnet20", "--train-images", "70", "--eval-images", "20", "--epochs", "2"]  # fmt: skip
    transfer.main(argv)
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["way"] for row in rows] == ["cached", "cached again", "ordinary"]
    assert len({row["top1"] for row in rows}) == 1
    assert rows[0]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-4)
    for row in rows:
        assert row["seconds_scaled"] == row["seconds"] > 0
        assert row["ratio"] == pytest.approx(rows[2]["seconds"] / row["seconds"])
    assert err.count("computes the features") == err.count("read the features") == 2
    assert "cached again" in err.splitlines()[-2]


def test_transfer_says_what_it_scaled():
    row = {"way": "ordinary", "epochs": 2, "seconds": 30.0, "seconds_scaled": 410.0,
           "top1": 0.5, "loss": 1.0}  # fmt: skip
    fast = {**row, "way": "cached", "epochs": 40, "seconds": 20.5, "seconds_scaled": 20.5}
    lines = transfer.report([fast, row]).splitlines()
    assert lines[1].split()[:4] == ["cached", "40", "20.5", "20.0"]
    assert "30.0, scaled 410.0" in lines[2]


def test_the_seeds_benchmark_times_both_ways(digits_dir, monkeypatch):
    """What it compares: one step of two networks together, with two steps of one."""
    times = iter([[0.5, 0.25, 1.0], [2.0, 3.0, 1.0]])
    ready = []
    monkeypatch.setattr(seeds, "step_seconds", lambda run: ready.append(run) or next(times))
    settings = seeds.Settings((2,), depth=8, image_size=8, batch_size=16, data_dir=digits_dir)
    row = seeds.measure(settings, 2)
    assert [run.lead for run in ready] == [(), (2,)]
    assert [config.seed for config in ready[1].configs] == [0, 1]
    assert (row["one_step_seconds"]["median"], row["together_step_seconds"]["median"]) == (0.5, 2.0)
    assert row["together_over_in_turn"] == 2.0


@pytest.fixture
def tiny_scaling(monkeypatch):
    """Settings of the scaling benchmark with two devices and a network of one block."""
    monkeypatch.setattr(scaling.models, "create", lambda name, **fields: tiny_resnet(**fields))
    return scaling.Settings((2,), image_size=8, images_per_device=2, steps=1, rounds=2)


def test_the_scaling_benchmark_times_the_step_with_collectives_and_without(tiny_scaling):
    settings = dataclasses.replace(tiny_scaling, sharding="fsdp", bn_group=2)
    row = scaling.measure(settings, 2)
    assert row["collectives"]["all-gather"]["count"] == 4  # three convolutions, one dense layer
    times = row["step_seconds"], row["alone_step_seconds"]
    assert all(each["n"] == 2 and 0 < each["least"] <= each["median"] for each in times)
    assert row["images_per_second"] == pytest.approx(4 / times[0]["median"])
    share = 1 - times[1]["median"] / times[0]["median"]
    assert row["collectives_share"] == pytest.approx(share)
    text = scaling.report([{**row, "number": 1, "images_per_second": 10.0}, row])
    assert text.splitlines()[2].startswith("| 1 | 10 | 100 |")
    assert "virtual and share this machine's" in text.splitlines()[-1]


def test_devices_by_themselves_each_take_the_step_of_one_device(tiny_scaling, rng, meshes):
    """What the time of collectives is told by: the same work, and nothing sent."""
    batch = random_batch(rng, 4)
    two = distributed.data_mesh(jax.devices()[:2])
    ready, _ = scaling.set_up(tiny_scaling, two)
    alone = scaling.compile_alone(ready, distributed.put_batch(two, batch))
    after, _ = alone(ready.state, distributed.put_batch(two, batch))
    single, _ = scaling.set_up(tiny_scaling, meshes[0])
    step = single.compile_step()
    start = jax.device_get(single.state)
    for device in range(2):
        rows = {name: x[2 * device : 2 * device + 2] for name, x in batch.items()}
        state = distributed.put_replicated(meshes[0], start)
        want, _ = step(state, distributed.put_batch(meshes[0], rows))
        got = jax.tree.map(lambda x, i=device: x.addressable_shards[i].data, after)
        assert max_difference(got.params, want.params) < 1e-6
        assert max_difference(got.batch_stats, want.batch_stats) < 1e-6
    assert max_difference(want.params, start.params) > 1e-3


def test_the_scaling_benchmark_takes_powers_of_two_and_all_devices(monkeypatch):
    assert scaling.Settings().numbers() == [1, 2, 4, 8]
    monkeypatch.setattr(jax, "local_device_count", lambda: 6)
    assert scaling.Settings().numbers() == [1, 2, 4, 6]
    assert scaling.Settings((3, 1)).numbers() == [1, 3]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--devices", "9"], "--devices 9: there are 8; on a CPU, JAX_NUM_CPU_DEVICES=9"),
        (["--bn-group", "3"], "bn_group=3 does not divide a batch of 32 images"),
        (["--accum-steps", "3"], "does not divide into --accum-steps 3 equal parts"),
        (["--model", "mini", "--bn-group", "4"], "it is no ResNet"),
        (["--rounds", "0"], "--rounds=0: expected 1 or more"),
    ],
)
def test_bad_input_of_the_scaling_benchmark_is_one_line(argv, line, capfd):
    assert line in line_of_bad_input(scaling.main, argv, capfd)


def test_the_scaling_benchmark_prints_json_and_a_table(monkeypatch, capfd):
    times = {"median": 0.5, "least": 0.5, "most": 0.5, "n": 1}

    def measure(settings, number):
        return {"number": number, "images_per_second": 64.0, "collectives": {}, "virtual": False,
                "step_seconds": times, "alone_step_seconds": times, "collectives_share": 0.0,
                "state_bytes_a_device": 10**6}  # fmt: skip

    monkeypatch.setattr(scaling, "measure", measure)
    scaling.main(["--devices", "1", "2"])
    out, err = capfd.readouterr()
    assert [json.loads(line)["efficiency"] for line in out.splitlines()] == [1.0, 0.5]
    cells = "| 2 | 64 | 50 | 0.5 (0.5-0.5) | 0.5 (0.5-0.5) | 0 | none | 0 | 1 |"
    assert err.splitlines()[-1] == cells
    assert "virtual" not in err


@pytest.mark.slow
def test_the_forms_of_the_cpu_are_timed_beside_xlas_own(monkeypatch, capfd):
    monkeypatch.setattr(cpu_forms, "COPIES", 1)
    cpu_forms.main(["--batch-size", "2", "--image-size", "8", "--rounds", "2", "--no-step"])
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["operation"] for row in rows[::4]] == list(cpu_forms.operations())
    assert [row["input"] for row in rows[:4]] == [
        f"2x{8 >> n}x{8 >> n}x{32 << n}" for n in range(4)
    ]
    for row in rows:
        assert {row[name]["n"] for name in ("ours_seconds", "xla_seconds", "ratio")} == {2}
    assert len(err.splitlines()) == 2 + len(rows)


def test_plain_forms_are_xlas_own_and_then_no_more():
    options = cpu.compiler_options()
    with cpu_forms.plain_forms():
        assert cpu.compiler_options() is None
        assert not cpu.is_backend()
    assert cpu.is_backend()
    assert cpu.compiler_options() == options
    assert options is not None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--image-size", "12"], "--image-size 12: expected a multiple of 8"),
        (["--rounds", "0"], "--rounds=0: expected 1 or more"),
    ],
)
def test_bad_input_of_the_cpu_forms_is_one_line(argv, line, capfd):
    assert line in line_of_bad_input(cpu_forms.main, argv, capfd)
