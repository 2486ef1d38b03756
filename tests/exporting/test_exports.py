"""Exports compute what their source does; what is not near enough, or cannot be, leaves nothing."""

import json
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from exporting_helpers import FAMILIES, PHOTO, batch, named, opened, own_logits, relative
from flax import linen as nn
from flax.traverse_util import flatten_dict
from helpers import assert_one_line_error, assert_trees_equal, tiny_resnet
from prediction_helpers import NAMES, SQUARE, damaged, make_weights
from safetensors.numpy import load_file

import flax_resnet
from flax_resnet.data.decode import Decoder
from flax_resnet.data.preprocess import KERAS_V1, TORCH, Preprocessing
from flax_resnet.errors import UserError
from flax_resnet.exporting import loader
from flax_resnet.exporting.exports import (
    difference,
    how_to_prepare,
    prepared_images,
    program_by_platform,
)
from flax_resnet.inference.classifier import Classifier
from flax_resnet.weights import open_weights
from flax_resnet.xla import backend

BATCH = 3  # not a size that an export is measured with
QUICK_FAMILIES = ("imagenet stem", "MiniModel of digits")
EVERY = [
    pytest.param(name, marks=() if name in QUICK_FAMILIES else pytest.mark.slow)
    for name in FAMILIES
]


@pytest.fixture
def converter():
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed (the [onnx] extra)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the [onnx] extra)")


def onnx_session(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})[0]


def check_computes(name, path, load, rng):
    """An export of a family computes its network on a batch of another size."""
    source = opened(*FAMILIES[name])
    assert flax_resnet.export(source, path).difference < 1e-5
    images = batch(rng, source, BATCH)
    logits = load(path)(images)
    assert (logits.shape, logits.dtype) == ((BATCH, 10), np.float32)
    assert relative(logits, own_logits(source, images)) < 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_stablehlo_computes_the_network(name, tmp_path, rng):
    check_computes(name, tmp_path / "net", loader.load, rng)


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("name", EVERY)
def test_onnx_computes_the_network(name, tmp_path, rng, capfd):
    before = nn.max_pool, nn.Conv.__call__, nn.BatchNorm.__call__
    check_computes(name, tmp_path / "net.onnx", onnx_session, rng)
    assert capfd.readouterr() == ("", "")  # the converter and the runtime print
    assert (nn.max_pool, nn.Conv.__call__, nn.BatchNorm.__call__) == before


def test_the_program_has_each_platforms_forms(tmp_path, monkeypatch):
    """On a CPU those of the jitted network, elsewhere XLA's own max-pool and convolutions."""
    source = opened(named("resnet18", stage_sizes=(1, 1, 1, 1)), PHOTO)
    flax_resnet.export(source, tmp_path / "net")
    data = (tmp_path / "net" / loader.ARTIFACT).read_bytes()
    exported = jax.export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    *_, images = exported.in_avals
    assert (str(images.shape), images.dtype) == ("(b, 32, 32, 3)", np.uint8)
    with np.load(tmp_path / "net" / loader.WEIGHTS) as weights:
        here = jax.jit(exported.call).lower(dict(weights), np.zeros((1, 32, 32, 3), np.uint8))
    jitted = jax.jit(source.module.apply)
    jitted = jitted.lower(source.variables, np.zeros((1, 32, 32, 3), np.float32))
    for program in (jitted.compile().as_text(), here.compile().as_text()):
        assert "reduce-window(" not in program
    # The stem, four blocks of two and three shortcuts are 12: on a CPU three are matrix products.
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    lower = jax.jit(program_by_platform(Classifier(source))).trace(
        flatten_dict(source.variables, sep="/"), np.zeros((1, 32, 32, 3), np.uint8)
    ).lower  # fmt: skip
    for platform, count in {"cuda": 12, "tpu": 12, "cpu": 9}.items():
        program = lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.convolution") == count, platform
        assert ("reduce_window" in program) == (platform != "cpu")


