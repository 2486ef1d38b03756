"""Paths, class names and tags of users are only texts, whatever characters they have."""

import csv
import json
import os

import pytest
from helpers import assert_one_line_error, class_folders

from flax_resnet.training import loop

SMALL = ["--model", "mini", "--model.stage-sizes", "1", "--model.num-filters", "4", "--num-steps",
         "2", "--batch-size", "8", "--eval-batch-size", "8"]  # fmt: skip
ODD = ["[draft] :x:", "caf\udce9 $x$", "雪 {0} %s"]


@pytest.fixture(params=ODD)
def places(request, tmp_path):
    """(a folder of two classes, a workdir), with the name in all of them."""
    folder = class_folders(tmp_path / request.param / "photos", (request.param, "b"), 10, (8, 8))
    return folder, tmp_path / "odd [" / f"b] {request.param}", request.param


def test_a_run_is_made_read_and_compared(call, places, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    folder, workdir, name = places
    code, out, _ = call("train", folder, *SMALL, "--workdir", workdir)
    escaped = os.fsencode(name).decode(errors="backslashreplace")
    assert code == 0
    assert f"odd [/b] {escaped} " in out.split("record")[1]
    assert (workdir / "confusion.png").stat().st_size > 1000
    assert json.loads((workdir / "result.json").read_text())["step"] == 2
    for arguments in (
        ("evaluate", "--weights", workdir, "--output", workdir / "x.json"),
        ("compare", workdir, workdir, "--output", workdir / "x.md"),
        ("train", folder, *SMALL, "--workdir", workdir),
    ):
        assert call(*arguments)[::2] == (0, "")
    code, out, _ = call("predict", folder, "--weights", workdir, "--format", "csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert (code, {row["name"] for row in rows}) == (0, {escaped, "b"})
    code, out, _ = call("predict", folder, "--weights", workdir, "--format", "json", "--top", "2")
    assert (code, set(json.loads(out.splitlines()[0])["names"])) == (0, {escaped, "b"})


@pytest.mark.slow  # a report draws ten pictures
def test_a_run_is_reported_and_taken_elsewhere(call, places):
    folder, workdir, _ = places
    assert call("train", folder, *SMALL, "--workdir", workdir)[0] == 0
    for arguments in (
        ("report", workdir),
        ("export", workdir, workdir / "shlo"),
        ("export", workdir, workdir / "x.onnx"),
        ("export", workdir, workdir / "x.safetensors"),
        ("predict", folder, "--weights", workdir / "x.safetensors"),
    ):
        code, _, err = call(*arguments)
        assert code == 0, err
    assert "data:image/png" in (workdir / "report.html").read_text()


def test_a_picture_that_fails_does_not_keep_a_run_from_its_result(
    call, tmp_path, image_folder, monkeypatch
):
    def fails(*args):
        raise RuntimeError("no picture")

    monkeypatch.setattr(loop.figures, "confusion", fails)
    code, _, err = call("train", image_folder, *SMALL, "--workdir", tmp_path / "w")
    assert code == 0
    assert f"{tmp_path}/w/confusion.png is not drawn (RuntimeError: no picture)" in err
    assert json.loads((tmp_path / "w" / "result.json").read_text())["num_eval"] == 8


@pytest.mark.parametrize("name", ["[/b]", "%s", "[red]x", "{0}"])
def test_a_bad_value_is_named_as_it_was_typed(call, tmp_path, name):
    assert_one_line_error(call("train", tmp_path / name), name)
    assert_one_line_error(call("evaluate", "--weights", name, "--data.folder", tmp_path), name)
    assert_one_line_error(call("summary", name), name)
    assert_one_line_error(call(name), name)
