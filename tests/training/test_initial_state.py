"""Starting from weights: cached features against the ordinary way, what stays frozen, BatchNorm."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import QUICK, assert_trees_equal, max_difference, noisy, random_batch
from run_helpers import saved

from experiments import mnist_transfer
from flax_resnet.checkpoints.checkpoints import CheckpointConfig
from flax_resnet.data.augment import Augment
from flax_resnet.data.batches import Data
from flax_resnet.data.config import DataConfig
from flax_resnet.data.preprocess import KERAS_V1
from flax_resnet.distributed.preemption import Preempted
from flax_resnet.errors import UserError
from flax_resnet.models import (
    BottleneckBlock,
    MiniModel,
    WeightsError,
    create,
    initialize,
    keras_resnet,
    variable_shapes,
)
from flax_resnet.optim.optimizers import SGD, Adam
from flax_resnet.records.provenance import versions
from flax_resnet.training import features as features_module
from flax_resnet.training.initial_state import measure_norms, start_from
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.training.step import create_state, train_step
from flax_resnet.weights import write_weights

SMALL = {"stage_sizes": (1, 1), "num_filters": 8, "stem": "cifar"}
IMAGES = jnp.zeros((1, 8, 8, 3))
HALF = {"mean": np.full(3, 0.5), "std": np.ones(3)}
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a small network of Keras's kind, of 7 classes: (path, its variables)."""
    module = keras_resnet(50, num_classes=7, **SMALL)
    variables = noisy(module, IMAGES)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    write_weights(path, module, variables, preprocessing=KERAS_V1)
    return str(path), variables


@pytest.fixture
def config(weights, digits_dir):
    """mnist_transfer in small, on the digits."""
    config = mnist_transfer.get_config()
    return dataclasses.replace(
        config,
        model=config.model.clone(**SMALL, frozen_stages=2, hidden_units=(16,)),
        weights=weights[0],
        data=DataConfig(data_dir=digits_dir, channels=3, pad=1, train_split="train[:320]"),
        num_epochs=2,
        log_every_steps=4,
        checkpoint=CheckpointConfig(),
    )


def test_cached_features_train_the_same_head(config, weights, tmp_path, mesh, capsys):
    config = dataclasses.replace(config, ema_decay=0.9)
    cached = train_and_evaluate(config, tmp_path / "cached", mesh=mesh)
    ordinary = dataclasses.replace(config, cache_features=False)
    result = train_and_evaluate(ordinary, tmp_path / "ordinary", mesh=mesh)
    assert cached["top1"] == result["top1"]
    assert cached["loss"] == pytest.approx(result["loss"], rel=1e-5)
    (ours, _), (theirs, _) = saved(tmp_path / "cached"), saved(tmp_path / "ordinary")
    assert max_difference(ours["params"], theirs["params"]) < 1e-5
    assert max_difference(ours["ema"], theirs["ema"]) < 1e-5
    assert max_difference(ours["ema"]["params"], ours["params"]) > 1e-5
    # The head has moved, and of the rest not a bit: neither weights nor statistics.
    given = weights[1]
    for state in (ours, theirs):
        trunk = {k: v for k, v in state["params"].items() if k not in ("head", "hidden1")}
        assert_trees_equal(trunk, {k: v for k, v in given["params"].items() if k != "head"})
        assert_trees_equal(state["batch_stats"], given["batch_stats"])
        assert_trees_equal(state["ema"]["batch_stats"], given["batch_stats"])
        assert_trees_equal(state["ema"]["params"]["stem_conv"], given["params"]["stem_conv"])
    start = create_state(config.model, *config.optimizer.build(1, 1)[:1], config.seed,
                         (10, 10, 3), {"mean": jnp.zeros(3), "std": jnp.ones(3)})  # fmt: skip
    assert max_difference(ours["params"]["head"], start.params["head"]) > 1e-3
    assert "its head afresh" in capsys.readouterr().out