@pytest.fixture
def weights(tmp_path):
    make_weights(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_a_directory_says_what_it_holds(weights, tmp_path, call):
    code, out, err = call("export", weights, tmp_path / "net")
    assert (code, err) == (0, "")
    line = re.fullmatch(
        r"ResNet written to (.*): StableHLO for cpu, cuda, tpu, run by its loader, 0\.\d MB; "
        r"largest relative difference (\S+) \(10 images, batches of 1 and 10\)\n",
        out,
    )
    assert line is not None, out
    assert line[1] == str(tmp_path / "net")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "net"]
    files = sorted(p.name for p in (tmp_path / "net").iterdir())
    assert files == ["about.json", "load.py", "net.stablehlo", "weights.npz"]
    about = json.loads((tmp_path / "net" / "about.json").read_text())
    assert about["class_names"] == list(NAMES)
    assert about["input"]["shape"] == ["b", 8, 8, 3]
    assert about["preprocessing"]["resize"] == SQUARE.resize
    assert about["prepare"] == how_to_prepare(SQUARE)
    assert about["requires"] == [f"jax>={jax.__version__}", "flatbuffers", "pillow"]
    assert about["check"]["images"] == 10
    assert float(line[2]) == pytest.approx(about["check"]["largest_relative_difference"], rel=0.06)
    assert (tmp_path / "net" / "load.py").read_text() == Path(loader.__file__).read_text()


def test_images_of_ones_own_and_platforms(weights, tmp_path, call, photos):
    arguments = ("export", weights, tmp_path / "net")
    code, out, err = call(*arguments, "--images", photos / "b.png", "--platforms", "cpu", "rocm")
    assert (code, err) == (0, "")
    assert "StableHLO for cpu, rocm, " in out
    assert "(5 images, batches of 1 and 5)" in out
    net = loader.load(tmp_path / "net")
    (photos / "b.png").write_bytes(b"no image")
    again = call(*arguments, "--overwrite", "--images", photos / "b.png")
    assert_one_line_error(again, "unreadable image")
    assert net.about == loader.load(tmp_path / "net").about  # the old one is still there


