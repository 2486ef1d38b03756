import csv
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import QUICK, assert_one_line_error
from prediction_helpers import NAMES, damaged, make_weights, probabilities

from flax_resnet.data.folders import find_images
from flax_resnet.errors import UserError
from flax_resnet.inference.classifier import predict_images
from flax_resnet.weights import open_weights

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    make_weights(path)
    return path


def test_predictions_are_those_of_a_direct_call(weights, photos):
    opened = open_weights(weights)
    paths = find_images([photos])
    assert [str(p.relative_to(photos)) for p in paths] == [
        "a.jpg", "b.png", "d.bmp", "deep/c.PNG", "e.png", "f.gif", "z.png",
    ]  # fmt: skip
    wanted = probabilities(opened, paths)
    assert len(set(wanted.argmax(1))) > 1  # or the order of the images would not be tested
    for batch_size in (3, 32):
        found = list(predict_images(opened, [photos], top=4, batch_size=batch_size))
        assert [p.path for p in found] == paths
        for one, p in zip(found, wanted, strict=True):
            order = np.argsort(-p)[:4]
            assert one.classes == tuple(order)
            assert one.names == tuple(NAMES[i] for i in order)
            np.testing.assert_allclose(one.probabilities, p[order], rtol=1e-5)


def test_scanned_blocks_predict_too(tmp_path, photos):
    make_weights(tmp_path / "w.safetensors", stage_sizes=(3,), scan_blocks=True)
    opened = open_weights(tmp_path / "w.safetensors")
    (found,) = predict_images(opened, [photos / "a.jpg"])
    unrolled = dataclasses.replace(opened, module=opened.module.clone(scan_blocks=False))
    (p,) = probabilities(unrolled, [photos / "a.jpg"])
    assert opened.module.scan_blocks
    np.testing.assert_allclose(found.probabilities, np.sort(p)[::-1][:5], rtol=1e-4)


def test_ties_go_to_the_lower_class_and_top_is_at_most_all(weights, photos):
    opened = open_weights(weights)
    params = dict(opened.variables["params"])
    params["head"] = jax.tree.map(np.zeros_like, params["head"])
    opened = dataclasses.replace(
        opened, variables={**opened.variables, "params": params}, class_names=None
    )
    (found,) = predict_images(opened, [photos / "a.jpg"], top=20)
    assert found.classes == tuple(range(10))
    assert found.names[3] == "class 3"
    assert found.probabilities == pytest.approx([0.1] * 10)


def test_broken_images_on_the_command_line(call, weights, photos, tmp_path):
    bad = photos / "bad.png"
    bad.write_bytes(b"no picture")
    (photos / "z.png").write_bytes((photos / "z.png").read_bytes()[:60])
    opened, broken = open_weights(weights), []
    found = predict_images(opened, [photos], batch_size=2, on_error=lambda *e: broken.append(e))
    assert [p.path.name for p in found] == ["a.jpg", "b.png", "d.bmp", "c.PNG", "e.png", "f.gif"]
    assert [path.name for path, _ in broken] == ["bad.png", "z.png"]
    with pytest.raises(UserError, match=r"unreadable image 3, .*bad\.png"):
        list(predict_images(opened, [photos]))
    code, out, err = call("predict", photos / "a.jpg", bad, "--weights", weights, "--top", 1)
    assert code == 0
    assert err == f"skipped {bad}: it is no image that Pillow reads\n"
    assert out.count("\n") == 2
    code, out, err = call("predict", bad, bad, "--weights", weights, "--format", "csv",
                          "--output", tmp_path / "x.csv")  # fmt: skip
    assert (code, out) == (2, "")
    assert err.splitlines()[2] == "error: none of 2 images could be read: give others"
    assert not list(tmp_path.glob("x.csv*"))