def features(directory):
    return sorted((directory / "features").glob("*.npz"))


class Mine(BottleneckBlock):
    """A block of one's own."""

    factor: ClassVar[float] = 1.0

    def __call__(self, *args, **kwargs):
        return self.factor * super().__call__(*args, **kwargs)


@pytest.mark.slow
def test_features_are_computed_once_and_never_stale(
    config, tmp_path, mesh, cache, capsys, monkeypatch
):
    train_and_evaluate(config, tmp_path / "a", mesh=mesh)
    assert capsys.readouterr().out.count("computes the features") == 2
    first = features(cache)
    train_and_evaluate(dataclasses.replace(config, seed=1), tmp_path / "b", mesh=mesh)
    assert capsys.readouterr().out.count("read the features") == 2
    assert features(cache) == first
    # Other images, other preprocessing, other weights: other files.
    data = dataclasses.replace(config.data, pad=2)
    split = dataclasses.replace(config.data, eval_split="test[:100]")
    other = {"frozen_stages": 2, "bn_epsilon": 2e-5}
    mine = config.model.clone(block_cls=Mine)
    for i, (changes, computed) in enumerate([
        ({"data": data}, 2), ({"data": split}, 1), ({"normalization": "imagenet"}, 2),
        ({"weights": None, "normalization": "none"}, 2),
        ({"model": config.model.clone(**other), "weights": None, "normalization": "none"}, 2),
        ({"model": mine, "weights": None, "normalization": "none"}, 2),
    ]):  # fmt: skip
        changed = dataclasses.replace(config, num_epochs=0.1, **changes)
        train_and_evaluate(changed, tmp_path / f"c{i}", mesh=mesh)
        assert capsys.readouterr().out.count("computes the features") == computed
    assert len(features(cache)) == 2 + 11
    # The last network again, its block's code changed; the first one with another decoder.
    monkeypatch.setattr(Mine, "factor", 2.0)
    train_and_evaluate(changed, tmp_path / "block", mesh=mesh)
    assert capsys.readouterr().out.count("computes the features") == 2
    monkeypatch.setattr(
        features_module, "versions", lambda names: {**versions(names), "simplejpeg": "9"}
    )
    monkeypatch.setenv("FLAX_RESNET_CACHE", "/proc/flax_resnet")
    train_and_evaluate(config, tmp_path / "decoder", mesh=mesh)
    said = capsys.readouterr().out
    assert said.count("computes the features") == said.count("the features are not kept") == 2


@pytest.mark.slow
def test_a_damaged_cache_is_computed_again(config, tmp_path, mesh, cache):
    config = dataclasses.replace(config, num_epochs=0.2)
    whole = train_and_evaluate(config, tmp_path / "a", mesh=mesh)
    flipped, cut = features(cache)
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:999])
    assert train_and_evaluate(config, tmp_path / "b", mesh=mesh)["loss"] == whole["loss"]


