"""``flax-resnet train`` and ``finetune``: what they say first, and the same command again."""

import json
import shlex
import sys

import jax
import pytest
from helpers import class_folders, drawn, tiny_resnet

from flax_resnet import recipes
from flax_resnet.cli import train
from flax_resnet.data.preprocess import TORCH
from flax_resnet.errors import UserError
from flax_resnet.records.run_dir import read_config
from flax_resnet.training import initial_state
from flax_resnet.weights.pretrained import Pretrained

TINY = ("--model.stage-sizes", "1", "--model.num-filters", "8", "--num-steps", "2",
        "--eval-batch-size", "8")  # fmt: skip


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Two classes of photographs, 12 and 10, in a folder with a space in its name."""
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "my photos", ["cat"], 12, (8, 8))
    return class_folders(tmp_path / "my photos", ["dog"], 10, (8, 8))


@pytest.mark.slow
def test_of_few_images_the_first_line_names_finetune_which_works_as_printed(call, few, monkeypatch):
    code, out, err = call("train", "my photos", *TINY)
    assert code == 0, err
    line = out.splitlines()[0]
    assert line.startswith("18 training images in 2 classes, fewer than 100 a class")
    command = shlex.split(line.rpartition(": ")[2])
    assert command == ["flax-resnet", "finetune", "my photos"]

    published = tiny_resnet(num_classes=1000, num_filters=4, norm_kind="frozen")
    variables = drawn(published, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32"))
    opened = Pretrained(published, variables, preprocessing=TORCH)
    monkeypatch.setattr(recipes, "imagenet_resnet", lambda _, **fields: published.clone(**fields))
    monkeypatch.setattr(recipes, "LARGE_SIZE", 8)
    monkeypatch.setattr(initial_state, "open_for", lambda model, weights: opened)
    code, out, err = call(*command[1:])
    assert code == 0, err
    assert "starts from imagenet, its head afresh" in out
    assert "100 steps" in out


def test_of_uneven_classes_what_guessing_scores_is_said(call, few):
    said = "10 training images of 'cat', 8 of 'dog'; always guessing 'cat' would score 50.00 %"
    assert said in call("train", few, *TINY)[1]
    class_folders(few.parent / "even", "ab", 10, (8, 8))
    assert "guessing" not in call("train", few.parent / "even", *TINY)[1]


def test_the_same_command_goes_on_with_the_config_that_it_began_with(call, few, monkeypatch):
    argv = ["train", "my photos", *TINY]
    monkeypatch.setattr(sys, "argv", ["flax-resnet", *argv])
    assert call(*argv)[0] == 0
    path = few.parent / "runs" / "my photos" / "config.json"
    record = json.loads(path.read_text())
    record["config"]["batch_size"] = 64  # what an earlier version chose
    path.write_text(json.dumps(record))
    chosen = train.parse("train", argv[1:])
    assert chosen.config == read_config(path.parent)
    assert chosen.config.batch_size == 64
    assert train.parse("train", [*argv[1:], "--seed", "1"]).config.batch_size == 16


@pytest.mark.parametrize(
    ("command", "wanted"), [("train", (30, None, None)), ("finetune", (10, 224, "imagenet"))]
)
def test_help_shows_the_defaults_of_the_command(command, wanted, monkeypatch):
    shown = []
    monkeypatch.setattr(train.flags, "parse", lambda config, *others: shown.append(config))
    with pytest.raises(UserError):
        train.parse(command, ["--help"])
    assert [(c.num_epochs, c.data.image_size, c.weights) for c in shown] == [wanted]
