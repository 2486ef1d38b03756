"""A classifier: what it takes and what comes out; weights opened by flags for it."""

import contextlib
import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_one_line_error
from PIL import Image
from prediction_helpers import SQUARE, make_weights, paint, probabilities
from safetensors.numpy import load_file, save_file

from flax_resnet import Classifier, models
from flax_resnet.data.config import DataConfig
from flax_resnet.data.decode import Decoder
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError
from flax_resnet.inference import classifier as network
from flax_resnet.inference.classifier import open_network, predict_images
from flax_resnet.weights import open_weights, write_weights
from flax_resnet.xla import backend


def test_flags_take_the_place_of_the_weights_preprocessing(call, tmp_path, photos):
    path = tmp_path / "silent.safetensors"
    make_weights(path, preprocessing=None, class_names=None)
    file = photos / "z.png"
    arguments = ("predict", file, "--weights", path)
    message = "give --size, --mean and --std (the flags are --size, --resize, --interpolation"
    for more in ((), ("--size", 8)):
        assert_one_line_error(call(*arguments, *more), message)
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


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    # As of a run: the larger photographs are decoded at a half or less.
    make_weights(path, preprocessing=dataclasses.replace(SQUARE, decoder=Decoder(3, 8, 0.875)))
    return path


@pytest.fixture(scope="module")
def classifier(weights):
    return Classifier(weights)


@pytest.fixture
def found(weights, photos, rng):
    """What predict_images says of the photographs, one of them large."""
    paint(rng, 90, 120).save(photos / "a.jpg")
    return list(predict_images(open_weights(weights), [photos]))


def values(predictions):
    """All but the paths."""
    return [dataclasses.replace(prediction, path=None) for prediction in predictions]


KINDS = {
    "paths": lambda path: path,
    "texts": str,
    "bytes": lambda path: path.read_bytes(),
    "opened by PIL": Image.open,
    "bytes opened by PIL": lambda path: Image.open(io.BytesIO(path.read_bytes())),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_are_those_of_predict_bit_for_bit(classifier, found, kind):
    with contextlib.ExitStack() as stack:
        images = [KINDS[kind](prediction.path) for prediction in found]
        for image in images if kind == "opened by PIL" else ():
            stack.callback(image.close)
        several = classifier(iter(images))
        alone = [classifier(image) for image in images]
    assert values(several) == values(alone) == values(found)
    paths = [prediction.path if kind in ("paths", "texts") else None for prediction in found]
    assert [p.path for p in several] == [p.path for p in alone] == paths
    assert (alone[0].name, alone[0].probability) == (found[0].names[0], found[0].probabilities[0])


def test_a_folder_and_the_command_line_give_the_same_bits(classifier, found, photos, weights, call):
    assert classifier(photos) == classifier([str(photos)]) == found
    _, out, _ = call("predict", photos, "--weights", weights, "--format", "json")
    shares = [tuple(json.loads(line)["probabilities"]) for line in out.splitlines()]
    assert shares == [prediction.probabilities for prediction in found]


def test_arrays_are_images(classifier, tmp_path, rng):
    pixels = rng.integers(0, 256, (3, 20, 30, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    wanted = values(classifier(tmp_path))
    for several in (pixels, list(pixels), jnp.asarray(pixels), pixels / np.float32(255)):
        assert classifier(several) == wanted
    grey = pixels[0, :, :, 0]
    assert classifier(grey) == classifier(grey[..., None]) == classifier(np.dstack([grey] * 3))
    assert classifier(pixels[:0]) == []


def test_pil_images_that_were_changed_are_not_their_file(classifier, found, tmp_path):
    path, *_ = [prediction.path for prediction in found if prediction.path.suffix == ".jpg"]
    with Image.open(path) as drafted, Image.open(path) as smaller, Image.open(path) as cmyk:
        drafted.draft(None, (50, 50))
        smaller.thumbnail((30, 30))
        for image in (drafted, smaller, cmyk.convert("CMYK")):
            image.convert("RGB").save(tmp_path / "x.png")
            assert values([classifier(tmp_path / "x.png")]) == [classifier(image)]


def test_nothing_is_compiled_after_the_first_call_and_threads_may_share(classifier, found, photos):
    classifier(photos / "a.jpg")
    compiled = network._outputs._cache_size()
    with ThreadPoolExecutor(4) as pool:
        every = list(pool.map(lambda n: classifier([photos / "a.jpg"] * n, top=n), range(1, 9)))
    assert [len(several) for several in every] == list(range(1, 9))
    first = found[0]
    for n, several in enumerate(every, 1):
        probabilities = classifier(photos / "a.jpg", top=10).probabilities[:n]
        assert [one.probabilities for one in several] == [probabilities] * n
        assert several[0].classes[:5] == first.classes[:n]
    assert network._outputs._cache_size() == compiled


def test_an_accelerator_takes_few_batch_sizes(weights, found, photos, monkeypatch):
    monkeypatch.setattr(backend, "is_cpu", lambda: False)
    classifier = Classifier(weights, batch_size=12)
    assert classifier.batch_sizes == [1, 8, 12]
    assert Classifier(weights, batch_size=1).batch_sizes == [1]
    before = network._outputs._cache_size()
    for count in (2, 8, 5, 9, 13, 30):
        several = classifier([photos / "a.jpg"] * count)
        assert {one.classes for one in several} == {found[0].classes}
        assert len(several) == count
        for one in several:
            np.testing.assert_allclose(one.probabilities, found[0].probabilities, rtol=1e-4)
    assert network._outputs._cache_size() <= before + 2  # of 8 and of 12


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no picture", r"unreadable image 1, <bytes> \(it is no image that Pillow reads\)$"),
        ("/nowhere/x.png", "/nowhere/x.png: no such file or folder"),
        (["/nowhere/x.png"], "/nowhere/x.png: no such file or folder"),
        (None, "None is no image: expected a path, the bytes of an image file, a PIL image"),
        ({"image": b""}, "is no image: expected a path"),
        (
            np.full((8, 8, 3), 200.0),
            r"float64 \(8, 8, 3\) is no image: .*floats of 0 to 1",
        ),
        (np.full((8, 8), np.nan, np.float32), "expected .*floats of 0 to 1"),
        (np.zeros((8, 8), np.int64), r"int64 \(8, 8\) is no image: expected a path"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \(3, 8, 8\) is no image"),
        ([[0, 1], [2, 3]], r"int64 \(2,\) is no image"),
        (Image.new("I", (8, 8)), "its mode is I"),
    ],
)
def test_what_is_no_image_is_one_line(classifier, image, message):
    with pytest.raises(UserError, match=message) as error:
        classifier(image)
    assert "\n" not in str(error.value)