def test_formats(call, weights, photos, tmp_path):
    arguments = ("predict", photos, photos / "a.jpg", "--weights", weights, "--top", 3)
    found = list(predict_images(open_weights(weights), [photos, photos / "a.jpg"], top=3))
    assert len(found) == 8
    code, text, err = call(*arguments)
    assert (code, err) == (0, f"no images, and left out of {photos}: 1 .txt\n")
    best = f"  {found[0].probabilities[0]:.4f}  {found[0].names[0]}"
    assert text.splitlines()[:2] == [str(photos / "a.jpg"), best]
    assert text.count("\n") == 8 * 4
    _, out, _ = call(*arguments, "--format", "json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["path"] for row in rows] == [str(p.path) for p in found]
    assert [tuple(row["classes"]) for row in rows] == [p.classes for p in found]
    assert [tuple(row["names"]) for row in rows] == [p.names for p in found]
    assert rows[0]["probabilities"] == pytest.approx(list(found[0].probabilities))
    _, out, _ = call(*arguments, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 8 * 3
    assert [int(row["class"]) for row in rows] == [c for p in found for c in p.classes]
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "3", "1"]
    file = tmp_path / "out.csv"
    assert call(*arguments, "--format", "csv", "--output", file) == (0, "", err)
    assert file.read_text() == out
    assert not list(tmp_path.glob("*.partial"))


def test_a_path_that_is_no_utf8_is_printed(call, weights, photos):
    odd = os.fsencode(photos) + b"/odd\xff.png"
    pathlib.Path(os.fsdecode(odd)).write_bytes((photos / "b.png").read_bytes())
    for format in ("text", "csv", "json"):
        code, out, _ = call("predict", os.fsdecode(odd), "--weights", weights, "--format", format)
        assert code == 0
        assert ("udcff" if format == "json" else r"odd\xff.png") in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}"], "weights 'imagenet': a tag needs a network (--model NAME"),
        ([], "no images are given"),
        (["/nowhere/x.png", "--weights", "{weights}"], "/nowhere/x.png: no such file or folder"),
        (["{empty}", "--weights", "{weights}"], "holds no images: expected files that end in"),
        (["{photos}", "--weights", "{weights}", "--top", "0"], "top=0: expected 1 or more"),
        (["{photos}", "--weights", "{weights}", "--batch-size", "0"], "batch_size=0"),
        (["{photos}", "--weights", "{weights}", "--size", "0"], "--size=0: expected 1 or more"),
        (["{photos}", "--weights", "{weights}", "--size", "20"], "resize=10 is below size=20"),
        (["{photos}", "--weights", "{weights}", "--std", "0"], "preprocessing.std=0.0"),
        (["{photos}", "--weights", "{damaged}"], "are not finite"),
        (["{photos}", "--weights", "{weights}", "--output", "/proc/x/y"], "cannot be written"),
        (["{photos}", "--weights", "{weights}", "--output", "{empty}"], "is a directory"),
        (["{photos}", "--weights", "{headless}"], "the network has no head"),
        (["{photos}", "--weights", "{weights}", "--model", "resnet50"], "are not of resnet50"),
        (["{photos}", "--weights", "/nowhere.pth"], "/nowhere.pth"),
    ],
)
def test_bad_input_is_one_line(call, weights, photos, tmp_path, arguments, message):
    headless, empty = tmp_path / "headless.safetensors", tmp_path / "empty"
    empty.mkdir()
    if "{headless}" in arguments:
        make_weights(headless, include_top=False, pooling="avg")
    places = {"photos": photos, "weights": weights, "headless": headless, "empty": empty}
    if "{damaged}" in arguments:
        places["damaged"] = damaged(weights)
    result = call("predict", *[argument.format(**places) for argument in arguments])
    assert_one_line_error(result, message)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "train"])
def test_a_process_imports_no_other_framework(
    command, weights, photos, tmp_path, clean_environment, digits_dir
):
    """A stand-in leaves a mark when anything imports it, Grain's workers included.

    But for torch in training: tensorboardX, which writes the event files, looks for it.
    """
    marker = tmp_path / "imported"
    for name in ("torch", "tensorflow", "keras")[command == "train" :]:
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(
            f"open({str(marker)!r}, 'a').write({name!r})\nraise ImportError({name!r})\n"
        )
    environment = clean_environment | QUICK | {"PYTHONPATH": str(tmp_path / "site")}
    words = {
        "predict": [photos, "--weights", weights, "--format", "json"],
        "train": ["digits", "--workdir", tmp_path / "w", "--data.data-dir", digits_dir,
                  "--num-steps", "6", "--model.stage-sizes", "1", "--model.num-filters", "8",
                  "--data.resident-mb", "0", "--data.num-workers", "1"],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "flax_resnet", command, *words[command]],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    said = {"predict": f"no images, and left out of {photos}: 1 .txt\n", "train": ""}
    assert (done.returncode, done.stderr) == (0, said[command])
    if command == "predict":
        assert len(done.stdout.splitlines()) == 7
    else:
        assert "streamed" in done.stdout
    assert not marker.exists()
