"""The benchmark of our training step beside other frameworks': networks, processes, arithmetic."""

import pathlib

import jax
import numpy as np
import pytest
from helpers import drawn, shapes_of
from peer_helpers import SIDE, SMALL

from experiments.benchmarks import driver, steps, workers
from experiments.benchmarks.peers import comparison, flax_nets, specs
from flax_resnet import models

BEST = steps.Peak(200.0, "float32", 64, {"jax": 200.0, "torch": "none"})


@pytest.mark.parametrize("name", specs.NETWORKS)
def test_the_plain_flax_networks_are_ours_parameter_by_parameter(name):
    network = specs.NETWORKS[name]
    shape = (network.image_size, network.image_size, 3)
    theirs = shapes_of(flax_nets.build(network.spec), shape)
    assert theirs == shapes_of(models.create(name), shape)
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


def test_the_plain_step_learns(rng):
    images, labels = rng.normal(size=(2, 8, 8, 3)).astype(np.float32), np.array([1, 2])
    net = flax_nets.build(SMALL["basic"][0])
    state = flax_nets.TrainState.create(
        apply_fn=net.apply, tx=steps.optimizer("sgd", 0.1).build(10, 10)[0],
        **drawn(net, images),
    )  # fmt: skip
    losses = []
    for _ in range(3):
        state, loss = flax_nets.train_step(state, images, labels, jax.random.key(0))
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("do", "line"),
    [
        ("fail", "ValueError: two lines"),
        ("miss", "no_such_framework is not installed: pip install -e '.[parity]'"),
        ("kill", "died of signal 9: noise on the standard output"),
        ("hang", "took more than 0.5 s"),
        ("work", None),
    ],
)
def test_a_worker_answers_or_says_why_not_in_one_line(do, line, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[1] / "support"))
    monkeypatch.setenv("XLA_FLAGS", "--ours")

    def start():
        return workers.Worker("peer_echo", {"do": do}, "cpu", 1, 0.5 if do == "hang" else 60.0)

    if line is not None:
        with pytest.raises(workers.WorkerError) as error:
            start()
        assert str(error.value) == line
        return
    worker = start()
    try:
        assert (worker.about["cores"], worker.about["xla_flags"]) == (1, None)
        assert [worker.ask(n, 60)["seconds"] for n in (1, 3)] == [0.5, 1.5]
        with pytest.raises(workers.WorkerError, match=r"^RuntimeError: too many$"):
            worker.ask(4, 60)
    finally:
        worker.close()


def test_peers_are_compared_round_by_round():
    def entrant(name, seconds):
        memory = {"peak_rss_bytes": 2_000_000, "device_peak_bytes": None}
        answers = [{"seconds": s, "cpu_seconds": 2 * s, **memory} for s in seconds]
        return workers.Entrant(name, answers=answers)

    found = [entrant("ours", [1.0, 2.0]), entrant("flax", [2.0, 2.0])]
    found.append(workers.Entrant("torch", error="died of signal 9"))
    task = comparison.Settings(batch_size=4, cores=1).task("mini", "ours")
    rows = comparison.rows(found, task, 8.0, BEST)
    ours, flax, torch = rows
    assert ours["step_seconds"] == {"median": 1.5, "least": 1.0, "most": 2.0, "n": 2}
    assert flax["ratio_to_ours"] == {"median": 1.5, "least": 1.0, "most": 2.0, "n": 2}
    assert (flax["images_per_second"], flax["gflops"], flax["peak_share"]) == (2.0, 4.0, 0.02)
    assert torch["error"] == "died of signal 9"
    assert "step_seconds" not in torch
    lines = driver.table(comparison.COLUMNS, rows, keys=2).splitlines()
    assert lines[3] == "| mini | flax | 2 (2-2) | 4 | 2 | 1.5 (1-2) | 2 | 2 |"
    assert lines[-1] == "mini, torch: died of signal 9"
    found[0].error = "out of memory"
    assert comparison.rows(found, task, 8.0, BEST)[1]["ratio_to_ours"] is None
    with pytest.raises(AssertionError, match="different sizes: ours 10, flax 11 parameters"):
        comparison.check_parameters({"ours": 10, "flax": 11})
