"""The benchmark of our training step beside other frameworks': networks, processes, arithmetic."""

import json
import pathlib

import jax
import numpy as np
import pytest
from helpers import drawn, line_of_bad_input, shapes_of
from peer_helpers import SIDE, SMALL, small_task

from experiments.benchmarks import peak, peer_worker, peers, workers
from experiments.benchmarks.peer_nets import flax_nets, specs
from flax_resnet import cpu, models

TESTS = pathlib.Path(__file__).parent
BEST = peak.Peak(200.0, 50.0, "float32", 64, {"jax": {"gflops": 200.0}, "torch": {"error": "none"}})


@pytest.mark.parametrize("name", specs.NETWORKS)
def test_the_plain_flax_networks_are_ours_parameter_by_parameter(name):
    network = specs.NETWORKS[name]
    shape = (network.image_size, network.image_size, 3)
    ours, theirs = (
        shapes_of(models.create(name), shape),
        shapes_of(flax_nets.build(network.spec), shape),
    )
    assert theirs == ours
    assert models.default_shape(models.create(name)) == shape


@pytest.mark.parametrize("name", SMALL)
def test_the_plain_flax_networks_compute_what_ours_do(name, rng):
    spec, ours = SMALL[name]
    images = rng.normal(size=(4, SIDE, SIDE, 3)).astype(np.float32)
    variables = drawn(ours, images)
    theirs = flax_nets.build(spec)

    @jax.jit
    def both(images):
        keys = {"dropout": jax.random.key(0)}
        return [
            net.apply(variables, images, train=train, mutable=["batch_stats"], rngs=keys)
            for train in (False, True)
            for net in (ours, theirs)
        ]

    (want, _), (got, _), *trained = both(images)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    for a, b in zip(*map(jax.tree.leaves, trained), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_plain_drop_block_drops_about_the_rate():
    kept = flax_nets.drop_block(jax.random.key(0), np.ones((64, 16, 16, 4), np.float32), 0.2, 5)
    assert np.mean(np.asarray(kept) == 0) == pytest.approx(0.18, abs=0.03)  # blocks overlap
    assert np.mean(kept) == pytest.approx(1, abs=1e-3)
    small = flax_nets.drop_block(jax.random.key(0), np.ones((64, 4, 4, 8), np.float32), 0.2, 5)
    blocks = np.asarray(small).reshape(64, 16, 8)
    assert ((blocks == 0).all(1) | (blocks > 0).all(1)).all()  # whole maps


@pytest.mark.slow
def test_our_peer_and_the_plain_one_train_networks_of_the_same_size(monkeypatch):
    built = [peer_worker.build(small_task(monkeypatch, peer)) for peer in ("ours", "flax")]
    assert built[0].about == built[1].about
    assert built[0].about["parameters"] > 1000
    assert all(one.turn(2) > 0 for one in built)


def test_the_plain_step_learns(rng):
    images, labels = rng.normal(size=(2, 8, 8, 3)).astype(np.float32), np.array([1, 2])
    net = flax_nets.build(SMALL["basic"][0])
    state = flax_nets.TrainState.create(
        apply_fn=net.apply, tx=peers.steps.optimizer("sgd", 0.1).build(10, 10)[0],
        **drawn(net, images),
    )  # fmt: skip
    losses = []
    for _ in range(3):
        state, loss = flax_nets.train_step(state, images, labels, jax.random.key(0))
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert int(state.step) == 3


# --- processes --------------------------------------------------------------------------------


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("XLA_FLAGS", "--ours")
    started = []

    def start(do="work", limit=60.0, **extra):
        worker = workers.Worker("peer_echo", {"do": do}, "cpu", 1, limit, extra)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.close()


def test_a_worker_may_have_more_in_its_environment(echo):
    assert echo(XLA_FLAGS="--theirs").about["xla_flags"] == "--theirs"


def test_a_worker_answers_again_and_again(echo):
    worker = echo()
    assert worker.about.pop("build_seconds") >= 0
    assert worker.about == {"cores": 1, "xla_flags": None}
    assert [worker.ask(n, 60)["seconds"] for n in (1, 3)] == [0.5, 1.5]
    answer = worker.ask(1, 60)
    assert answer["peak_rss_bytes"] > 1e6
    assert answer["cpu_seconds"] >= 0
    with pytest.raises(workers.WorkerError, match=r"^RuntimeError: too many$"):
        worker.ask(4, 60)
    with pytest.raises(workers.WorkerError, match=r"^ended with status 0"):
        worker.ask(1, 60)


@pytest.mark.parametrize(
    ("do", "line"),
    [
        ("fail", "ValueError: two lines"),
        ("miss", "no_such_framework is not installed: pip install -e '.[parity]'"),
        ("exit", "ended with status 1: last words"),
        ("kill", "died of signal 9: noise on the standard output"),
    ],
)
def test_a_worker_that_fails_says_why_in_one_line(echo, do, line):
    with pytest.raises(workers.WorkerError) as error:
        echo(do)
    assert str(error.value) == line


def test_a_worker_that_hangs_is_stopped(echo):
    with pytest.raises(workers.WorkerError, match=r"^took more than 0\.5 s$"):
        echo("hang", 0.5)


def test_long_reasons_are_cut():
    assert workers.one_line("a\n b") == "a b"
    assert len(workers.one_line("word " * 100)) == workers.LONGEST


# --- turns and figures ------------------------------------------------------------------------


class Fake:
    """A worker in this process: steps of given seconds."""

    def __init__(self, log, name, seconds, parameters=10):
        self.log, self.name, self.seconds = log, name, iter(seconds)
        self.about = {"parameters": parameters, "versions": {}}

    def ask(self, steps, limit):
        self.log.append(self.name)
        seconds = next(self.seconds)
        if seconds is None:
            raise workers.WorkerError("died of signal 9")
        return {
            "seconds": seconds,
            "cpu_seconds": 2 * seconds,
            "peak_rss_bytes": 2_000_000,
            "device_peak_bytes": None,
        }

    def close(self):
        self.log.append("closed")


@pytest.fixture
def measured(monkeypatch):
    """Rows of peers whose steps take given seconds, and the order in which they were asked."""
    monkeypatch.setattr(peers, "PAUSE", 0)
    monkeypatch.setattr(cpu, "lacks_huge_pages", lambda: True)
    log = []

    def measure(seconds, parameters=None):
        def start(module, task, device, cores, limit, extra):
            name = task["peer"]
            assert extra == ({cpu.TUNABLES: cpu.HUGE_PAGES_ON} if name == "ours" else {})
            if isinstance(seconds[name], str):
                raise workers.WorkerError(seconds[name])
            return Fake(log, name, seconds[name], (parameters or {}).get(name, 10))

        monkeypatch.setattr(workers, "Worker", start)
        names = tuple(name for name in seconds if name != "ours")
        settings = peers.Settings(("mini",), names, rounds=2, batch_size=4, cores=1)
        return peers.measure(settings, "mini", 8.0, BEST), log

    return measure


def test_peers_take_turns_and_are_compared_round_by_round(measured):
    rows, log = measured({"ours": [9, 1.0, 2.0], "flax": [9, 2.0, 2.0], "torch": [9, 3.0, None]})
    assert log == ["ours", "flax", "torch"] * 3 + ["closed"] * 3
    ours, flax, torch = rows
    assert ours["step_seconds"] == {"median": 1.5, "least": 1.0, "most": 2.0, "n": 2}
    assert ours["ratio_to_ours"] == {"median": 1.0, "least": 1.0, "most": 1.0, "n": 2}
    assert flax["ratio_to_ours"] == {"median": 1.5, "least": 1.0, "most": 2.0, "n": 2}
    assert (flax["images_per_second"], flax["gflops"], flax["peak_share"]) == (2.0, 4.0, 0.02)
    assert flax["peak_rss_bytes"] == 2_000_000
    assert torch["error"] == "died of signal 9"
    assert "step_seconds" not in torch
    lines = peers.report(rows).splitlines()
    assert lines[2].split() == ["mini", "flax", "2", "(2-2)", "4", "2", "1.5", "(1-2)", "2", "2"]
    assert lines[3].split() == ["mini", "torch", "not", "run"]
    assert lines[4] == "mini, torch: died of signal 9"


def test_without_ours_the_others_have_times_and_no_ratio(measured):
    rows, _ = measured({"ours": "out of memory", "flax": [9, 2.0, 2.0]})
    assert rows[0]["error"] == "out of memory"
    assert rows[1]["ratio_to_ours"] is None
    assert rows[1]["step_seconds"]["median"] == 2.0
    assert len(peers.report(rows).splitlines()) == 4


def test_networks_of_different_sizes_are_an_error(measured):
    with pytest.raises(AssertionError, match="different sizes: ours 10, flax 11 parameters"):
        measured({"ours": [1] * 3, "flax": [1] * 3}, {"flax": 11})


def test_the_command_prints_a_line_of_json_for_each_network_and_peer(measured, monkeypatch, capfd):
    monkeypatch.setattr(peak, "measured", lambda *_: BEST)
    measured({"ours": [1.0] * 99, "flax": [2.0] * 99})
    argv = ["--models", "resnet20", "mini", "--peers", "flax", "--rounds", "1", "--batch-size", "2"]
    peers.main([*argv, "--cores", "1"])
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["network"], row["peer"]) for row in rows] == [
        ("resnet20", "ours"), ("resnet20", "flax"), ("mini", "ours"), ("mini", "flax"),
    ]  # fmt: skip
    for row in rows:
        assert (row["benchmark"], row["batch_size"], row["dtype"]) == ("peers", 2, "float32")
        assert (row["cores"], row["settings"]["steps"]) == (1, 3)
        assert row["peak"]["gflops"] == 200
        assert row["hardware"].keys() == {"processor", "cores", "jax", "glibc_tunables"}
    assert rows[1]["ratio_to_ours"]["median"] == 2
    assert rows[0]["gflop_a_step"] == pytest.approx(6 * 2 * 0.0409, rel=0.02)  # 41 M multiply-adds
    assert "peak: 200 GFLOP/s" in err
    assert "torch none" in err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--models", "resnet30"], "--models 'resnet30': expected some of mini, resnet20"),
        (["--peers", "tourch"], "did you mean 'torch'?"),
        (["--models"], "--models: expected one or more"),
        (["--rounds", "0"], "--rounds=0: expected 1 or more"),
        (["--limit", "0"], "--limit=0.0: expected more than 0"),
        (["--image-size", "12"], "--image-size 12: expected a multiple of 8"),
        (["--cores", "9999"], "--cores 9999: there are "),
        (["--image-size", "8", "--models", "resnet50"], "input is 8x8"),
    ],
)
def test_bad_input_is_one_line(argv, line, capfd):
    assert line in line_of_bad_input(peers.main, argv, capfd)


