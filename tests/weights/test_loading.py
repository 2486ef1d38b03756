"""``load`` with weights by tag, by path and from a run; what is said where they cannot be had."""

import dataclasses
import hashlib
import re
import shutil

import numpy as np
import pytest
from helpers import assert_trees_equal
from safetensors.numpy import load_file, save_file
from weights_helpers import random_variables

from experiments import digits
from flax_resnet.data.preprocess import KERAS_V1, TORCH
from flax_resnet.errors import UserError
from flax_resnet.models import create, imagenet_resnet, keras_resnet, name_of
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.weights import load, open_weights, published, write_weights
from flax_resnet.weights.loading import is_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLAX_RESNET_OFFLINE", "1")
    directory = tmp_path / "cache" / "weights"
    directory.mkdir(parents=True)
    return directory


def place(cache, monkeypatch, entry, module, source):
    """Puts weights of ``module`` where the cache keeps ``entry``'s: these variables."""
    variables = random_variables(module)
    write_weights(source, module, variables)
    if source.suffix == ".safetensors":
        save_file(load_file(source), source)
    shutil.copy(source, cache / entry.filename)
    sha256 = "sha256:" + hashlib.sha256(source.read_bytes()).hexdigest()
    entry = dataclasses.replace(entry, checksum=sha256)
    monkeypatch.setattr(published, "find", lambda network, tag: entry)
    return variables


def test_a_tag_gives_torchvisions_network(cache, monkeypatch, tmp_path):
    module = create("resnet18")
    entry = published.find("resnet18", "tv_v1")
    want = place(cache, monkeypatch, entry, module, tmp_path / "x.safetensors")
    found, variables = load("resnet18", weights="imagenet", input_shape=(64, 64, 3))
    assert found == module
    assert_trees_equal(variables, want)
    found, variables = load("resnet18", weights="tv_v1", include_top=False, frozen_stages=2)
    assert (found.include_top, found.frozen_stages) == (False, 2)
    assert "head" not in variables["params"]
    with pytest.raises(UserError, match="num_classes=5, the weights' head has 1000"):
        load("resnet18", weights="imagenet", num_classes=5)
    # A published file given by its path is known by its name.
    for opened in (open_weights("tv_v1", "resnet18"), open_weights(cache / entry.filename)):
        assert (opened.preprocessing, opened.class_names[0]) == (TORCH, "tench")
        assert len(opened.class_names) == 1000


def test_kerass_tag_of_resnet50_gives_kerass_network(cache, monkeypatch, tmp_path):
    entry = published.find("resnet50", "keras")
    assert (entry.network, entry.preprocessing) == ("ResNet50", KERAS_V1)
    module = keras_resnet(50)
    want = place(cache, monkeypatch, entry, module, tmp_path / "x.weights.h5")
    found, variables = load("resnet50", weights="keras")
    assert found == module
    assert_trees_equal(variables, want)


def test_without_a_network_one_line_says_which_file_to_put_where(cache):
    for name, tag in (("resnet50", "imagenet"), ("ResNet152", "keras")):
        entry = published.find(name, tag)
        with pytest.raises(UserError) as raised:
            load(name, weights=tag)
        text = str(raised.value)
        assert "\n" not in text
        assert entry.url in text
        assert str(cache / entry.filename) in text


def test_a_path_gives_its_own_number_of_classes(tmp_path):
    module = create("resnet20", num_classes=7)
    want = random_variables(module)
    path = tmp_path / "net.safetensors"
    write_weights(path, module, want)
    for weights in (path, str(path)):
        found, variables = load("resnet20", weights=weights)
        assert found == module
        assert_trees_equal(variables, want)
    scanned, stacked = load("resnet20", weights=path, scan_blocks=True)
    x = np.ones((1, 32, 32, 3), np.float32)
    np.testing.assert_allclose(
        scanned.apply(stacked, x), module.apply(want, x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("written", "asked", "message"),
    [
        ("resnet50_v1", "resnet50", "stride_conv='1x1' there, '3x3' here): ask for resnet50_v1"),
        ("ResNet50", "resnet50", "ask for ResNet50"),
        ("resnet20", "resnet32", "stage_sizes=(3, 3, 3) there, (5, 5, 5) here): ask for resnet20"),
        ("mini", "resnet20", "the weights are a MiniModel's, resnet20 is a ResNet"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, written, asked, message):
    module = create(written)
    path = tmp_path / "net.safetensors"
    write_weights(path, module, random_variables(module))
    with pytest.raises(UserError, match=re.escape(message)):
        load(asked, weights=path)


def test_networks_are_named_by_what_they_compute():
    for name in ("resnet18", "resnet50", "resnet50_v1", "ResNet50", "ResNet152V2", "resnet20",
                 "wrn_28_10", "seresnet50", "plain56", "mini"):  # fmt: skip
        assert name_of(create(name)) == name
    assert name_of(imagenet_resnet(50, num_classes=3, norm_kind="frozen")) == "resnet50"
    assert name_of(imagenet_resnet(50, se_reduction=4)) is None


def test_a_tag_is_told_from_a_path(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet").mkdir()
    for text in ("imagenet", "timm/a1", "tv_v2"):
        assert not is_path(text)
    for text in ("./x", "x.h5", "x.PTH", "~/x", "/x", "net.safetensors"):
        assert is_path(text)
    (tmp_path / "runs").mkdir()
    for folder in ("runs", "./imagenet"):
        assert is_path(folder)
        with pytest.raises(UserError, match="holds no run"):
            open_weights(folder)
    with pytest.raises(UserError, match="tv_v2"):
        open_weights("imagenet", "resnet50")
    with pytest.raises(UserError, match="a tag needs a network"):
        open_weights("imagenet")


def test_a_runs_directory(tmp_path, digits_dir, mesh):
    config = digits.get_config()
    config = dataclasses.replace(
        config,
        model=config.model.clone(stage_sizes=(2,), num_filters=8, scan_blocks=True),
        data=dataclasses.replace(config.data, data_dir=digits_dir),
        num_steps=3,
        ema_decay=0.5,
    )
    train_and_evaluate(config, tmp_path / "run", mesh=mesh)
    opened = open_weights(tmp_path / "run")
    assert opened.module == config.model
    assert opened.class_names == tuple("0123456789")
    assert {"stage1_block1", "stage1_block2"} < opened.variables["params"].keys()
    write_weights(tmp_path / "net.safetensors", opened.module, opened.variables,
                  preprocessing=opened.preprocessing, class_names=opened.class_names)  # fmt: skip
    again = open_weights(tmp_path / "net.safetensors")
    assert again.preprocessing == opened.preprocessing
    assert_trees_equal(again.variables, opened.variables)
    assert opened.preprocessing.shape == (8, 8, 1)