@pytest.mark.slow
def test_a_streamed_set_and_a_resumed_run_give_the_same(config, tmp_path, mesh):
    whole = train_and_evaluate(config, tmp_path / "whole", mesh=mesh)
    data = dataclasses.replace(config.data, resident_mb=0, num_workers=0)
    streamed = dataclasses.replace(config, data=data)
    assert train_and_evaluate(streamed, tmp_path / "s", mesh=mesh)["loss"] == whole["loss"]

    # Stopped in the first epoch, and gone on with the ordinary way.
    asked = iter(range(1, 100))
    with pytest.raises(Preempted):
        train_and_evaluate(config, tmp_path / "broken", mesh=mesh, stop=lambda: next(asked) >= 2)
    assert saved(tmp_path / "broken")[1]["step"] == 2
    other_way = dataclasses.replace(config, cache_features=False)
    result = train_and_evaluate(other_way, tmp_path / "broken", mesh=mesh)
    assert result["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_head_that_fits_is_kept_and_another_starts_as_a_fresh_one():
    images = jnp.zeros((1, 8, 8, 3))
    theirs = create("resnet20", num_classes=7, **{**SMALL, "stage_sizes": (2,)})
    given = noisy(theirs, images)
    key = jax.random.key(3)
    for model in (theirs, theirs.clone(scan_blocks=True)):
        variables, fresh = start_from(model, given, key, images)
        assert not fresh
        assert jax.tree.all(jax.tree.map(lambda x, s: x.shape == s.shape, variables,
                                         dict(variable_shapes(model, images))))  # fmt: skip
    for fields in ({"hidden_units": (4,)}, {"num_classes": 3, "scan_blocks": True}):
        model = theirs.clone(**fields)
        variables, fresh = start_from(model, given, key, images)
        assert fresh
        want = initialize(model, key, images)["params"]
        for name in [n for n in want if n == "head" or n.startswith("hidden")]:
            assert_trees_equal(variables["params"][name], want[name])
    with pytest.raises(WeightsError, match="of another shape"):
        start_from(theirs.clone(num_filters=4), given, key, images)
    mini = MiniModel(num_classes=4, stage_sizes=(1, 1, 1))
    given = noisy(mini, images)
    variables, fresh = start_from(mini.clone(num_classes=9), given, key, images)
    assert fresh
    assert variables["params"]["head"]["kernel"].shape[1] == 9
    assert_trees_equal(variables["batch_stats"], given["batch_stats"])


# --- BatchNorm --------------------------------------------------------------------------------


def state_of(model, variables, tx=None):
    tx = tx or SGD().build(1, 1)[0]
    start = lambda key, images: jax.tree.map(jnp.asarray, variables)  # noqa: E731
    return create_state(model, tx, 0, (8, 8, 3), HALF, init=start)


def one_step(model, tx, rng, variables):
    return jax.jit(train_step)(state_of(model, variables, tx), random_batch(rng))[0]


@pytest.mark.parametrize(
    ("fields", "stats_move", "kernels_move"),
    [
        ({}, {"stem", "stage1", "stage2"}, {"stem", "stage1", "stage2"}),
        ({"norm_kind": "frozen"}, set(), {"stem", "stage1", "stage2"}),
        ({"frozen_stages": 1}, {"stage2"}, {"stage2"}),
        ({"frozen_stages": 2}, set(), set()),
        ({"frozen_stages": 0, "norm_kind": "frozen"}, set(), {"stage1", "stage2"}),
    ],
)
def test_what_is_frozen_does_not_move_by_a_bit(rng, fields, stats_move, kernels_move):
    model = create("resnet20", **SMALL, num_classes=10, **fields)
    given = noisy(model, IMAGES)
    state = one_step(model, SGD(weight_decay=0.1).build(10, 1)[0], rng, given)

    def moved(new, old):
        new, old = flatten_dict(new), flatten_dict(old)
        return {p[0].split("_")[0] for p in old if not np.array_equal(new[p], old[p])}

    assert moved(state.batch_stats, given["batch_stats"]) == stats_move
    assert moved(state.params, given["params"]) == {"head"} | kernels_move


def measured(model, given, mesh, size, **data):
    """(BatchNorm's statistics as they are measured, the training split)."""
    opened = Data(DataConfig(channels=3, **data), mesh, 10)
    return measure_norms(state_of(model, given), model, opened, size), opened


def test_norms_are_measured_on_the_whole_training_split(digits_dir, mesh):
    """Whatever is frozen, and in whole batches though training's are in groups."""
    model = create("resnet20", **SMALL, frozen_stages=2, bn_group=7)
    given, size = noisy(model, IMAGES), 103  # 14 whole batches of the 1,442 images, which are 1,442
    found, data = measured(model, given, mesh, size, data_dir=digits_dir)
    images = np.concatenate([np.asarray(b["image"]) for b in data.in_order("train", size)])
    whole = np.float32(images[: len(images) // size * size] / 255 - 0.5)
    # The first norm sees the stem's output whatever the batches are: its exact mean and variance.
    kernel = given["params"]["stem_conv"]["kernel"]
    out = jax.lax.conv_general_dilated(
        whole, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(found["stem_norm"]["mean"], out.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["stem_norm"]["var"], out.var((0, 1, 2)), rtol=1e-3)
    assert max_difference(found, given["batch_stats"]) > 0.1


def test_variances_far_below_their_means_are_measured_on_several_devices(digits_dir, meshes):
    """As sums of squares in float32 they would be lost, or negative."""
    model = create("resnet20", **SMALL)
    given = noisy(model, IMAGES)
    given["params"]["stem_norm"] = {"bias": np.full(8, 100.0, np.float32),
                                    "scale": np.full(8, 1e-4, np.float32)}  # fmt: skip
    few = {"data_dir": digits_dir, "train_split": "train[:25]"}
    norms = flatten_dict(measured(model, given, meshes[1], 512, **few)[0])
    assert all(np.isfinite(x).all() for x in norms.values())
    assert min(x.min() for path, x in norms.items() if path[-1] == "var") >= 0
    with pytest.raises(UserError, match="5 training images on 8 devices"):
        measured(model, given, meshes[1], 512, data_dir=digits_dir, train_split="train[:5]")


@pytest.mark.slow
def test_a_run_measures_norms_before_its_first_step(config, weights, tmp_path, mesh):
    config = dataclasses.replace(
        config, cache_features=False, measure_norms=True, num_steps=1, ema_decay=0.9
    )
    train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    state, _ = saved(tmp_path / "w")
    assert max_difference(state["batch_stats"], weights[1]["batch_stats"]) > 0.1
    assert_trees_equal(state["batch_stats"], state["ema"]["batch_stats"])


# --- what cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.frozen_stages": 1}, "cache_features with model.frozen_stages=1"),
        ({"model": MiniModel(num_classes=10)}, "only a ResNet frozen up to its head"),
        ({"augment": Augment(flip=True)}, "cache_features with augmentation"),
        ({"optimizer": Adam(unfreeze=(0.5,))}, "set --model.norm-kind frozen"),
        ({"weights": None}, "normalization='weights' with weights=None"),
        ({"weights": "imagenet"}, "tags are for networks that have a name"),
        ({"weights": "/nowhere.h5"}, "/nowhere.h5"),
        ({"measure_norms": True, "model.norm_kind": "none"}, "it is for ResNets with BatchNorm"),
        ({"model": create("resnet20", **SMALL, frozen_stages=2)}, "the weights are not of"),
    ],
)
def test_bad_combinations_are_one_line_and_nothing_is_written(
    config, tmp_path, mesh, changes, message
):
    changes = dict(changes)
    inner = {k.removeprefix("model."): changes.pop(k) for k in list(changes) if "." in k}
    if inner:
        changes["model"] = config.model.clone(**inner)
    config = dataclasses.replace(config, **changes)
    with pytest.raises(UserError, match=message) as caught:
        train_and_evaluate(config, tmp_path / "w", mesh=mesh)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_no_other_framework_is_imported(weights, digits_dir, tmp_path, clean_environment):
    """Stand-ins that leave a mark when anything imports them."""
    site, marker = tmp_path / "site", tmp_path / "imported"
    for name in ("tensorflow", "keras"):  # tensorboardX imports torch where it is
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text(
            f"open({str(marker)!r}, 'a').write({name!r})\nraise ImportError({name!r})\n"
        )
    environment = clean_environment | QUICK | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "experiments.mnist_transfer", "--weights", weights[0],
         "--data.name", "sklearn_digits", "--data.data-dir", digits_dir, "--num-steps", "3",
         "--model.stage-sizes", "1", "1", "--model.num-filters", "8", "--model.stem", "cifar",
         "--model.frozen-stages", "2", "--workdir", str(tmp_path / "w")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "w" / "result.json").read_text())["step"] == 3
    assert not marker.exists(), marker.read_text()