def test_settings_follow_the_device_and_the_network():
    settings = peers.Settings()
    assert settings.task("resnet50", "ours").image_size == 224
    assert [settings.task(name, "torch").batch_size for name in specs.NETWORKS] == [128, 128, 8, 32]
    assert (settings.computed, peers.Settings(device="gpu").computed) == ("float32", "bfloat16")
    found = workers.environment({"PYTHONPATH": "x", "XLA_FLAGS": "y"}, "gpu", 3)
    assert (found["JAX_PLATFORMS"], found["OMP_NUM_THREADS"]) == ("cuda", "3")
    assert found["PYTHONPATH"].endswith(":x")
    assert "XLA_FLAGS" not in found


# --- the peak ---------------------------------------------------------------------------------


def test_the_peak_is_the_better_of_the_two(monkeypatch):
    figures = {"jax": (100.0, 9.0), "torch": (120.0, 8.0)}

    def start(module, task, device, cores, limit):
        assert module == "experiments.benchmarks.peak"
        worker = Fake([], "", [])
        worker.about = dict(
            zip(("gflops", "gb_per_second"), figures[task["framework"]], strict=True)
        )
        return worker

    monkeypatch.setattr(workers, "Worker", start)
    best = peak.measured("cpu", "float32", 2)
    assert (best.gflops, best.gb_per_second, best.size) == (120, 9, 4096)
    assert best.share(30) == 0.25
    assert best.by["jax"]["gflops"] == 100


def test_a_peak_that_cannot_be_measured_is_one_line(monkeypatch, capfd):
    def start(module, task, device, cores, limit):
        raise workers.WorkerError("no such device")

    monkeypatch.setattr(workers, "Worker", start)
    with pytest.raises(SystemExit):
        peers.main(["--models", "mini", "--device", "gpu"])
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == (
        "error: the machine's peak cannot be measured in bfloat16 on the gpu: "
        "jax: no such device; torch: no such device"
    )


def test_jax_multiplies_and_moves():
    multiply, move = peak.jax_calls({"size": 8, "dtype": "float32"})
    assert multiply().shape == (8, 8)
    assert peak.least_seconds(move, 2) > 0
