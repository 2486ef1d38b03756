"""The benchmark that runs the published CIFAR-10 speed run; without a GPU, on a stand-in for it."""

import json
import pathlib
import pickle
import sys
import types

import numpy as np
import pytest
from helpers import line_of_bad_input

from experiments.benchmarks import airbench


class Rows(list):
    """So many rows."""

    class_names = ("a", "b")


@pytest.fixture
def published(monkeypatch):
    """Stand-ins for torch and airbench; what they were asked for."""
    asked = {"trained": 0, "loaded": []}

    def load(path, train, batch_size, **augmentation):
        name = f"{path}/{'train' if train else 'test'}.pt"
        held = pickle.loads(pathlib.Path(name).read_bytes())
        asked["loaded"].append((name, batch_size, augmentation, held))
        return name

    def train(train_loader, verbose):
        assert (train_loader, verbose) == ("cifar10/train.pt", False)
        assert utils.CifarLoader("cifar10", train=False) == "cifar10/test.pt"  # opened before
        asked["trained"] += 1
        return asked["trained"]

    def evaluate(net, loader, tta_level):
        assert (loader, tta_level) == ("cifar10/test.pt", 2)
        return 0.9 + net / 100

    def save(tensors, path):
        path.write_bytes(pickle.dumps(tensors))

    gpu = types.SimpleNamespace(
        is_available=lambda: asked.get("gpu", True),
        synchronize=lambda: None,
        get_device_name=lambda: "a GPU",
    )
    torch = types.SimpleNamespace(
        cuda=gpu, save=save, from_numpy=np.array, __version__="0",
        device=type("device", (), {}),  # the command line's parser asks for it
    )  # fmt: skip
    utils = types.SimpleNamespace()
    hyp = {"opt": {"batch_size": 7}, "aug": {"flip": True}}
    for name, module in {
        "torch": torch,
        "airbench": types.SimpleNamespace(CifarLoader=load, evaluate=evaluate),
        "airbench.lib_airbench95": types.SimpleNamespace(hyp=hyp, train95=train),
        "airbench.utils": utils,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


@pytest.fixture
def data(monkeypatch):
    """CIFAR-10 as the library opens it: five training images and three of the test set."""

    def chunks(source, decoder, rows, chunk):
        assert (decoder.channels, list(rows)) == (3, list(range(len(source))))
        for part in (rows[:2], rows[2:]):
            yield np.full((len(part), 32, 32, 3), part[0], np.uint8), part.astype(np.int32) % 2

    sets = {"train": Rows(range(5)), "test": Rows(range(3))}
    monkeypatch.setattr(airbench, "open_tfds", lambda name, place, splits: map(sets.get, splits))
    monkeypatch.setattr(airbench, "decode_chunks", chunks)


def test_each_run_is_a_whole_training_but_the_first(published, data, capfd):
    airbench.main(["--target", "95", "--runs", "3"])
    row = json.loads(capfd.readouterr().out)
    assert published["trained"] == 4
    assert row["top1"] == {"mean": pytest.approx(0.93), "sd": pytest.approx(0.01), "n": 3}
    assert (row["benchmark"], row["seconds"]["n"]) == ("airbench", 3)
    assert (row["target"], row["device_kind"]) == (95, "a GPU")
    (name, size, _, test), *trains = published["loaded"]
    assert (name, size) == ("cifar10/test.pt", 2000)
    assert [x[:2] for x in trains] == [("cifar10/train.pt", 7)] * 4
    assert trains[0][2] == {"aug": {"flip": True}, "altflip": True}
    assert test["images"].shape == (3, 32, 32, 3)
    assert test["classes"] == ["a", "b"]
    assert trains[0][3]["images"][:, 0, 0, 0].tolist() == [0, 0, 2, 2, 2]
    assert trains[0][3]["labels"].tolist() == [0, 1, 0, 1, 0]
    assert trains[0][3]["labels"].dtype == np.int64


def test_what_is_missing_is_one_line(published, monkeypatch, capfd):
    published["gpu"] = False
    assert "there is no GPU that torch knows" in line_of_bad_input(airbench.main, [], capfd)
    monkeypatch.setitem(sys.modules, "airbench", None)  # as if there were none
    said = line_of_bad_input(airbench.main, [], capfd)
    assert "airbench is not installed: pip install airbench torch torchvision" in said
