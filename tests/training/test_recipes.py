"""The first config for any images."""

import contextlib
import dataclasses

import numpy as np
import pytest
from helpers import class_folders, drawn, tiny_resnet
from PIL import Image
from safetensors.numpy import load_file
from weights_helpers import keras_h5

from flax_resnet import DataConfig, Preprocessing, UserError, train_and_evaluate, write_weights
from flax_resnet.cli import train
from flax_resnet.errors import Note
from flax_resnet.models import keras_resnet, name_of
from flax_resnet.training import recipes


@pytest.fixture
def photographs(tmp_path):
    """Three classes of five RGB PNGs, of another size in each."""
    for i, name in enumerate("abc"):
        class_folders(tmp_path / "set", [name], 5, (100 + i, 120))
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train", "test"], ("train", "test")),
        (["train", "validation"], ("train", "validation")),
        (["train"], ("train[:80%]", "train[80%:]")),
    ],
)
def test_digits_by_either_name_on_the_splits_that_they_have(monkeypatch, digits_dir, names, splits):
    monkeypatch.setattr(recipes.sources, "split_names", lambda *_: names)
    config, other = (
        recipes.scratch(name, recipes.Given(digits_dir)) for name in ("digits", "sklearn_digits")
    )
    assert config == other
    assert (config.data.train_split, config.data.eval_split) == splits
    digits = recipes.digits()
    assert dataclasses.replace(config, data=digits.data) == digits
    assert not digits.augment.flip  # grey images are often signs


def test_the_size_of_images_chooses_the_network(image_folder, photographs):
    small, large = recipes.scratch(str(image_folder)), recipes.scratch(str(photographs))
    assert (name_of(small.model), small.model.num_classes) == ("resnet20", 2)
    assert (small.data.image_size, small.augment.flip) == (None, True)
    assert (name_of(large.model), large.model.num_classes) == ("resnet18", 3)
    assert (large.data.image_size, large.data.random_resized_crop) == (224, True)


@pytest.mark.parametrize(
    ("images", "shape", "given", "wanted"),
    [  # batch, rate, epochs, warm-up, BatchNorm's momentum, epochs between evaluations
        (1442, (8, 8, 1), {}, (64, 0.1, 30, 0.05, 0.9, 5)),
        (64, (None, None, 3), {}, (16, 0.025, 100, 0.05, 0.9, 8)),
        (160, (8, 8, 3), {}, (32, 0.05, 80, 0.05, 0.9, 7)),
        (255, (96, 96, 3), {}, (32, 0.05, 50, 0.05, 0.9, 5)),
        (9000, (None, None, 3), {}, (64, 0.1, 60, 0.05, 0.9, 1)),
        (3, (8, 8, 3), {}, (16, 0.025, 400, 0.05, 0.9, 32)),
        (64, (None, None, 3), {"num_epochs": 3}, (16, 0.025, 3, 0.25, 0.17, 8)),
        (64, (None, None, 3), {"num_steps": 3}, (16, 0.025, 100, 0.25, 0, 8)),
        (9000, (8, 8, 3), {"batch_size": 128}, (128, 0.2, 30, 0.05, 0.9, 5)),
    ],
)
def test_batch_rate_and_length_follow_the_number_of_images(images, shape, given, wanted):
    config = recipes.from_scratch(images, 2, shape, given=recipes.Given(**given))
    schedule, momentum = config.optimizer.schedule, config.model.bn_momentum
    numbers = config.batch_size, config.optimizer.learning_rate, config.num_epochs
    assert (*numbers, schedule.warmup, momentum, config.eval_every_epochs) == wanted
    assert config.model.num_classes == 2


def test_three_epochs_of_eighty_images_end_at_a_usable_network(tmp_path, mesh, rng):
    for label, name in enumerate("ab"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            pixels[..., label] += 100
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    config = recipes.scratch(str(tmp_path / "set"), recipes.Given(num_epochs=3))
    model = tiny_resnet(num_classes=2, bn_momentum=config.model.bn_momentum)
    config = dataclasses.replace(config, model=model)
    result = train_and_evaluate(config, tmp_path / "run", mesh=mesh, quiet=True)
    assert result["step"] == 12
    assert result["top1"] == 1
    assert result["loss"] < 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "./nowhere: no such folder"),
        ("digts", "unknown data 'digts' .did you mean 'digits'"),
    ],
)
def test_what_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        recipes.scratch(name)