@pytest.mark.usefixtures("converter")
def test_a_file_says_what_it_holds(weights, tmp_path, call):
    onnx = pytest.importorskip("onnx")
    code, out, err = call("export", weights, tmp_path / "net.onnx")
    assert (code, err) == (0, "")
    assert ": ONNX of opset 21, run by onnxruntime " in out
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert json.loads(about["class_names"]) == list(NAMES)
    assert json.loads(about["preprocessing"])["mean"] == list(SQUARE.mean)
    (images,) = model.graph.input
    sides = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert (images.name, sides) == ("images", ["b", 8, 8, 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_safetensors_are_those_of_convert(weights, tmp_path, call):
    code, out, err = call("export", weights, tmp_path / "b.safetensors")
    assert (code, err) == (0, "")
    assert ": safetensors with torchvision's names, read back, 0.0 MB; " in out
    assert_trees_equal(load_file(weights), load_file(tmp_path / "b.safetensors"))
    again = open_weights(tmp_path / "b.safetensors")
    assert (again.preprocessing, again.class_names) == (SQUARE, NAMES)


@pytest.mark.parametrize(
    ("factor", "tolerance", "message"),
    [(1.01, 1e-4, "its outputs differ by 1.0e-02 of the largest"), (math.nan, 10, "differ by nan")],
)
def test_what_is_not_near_enough_leaves_nothing(
    weights, monkeypatch, tmp_path, call, factor, tolerance, message
):
    run = loader.Net.__call__
    monkeypatch.setattr(loader.Net, "__call__", lambda net, images: factor * run(net, images))
    result = call("export", weights, tmp_path / "net", "--tolerance", tolerance)
    assert_one_line_error(result, message)
    assert list(tmp_path.iterdir()) == [weights]


def test_one_image_that_differs_is_found():
    source = opened(tiny_resnet())
    images = prepared_images(source.preprocessing, ())
    logits = own_logits(source, images)
    wrong = logits.copy()
    wrong[7, 3] += 0.5
    largest = difference(lambda images: wrong[: len(images)], images, logits)
    assert largest == pytest.approx(0.5 / np.abs(logits).max(), rel=1e-5)
    assert np.abs(images[0].astype(int) - images[7]).max() > 20


def test_what_is_there_is_kept_unless_told(weights, tmp_path, call):
    dest = tmp_path / "net"
    assert call("export", weights, dest)[0] == 0
    assert_one_line_error(call("export", weights, dest), "is there already: give another name, or")
    make_weights(weights, class_names=None)
    assert call("export", weights, dest, "--overwrite")[0] == 0
    assert json.loads((dest / "about.json").read_text())["class_names"] is None
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "about.json").write_text("{}")
    for place in (mine, tmp_path):
        result = call("export", weights, place, "--overwrite")
        assert_one_line_error(result, f"{place} is no exported network, and is not overwritten")
    assert [p.name for p in mine.iterdir()] == ["about.json"]
    (tmp_path / "b.safetensors").mkdir()
    result = call("export", weights, tmp_path / "b.safetensors", "--overwrite")
    assert_one_line_error(result, "is no exported network, and is not overwritten")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}", "{tmp}/x.pth"], "x.pth: expected a name that ends in .onnx or .safetensors"),
        (["{source}", "{tmp}/x.weights.h5"], "`convert` writes .weights.h5"),
        (["{source}", "{tmp}/none/x"], "x cannot be written"),
        (["{tmp}/none.safetensors", "{tmp}/x"], "none.safetensors"),
        (["imagenet", "{tmp}/x.onnx"], "a tag needs a network"),
        (["{tmp}", "{tmp}/x"], "holds no run"),
        (["{source}", "{tmp}/x", "--platforms", "cpu", "gpu"], "platforms cpu gpu: expected"),
        (["{source}", "{tmp}/x", "--platforms", "tpu"], "platforms tpu: expected some of"),
        (["{source}", "{tmp}/x", "--tolerance", "-1"], "tolerance=-1"),
        (["{source}", "{tmp}/x", "--images", "{tmp}/no.png"], "no.png: no such file or folder"),
        (["{bare}", "{tmp}/x"], "does not say how images are prepared for it"),
        (["{damaged}", "{tmp}/x"], "the network's outputs are not finite"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, arguments, message):
    names = ("source", "bare")
    paths = {name: tmp_path / f"{name}.safetensors" for name in names} | {"tmp": tmp_path}
    make_weights(paths["source"])
    if "{damaged}" in arguments:
        paths["damaged"] = damaged(paths["source"])
    if "{bare}" in arguments:
        make_weights(paths["bare"], preprocessing=None)
    result = call("export", *[argument.format(**paths) for argument in arguments])
    assert_one_line_error(result, message)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors"}


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match=r"jax2onnx is not installed .*flax_resnet\[onnx\]"):
        flax_resnet.export(opened(tiny_resnet()), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prepared", "text"),
    [
        (
            TORCH,
            "decode to RGB; resize the shorter side to 256, bilinear; crop the central 224x224",
        ),
        (KERAS_V1, "decode to RGB; resize to 224x224, nearest"),
        (
            Preprocessing(
                size=16, mean=(0.5,), std=(0.2,) * 3, decoder=Decoder(3, 12, 0.875, pad=2)
            ),
            "decode to RGB; turn as EXIF says; put transparent pixels on white; crop the central "
            "square of 0.875 of the shorter side; resize to 12x12, bilinear; pad 2 zeros on every "
            "side",
        ),
    ],
)
def test_how_to_prepare_is_said(prepared, text):
    assert how_to_prepare(prepared) == f"{text}; pass uint8 (N, H, W, C), not normalised"


@pytest.mark.slow
@pytest.mark.usefixtures("converter")
def test_resnet50_at_224(tmp_path, rng):
    """All three exports are as large as the weights, and agree with it on every class."""
    source = opened(flax_resnet.create("resnet50"), TORCH, class_names=None)
    for name in ("net", "net.onnx", "net.safetensors"):
        exported = flax_resnet.export(source, tmp_path / name)
        assert exported.difference < 1e-5
        assert 100e6 < exported.num_bytes < 106e6
    images = batch(rng, source, 8)
    want = own_logits(source, images)
    for run in (loader.load(tmp_path / "net"), onnx_session(tmp_path / "net.onnx")):
        assert relative(run(images), want) < 1e-4
