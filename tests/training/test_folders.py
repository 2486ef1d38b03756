"""Training on a folder as people bring it: its val, its test, and images that cannot be read."""

import json

import pytest
from helpers import class_folders, tiny_resnet

from flax_resnet.data.config import DataConfig
from flax_resnet.errors import UserError
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate


@pytest.fixture
def parts(tmp_path):
    """Two classes in train, val and test, of 6, 2 and 3 images each."""
    for name, count in {"train": 6, "val": 2, "test": 3}.items():
        class_folders(tmp_path / "photos" / name, ("cat", "dog"), count, (8, 8))
    return tmp_path / "photos"


def config(parts, **data):
    data = DataConfig(folder=str(parts), image_size=8, num_workers=0, **data)
    model = tiny_resnet(num_classes=2, stage_sizes=(1,))
    return TrainConfig(model=model, data=data, num_steps=2, batch_size=4, eval_batch_size=4)


def cut(path):
    path.write_bytes(path.read_bytes()[:120])


def test_val_is_evaluated_what_is_unreadable_is_counted_and_test_is_for_evaluate(
    parts, tmp_path, mesh, capsys, call
):
    cut(parts / "train" / "cat" / "01.png")
    result = train_and_evaluate(config(parts, skip_unreadable=True), tmp_path / "run", mesh=mesh)
    assert (result["evaluated_on"], result["num_eval"]) == ("val", 4)
    assert (result["num_train"], result["num_unreadable"]) == (11, 1)
    out = capsys.readouterr().out
    assert f"evaluated on {parts}/val; {parts}/test not used" in out
    assert f"left out, as they cannot be read: {parts}/train/cat/01.png (image file is trunc" in out
    output = tmp_path / "test.json"
    code, out, err = call("evaluate", "--weights", tmp_path / "run", "--output", output)
    assert (code, err) == (0, "")
    assert json.loads(output.read_text())["n"] == 6
    assert f"evaluated on {parts}/test; {parts}/val not used" in out


@pytest.mark.parametrize("resident_mb", [0, 64])
def test_what_breaks_off_in_any_part_is_said_before_the_first_step(
    parts, tmp_path, mesh, resident_mb
):
    bad = ("train/cat/03.png", "val/dog/01.png")
    for name in bad:
        cut(parts / name)
    with pytest.raises(UserError, match=r"2 unreadable.*train/cat/03\.png.*val/dog/01\.png"):
        train_and_evaluate(config(parts, resident_mb=resident_mb), tmp_path / "run", mesh=mesh)
    assert not (tmp_path / "run").exists()
