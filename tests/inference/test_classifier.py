"""Weights opened by flags, and what their images go through."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_one_line_error
from PIL import Image
from prediction_helpers import SQUARE, make_weights, probabilities
from safetensors.numpy import load_file, save_file

from flax_resnet import models
from flax_resnet.data.config import DataConfig
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError
from flax_resnet.inference.classifier import open_network, predict_images
from flax_resnet.weights import open_weights, write_weights


def test_flags_take_the_place_of_the_weights_preprocessing(call, tmp_path, photos):
    path = tmp_path / "silent.safetensors"
    make_weights(path, preprocessing=None, class_names=None)
    file = photos / "z.png"
    arguments = ("predict", file, "--weights", path)
    message = "give --size, --mean and --std (the flags are --size, --resize, --interpolation"
    assert_one_line_error(call(*arguments), message)
    assert_one_line_error(call(*arguments, "--size", 8), "give --mean and --std too")
    given = ("--size", 8, "--mean", 0.4, 0.5, 0.6, "--std", 0.2, "--format", "json", "--top", 1)
    for more, prepared in {
        (): Preprocessing(8, None, mean=(0.4, 0.5, 0.6), std=(0.2,) * 3),
        ("--resize", 12, "--interpolation", "nearest"):
            Preprocessing(8, 12, "nearest", mean=(0.4, 0.5, 0.6), std=(0.2,) * 3),
    }.items():  # fmt: skip
        code, out, err = call(*arguments, *given, *more)
        assert code == 0, err
        opened = dataclasses.replace(open_weights(path), preprocessing=prepared)
        (p,) = probabilities(opened, [file])
        assert json.loads(out)["probabilities"] == pytest.approx([p.max()], rel=1e-5)
        assert json.loads(out)["names"] == [f"class {p.argmax()}"]
    path = tmp_path / "says.safetensors"
    make_weights(path)
    code, out, err = call("predict", file, "--weights", path, "--resize", 0, "--format", "json")
    assert code == 0, err
    prepared = dataclasses.replace(SQUARE, resize=None)
    (p,) = probabilities(dataclasses.replace(open_weights(path), preprocessing=prepared), [file])
    assert max(json.loads(out)["probabilities"]) == pytest.approx(p.max(), rel=1e-5)


def test_a_decoder_without_a_size_takes_images_of_any(tmp_path, photos):
    """As of runs on images of one size: those are left alone, others are brought to it."""
    path = tmp_path / "run.safetensors"
    prepared = dataclasses.replace(SQUARE, decoder=DataConfig(pad=1).decoder(3), size=10)
    make_weights(path, preprocessing=prepared)
    exact = tmp_path / "exact.png"
    with Image.open(photos / "z.png") as image:
        image.resize((8, 8)).save(exact)
    opened = open_weights(path)
    found = list(predict_images(opened, [exact, photos]))
    assert len(found) == 8
    (p,) = probabilities(opened, [exact])
    np.testing.assert_allclose(found[0].probabilities, np.sort(p)[::-1][:5], rtol=1e-5)


def test_a_named_network_is_checked_against_the_weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    make_weights(path)
    with pytest.raises(UserError, match="the weights are not of resnet18"):
        open_network(path, "resnet18")
    with pytest.raises(UserError, match="is not known"):
        open_network(path, "resnet19")
    module = models.create("resnet20", num_classes=7, scan_blocks=True)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    zeros = jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype), models.variable_shapes(module, images)
    )
    write_weights(tmp_path / "w.safetensors", module, zeros)
    # As someone else would write it: the network can only be inferred.
    save_file(load_file(tmp_path / "w.safetensors"), tmp_path / "bare.safetensors")
    for file in ("w.safetensors", "bare.safetensors"):
        for name in (None, "resnet20"):
            opened = open_network(tmp_path / file, name)
            assert opened.module.num_classes == 7
            assert models.name_of(opened.module) == "resnet20"
            assert "stage1_block2" in opened.variables["params"]
    with pytest.raises(UserError, match="the weights are not this ResNet's"):
        open_network(tmp_path / "bare.safetensors", "resnet32")
