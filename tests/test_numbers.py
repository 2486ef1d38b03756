"""The benchmark that holds a device's numbers against the CPU's."""

import json

import jax
import numpy as np
import optax
import pytest
from helpers import line_of_bad_input, tiny_resnet

from experiments.benchmarks import numbers, numbers_worker
from flax_resnet.step import create_state, train_step


@pytest.mark.slow
def test_the_arrays_are_those_of_one_evaluation_and_one_step(monkeypatch, rng):
    monkeypatch.setattr("flax_resnet.create", lambda name, dtype: tiny_resnet(dtype=dtype))
    task = {"network": "x", "dtype": "float32", "image_size": 8, "batch_size": 4}
    found = numbers_worker.outputs(task)
    model = tiny_resnet()
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    )
    count = sum(1 for name in found if name.startswith("gradient"))
    assert count == len(jax.tree.leaves(shapes["params"]))
    assert found["logits"].shape == (4, model.num_classes)
    assert found["loss"] == pytest.approx(np.log(model.num_classes), abs=1.5)
    # The gradient, by a step of plain SGD: what it takes off the parameters over the rate.

    rate = 1e-2
    stats = {"mean": np.full(3, 0.5), "std": np.full(3, 0.25)}
    state = create_state(model, optax.sgd(rate), 0, (8, 8, 3), stats)
    source = np.random.default_rng(0)
    batch = {
        "image": source.integers(0, 256, (4, 8, 8, 3), np.uint8),
        "label": source.integers(0, model.num_classes, 4, np.int32),
    }
    after, _ = jax.jit(train_step)(state, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a - b) / rate, state.params, after.params)
    ):
        name = "gradient" + jax.tree_util.keystr(path)
        np.testing.assert_allclose(found[name], leaf, atol=1e-4, rtol=1e-2)


def arrays(rng, **changed):
    found = {"logits": rng.normal(size=(4, 3)), "loss": np.array(2.0)}
    found |= {"gradient['a']": np.ones(3), "gradient['b']['c']": np.full(1, 4.0)}
    return {**found, "batch_stats['m']": np.ones(2), **changed}


def test_differences_are_of_whole_parts(rng):
    reference = arrays(rng)
    same = numbers.differences(reference, reference)
    assert same == dict.fromkeys(numbers.PARTS, 0.0)
    other = {**reference, "gradient['a']": np.array([1.0, 1.0, 4.0]), "loss": np.array(1.5)}
    apart = numbers.differences(other, reference)
    assert apart == {
        "logits": 0.0,
        "loss": 0.25,
        "gradient": pytest.approx(3 / np.sqrt(19)),
        "batch_stats": 0.0,
    }
    with pytest.raises(AssertionError, match="not of the CPU's names and shapes"):
        numbers.differences({**reference, "loss": np.zeros(2)}, reference)


@pytest.mark.parametrize(("value", "status"), [(2.0, 0), (2.001, 1), (np.nan, 1)])
def test_what_is_beyond_its_bound_fails_the_command(value, status, monkeypatch, capfd, rng):
    reference = arrays(rng)

    def computed(settings, network, dtype, device, path):
        changed = {"loss": np.array(value)} if device == "gpu" else {}
        return {**reference, **changed}, device

    monkeypatch.setattr(numbers, "computed", computed)
    words = ["--models", "mini", "--dtypes", "float32"]
    numbers.main([*words, "--no-strict"])
    capfd.readouterr()
    if status:
        with pytest.raises(SystemExit) as stop:
            numbers.main(words)
        assert stop.value.code == status
    else:
        numbers.main(words)
    out, err = capfd.readouterr()
    row = json.loads(out)
    assert (row["network"], row["dtype"], row["within"]) == ("mini", "float32", not status)
    assert err.splitlines()[-1].split()[-1] == ("NO" if status else "yes")


def test_bfloat16_may_be_twice_as_far_as_the_cpus_own(monkeypatch, tmp_path, rng):
    reference = arrays(rng)
    far = {"cpu": 2.2, "gpu": 2.35}  # of a loss of 2: a tenth, and 0.175

    def computed(settings, network, dtype, device, path):
        changed = {} if dtype == "float32" else {"loss": np.array(far[device])}
        return {**reference, **changed}, device

    monkeypatch.setattr(numbers, "computed", computed)
    settings = numbers.Settings(models=("mini",), dtypes=("bfloat16",))
    (row,) = numbers.measure(settings, "mini", tmp_path)
    assert row["bound"] == {**numbers.BOUNDS, "loss": pytest.approx(0.2)}
    assert (row["differences"]["loss"], row["within"]) == (pytest.approx(0.175), True)
    far["gpu"] = 2.41
    (row,) = numbers.measure(settings, "mini", tmp_path)
    assert not row["within"]


@pytest.mark.slow
def test_the_cpu_computes_what_the_cpu_does(capfd):
    numbers.main(["--device", "cpu", "--models", "resnet20", "--batch-size", "4"])
    exact, rounded = map(json.loads, capfd.readouterr().out.splitlines())
    assert set(exact["differences"].values()) == {0.0}
    gradient = rounded["differences"]["gradient"]
    assert 0 < gradient == pytest.approx(rounded["bound"]["gradient"] / 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "resnet21"], "--models 'resnet21'"),
        (["--dtypes", "float16"], "--dtypes 'float16'"),
        (["--batch-size", "1"], "--batch-size=1: expected 2"),
    ],
)
def test_bad_input_is_one_line(words, said, capfd):
    assert said in line_of_bad_input(numbers.main, words, capfd)