def weights_of(path, module, side, channels, **kwargs):
    """A weight file of a network, with what images of (side, side, channels) go through."""
    shape = (side, side, channels)
    images = np.zeros((1, *shape), np.float32)
    means = (0.5,) * channels
    prepared = Preprocessing(side, None, channels=channels, mean=means, std=means)
    kept = {"preprocessing": prepared, "input_shape": shape}
    write_weights(path, module, drawn(module, images), **kept)
    return str(path)


def test_fine_tuning_takes_the_network_and_the_size_of_weights_in_a_file(photographs, tmp_path):
    own = tiny_resnet(num_classes=10)
    weights = weights_of(tmp_path / "net.safetensors", own, 8, 1)
    config = recipes.finetuned(str(photographs), recipes.Given(weights=weights))
    assert config.model == own.clone(num_classes=3, norm_kind="frozen")
    assert (config.data.image_size, config.data.channels) == (8, 1)
    assert (config.data.random_resized_crop, config.augment.flip) == (False, False)
    assert config.normalization == "weights"
    large = weights_of(tmp_path / "large.safetensors", own, 128, 3)
    config = recipes.finetuned(str(photographs), recipes.Given(weights=large))
    assert (config.data.image_size, config.data.random_resized_crop) == (128, True)
    named = recipes.finetuned(str(photographs), recipes.Given(weights=large, model="resnet18"))
    assert named == recipes.finetuned(str(photographs))
    tag = recipes.finetuned(str(photographs), recipes.Given(weights="tv_v1"))
    assert tag == recipes.finetuned(str(photographs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["net.pth", "cifar.pth", "net.h5", "run"])
def test_fine_tuning_from_any_weights_needs_no_network(photographs, tmp_path, kind):
    """The command as the docs have it, with fewer steps."""
    path = tmp_path / kind
    stem = "cifar" if kind == "cifar.pth" else "imagenet"
    own = tiny_resnet(stem=stem, num_filters=4, shortcut="A")  # as nothing is projected
    short = ["--num-steps", "2", "--batch-size", "8", "--eval-batch-size", "8"]
    if kind == "net.h5":
        own = keras_resnet(50, stage_sizes=(1,), num_filters=4, num_classes=10)
        keras_h5(path, own, drawn(own, np.zeros((1, 32, 32, 3), np.float32)))
    elif kind == "run":
        data = DataConfig(folder=str(photographs), image_size=32)
        config = dataclasses.replace(recipes.scratch(str(photographs)), model=own, data=data,
                                     num_steps=2, batch_size=8, eval_batch_size=8)  # fmt: skip
        train_and_evaluate(config, path, quiet=True)
    else:
        torch = pytest.importorskip("torch")
        write_weights(tmp_path / "w.safetensors", own, drawn(own, np.zeros((1, 32, 32, 3))))
        tensors = load_file(tmp_path / "w.safetensors")
        torch.save({"state_dict": {n: torch.tensor(x) for n, x in tensors.items()}}, path)
    said = {"cifar.pth": "is taken", "run": ""}.get(kind, "the preprocessing is")
    with pytest.warns(Note, match=said) if said else contextlib.nullcontext():
        asked = train.parse("finetune", [str(photographs), "--weights", str(path), *short])
        assert asked.config.model == own.clone(num_classes=3, norm_kind="frozen")
        result = train_and_evaluate(asked.config, tmp_path / "tuned", quiet=True)
    assert result["step"] == 2
    assert np.isfinite(result["loss"])
    sizes = {"net.pth": 224, "net.h5": 224}
    assert asked.config.data.image_size == sizes.get(kind, 32)
    assert asked.config.normalization == ("channel" if kind == "cifar.pth" else "weights")
