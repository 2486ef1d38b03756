"""Exports compute what their source does; what is not near enough, or cannot be, leaves nothing."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from exporting_helpers import FAMILIES, PHOTO, named, opened, own_logits, relative
from flax import linen as nn
from helpers import assert_one_line_error, assert_trees_equal, tiny_resnet
from prediction_helpers import NAMES, SQUARE, damaged, make_weights
from safetensors.numpy import load_file

import flax_resnet
from flax_resnet import cpu
from flax_resnet.classify import open_network
from flax_resnet.datasets.decode import Decoder
from flax_resnet.errors import UserError
from flax_resnet.exporting import loader, to_onnx, write
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, WEIGHTS, ExportError
from flax_resnet.exporting.source import how_to_prepare
from flax_resnet.preprocess import KERAS_V1, TORCH, Preprocessing
from flax_resnet.pretrained import open_weights

QUICK_FAMILIES = ["imagenet stem", "MiniModel of digits"]
BATCHES = (3,)  # neither of those that an export is measured with


def batch(rng, source, n):
    return rng.integers(0, 256, (n, *source.preprocessing.shape), dtype=np.uint8)


def check_stablehlo(name, directory, rng):
    source = opened(*FAMILIES[name])
    exported = flax_resnet.export(source, directory)
    assert exported.difference.largest < 1e-5
    net = loader.load(directory)
    for n in BATCHES:
        images = batch(rng, source, n)
        logits = net(images)
        assert (logits.shape, logits.dtype) == ((n, 10), np.float32)
        assert relative(logits, own_logits(source, images)) < 1e-5


def check_onnx(name, path, rng):
    runtime = pytest.importorskip("onnxruntime")
    source = opened(*FAMILIES[name])
    exported = flax_resnet.export(source, path)
    assert exported.difference.largest < 1e-5
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in BATCHES:
        images = batch(rng, source, n)
        (logits,) = session.run(["logits"], {"images": images})
        assert (logits.shape, logits.dtype) == ((n, 10), np.float32)
        assert relative(logits, own_logits(source, images)) < 1e-5


@pytest.fixture
def converter():
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed (the [onnx] extra)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the [onnx] extra)")


EVERY = [
    name if name in QUICK_FAMILIES else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
]


@pytest.mark.parametrize("name", EVERY)
def test_stablehlo_computes_the_network(name, tmp_path, rng):
    check_stablehlo(name, tmp_path / "net", rng)


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("name", EVERY)
def test_onnx_computes_the_network(name, tmp_path, rng, capfd):
    before = nn.max_pool, nn.Conv.__call__, nn.BatchNorm.__call__
    check_onnx(name, tmp_path / "net.onnx", rng)
    assert capfd.readouterr() == ("", "")  # the converter and the runtime print
    assert (nn.max_pool, nn.Conv.__call__, nn.BatchNorm.__call__) == before


def test_the_program_is_for_every_platform(tmp_path):
    """It has XLA's own max-pool and convolutions, also of maps smaller than the kernel."""
    source = opened(named("resnet18", stage_sizes=(1, 1, 1, 1)), PHOTO)
    flax_resnet.export(source, tmp_path / "net")
    data = (tmp_path / "net" / loader.ARTIFACT).read_bytes()
    exported = jax.export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    *_, images = exported.in_avals
    assert (str(images.shape), images.dtype) == ("(b, 32, 32, 3)", np.uint8)
    here = jax.jit(source.module.apply)
    here = here.lower(source.variables, np.zeros((1, 32, 32, 3), np.float32)).as_text()
    assert "reduce_window" not in here
    assert "stablehlo.select" in here
    assert here.count("stablehlo.convolution") < 12
    program = exported.mlir_module()
    assert "reduce_window" in program
    assert "stablehlo.select" not in program
    # The stem, four blocks of two and three shortcuts; each platform has its own.
    assert program.count("stablehlo.convolution") == 3 * (1 + 4 * 2 + 3)
    assert cpu.is_backend()


def test_a_directory_says_what_it_holds(tmp_path, call):
    make_weights(tmp_path / "a.safetensors")
    code, out, err = call("export", tmp_path / "a.safetensors", tmp_path / "net")
    assert (code, err) == (0, "")
    line = re.fullmatch(
        r"ResNet written to (.*): StableHLO for cpu, cuda, tpu, 0\.\d MB; largest relative "
        r"difference (\S+) \(its loader, jax \S+; 10 images, batches of 1 and 10\)\n",
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
    assert about["jax"] == jax.__version__
    check = about["check"]
    assert (check["images"], check["batch_sizes"]) == (10, [1, 10])
    assert float(line[2]) == pytest.approx(check["largest_relative_difference"], rel=0.06)
    assert (tmp_path / "net" / "load.py").read_text() == Path(loader.__file__).read_text()


def test_images_of_ones_own_and_platforms(tmp_path, call, photos):
    make_weights(tmp_path / "a.safetensors")
    arguments = ("export", tmp_path / "a.safetensors", tmp_path / "net")
    code, out, err = call(*arguments, "--images", photos / "b.png", "--platforms", "cpu", "rocm")
    assert (code, err) == (0, "")
    assert "StableHLO for cpu, rocm, " in out
    assert "; 1 image, batches of 1 and 2)" in out
    net = loader.load(tmp_path / "net")
    (photos / "b.png").write_bytes(b"no image")
    again = call(*arguments, "--overwrite", "--images", photos / "b.png")
    assert_one_line_error(again, "unreadable image")
    assert net.about == loader.load(tmp_path / "net").about  # the old one is still there


@pytest.mark.usefixtures("converter")
def test_a_file_says_what_it_holds(tmp_path, call):
    onnx = pytest.importorskip("onnx")
    make_weights(tmp_path / "a.safetensors")
    code, out, err = call("export", tmp_path / "a.safetensors", tmp_path / "net.onnx")
    assert (code, err) == (0, "")
    assert " written to " in out
    assert ": ONNX of opset 21, 0.0 MB; largest relative difference " in out
    assert re.search(r"\(onnxruntime \S+; 10 images, batches of 1 and 10\)\n$", out)
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    about = {prop.key: prop.value for prop in model.metadata_props}
    assert json.loads(about["class_names"]) == list(NAMES)
    assert json.loads(about["preprocessing"])["mean"] == list(SQUARE.mean)
    (images,) = model.graph.input
    sides = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert (images.name, sides) == ("images", ["b", 8, 8, 3])
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    operations = [node.op_type for node in model.graph.node]
    assert (
        operations.count("BatchNormalization") == operations.count("Conv") == 3
    )  # what runtimes fuse into convolutions


def test_safetensors_are_those_of_convert(tmp_path, call):
    make_weights(tmp_path / "a.safetensors")
    code, out, err = call("export", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (code, err) == (0, "")
    assert ": safetensors with torchvision's names, 0.0 MB; " in out
    assert "(read back; 10 images, batches of 1 and 10)" in out
    files = [load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert_trees_equal(*files)
    kept = open_weights(tmp_path / "b.safetensors")
    assert (kept.preprocessing, kept.class_names) == (SQUARE, NAMES)


def test_what_is_not_near_enough_leaves_nothing(monkeypatch, tmp_path, call):
    source, dest = tmp_path / "a.safetensors", tmp_path / "net"
    make_weights(source)
    factor, load = 1.01, loader.load

    def run(directory):
        net = load(directory)
        return lambda images: factor * net(images)

    monkeypatch.setattr(loader, "load", run)
    message = "its outputs differ by 1.0e-02 of the largest (its loader"
    assert_one_line_error(call("export", source, dest), message)
    factor = math.nan
    assert_one_line_error(call("export", source, dest, "--tolerance", 10), "differ by nan")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    factor = 1.01
    assert call("export", source, dest, "--tolerance", 0.02)[0] == 0
    about = json.loads((dest / "about.json").read_text())
    assert about["check"]["largest_relative_difference"] == pytest.approx(0.01, rel=1e-3)


def test_one_image_that_differs_is_found(tmp_path, rng):
    source = write.Source.of(opened(tiny_resnet()))
    wrong = source.logits.copy()
    wrong[7, 3] += 0.5
    found = source.difference(lambda images: wrong[: len(images)])
    assert found.largest == pytest.approx(0.5 / np.abs(source.logits).max(), rel=1e-5)
    assert np.abs(source.images[0].astype(int) - source.images[7]).max() > 20
    want = own_logits(source.opened, source.images)
    np.testing.assert_allclose(source.logits, want, rtol=1e-5, atol=1e-5)


def test_what_is_there_is_kept_unless_told(tmp_path, call):
    source = tmp_path / "a.safetensors"
    make_weights(source)
    dest = tmp_path / "net"
    assert call("export", source, dest)[0] == 0
    assert_one_line_error(call("export", source, dest), "is there already: give another name, or")
    make_weights(source, class_names=None)
    assert call("export", source, dest, "--overwrite")[0] == 0
    assert json.loads((dest / "about.json").read_text())["class_names"] is None
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "about.json").write_text("{}")
    result = call("export", source, mine, "--overwrite")
    assert_one_line_error(result, f"{mine} is no exported network, and is not overwritten")
    assert [p.name for p in mine.iterdir()] == ["about.json"]
    result = call("export", source, tmp_path, "--overwrite")
    assert_one_line_error(result, "is no exported network, and is not overwritten")
    (tmp_path / "b.safetensors").mkdir()
    result = call("export", source, tmp_path / "b.safetensors", "--overwrite")
    assert_one_line_error(result, "is a directory: name a file")


def test_an_export_that_cannot_be_moved_leaves_the_old_one(monkeypatch, tmp_path):
    source = opened(tiny_resnet())
    flax_resnet.export(source, tmp_path / "net")
    before = (tmp_path / "net" / "about.json").read_bytes()
    replace = write.Path.replace

    def refuse(path, target):
        if target == tmp_path / "net":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(write.Path, "replace", refuse)
    with pytest.raises(UserError, match=r"net cannot be written: .*No space left"):
        flax_resnet.export(source, tmp_path / "net", overwrite=True)
    assert (tmp_path / "net" / "about.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected two arguments, SOURCE and DEST"),
        (["{source}", "{tmp}/x.pth"], "x.pth: expected a name that ends in .onnx or .safetensors"),
        (["{source}", "{tmp}/x.weights.h5"], "`convert` writes .weights.h5"),
        (["{source}", "{tmp}/none/x"], "x cannot be written"),
        (["{tmp}/none.safetensors", "{tmp}/x"], "none.safetensors"),
        (["imagenet", "{tmp}/x.onnx"], "a tag needs a network"),
        (["{tmp}", "{tmp}/x"], "holds no run"),
        (
            ["{source}", "{tmp}/x", "--platforms", "cpu", "gpu"],
            "--platforms cpu gpu: expected",
        ),
        (["{source}", "{tmp}/x", "--platforms", "tpu"], "--platforms tpu: expected some of"),
        (["{source}", "{tmp}/x", "--tolerance", "-1"], "--tolerance=-1"),
        (["{source}", "{tmp}/x", "--images", "{tmp}/no.png"], "no.png: no such file or folder"),
        (["{bare}", "{tmp}/x"], "do not say how images are prepared for them"),
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


@pytest.mark.parametrize("name", ["jax2onnx", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    if name == "onnxruntime":
        monkeypatch.setattr(to_onnx, "write", lambda source, path: path.write_bytes(b""))
    with pytest.raises(UserError, match=rf"ONNX needs {name}, .*flax_resnet\[onnx\]"):
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
            "decode to RGB; crop the central square of 0.875 of the shorter side; resize to 12x12, "
            "bilinear; pad 2 zeros on every side",
        ),
    ],
)
def test_how_to_prepare_is_said(prepared, text):
    assert how_to_prepare(prepared) == f"{text}; pass uint8 (N, H, W, C), not normalised"


# No part of the library, of flax or of optax can be imported; what is run comes after.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax_resnet", "flax", "optax", "orbax", "sklearn", "tyro"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
import runpy, numpy
net = runpy.run_path("net/load.py")["load"]("net")
numpy.save("logits.npy", net(numpy.load("images.npy")))
"""


@pytest.fixture
def exported(tmp_path):
    """(a network, its exported directory)."""
    source = opened(tiny_resnet())
    flax_resnet.export(source, tmp_path / "net")
    return source, tmp_path / "net"


def test_it_runs_where_only_jax_is(exported, tmp_path, rng, clean_environment):
    images = batch(rng, exported[0], 5)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-P", "-c", ALONE]
    subprocess.run(command, cwd=tmp_path, env=clean_environment, check=True)
    assert relative(np.load(tmp_path / "logits.npy"), own_logits(exported[0], images)) < 1e-5
    for wrong in (images.astype(np.float32), images[:, :, :7], images[0], images[:0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(N, 8, 8, 3\)"):
            loader.load(exported[1])(wrong)


def changed(directory, data=None, **values):
    """Changes about.json, and with ``data`` the program, described as it is."""
    about = json.loads((directory / ABOUT).read_text()) | values
    if data is not None:
        (directory / ARTIFACT).write_bytes(data)
        about["sha256"][ARTIFACT] = hashlib.sha256(data).hexdigest()
    (directory / ABOUT).write_text(json.dumps(about))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


DAMAGES = {
    "no program": (lambda d: (d / ARTIFACT).unlink(), "is no exported network"),
    "no JSON": (lambda d: (d / ABOUT).write_text("{"), "is no exported network"),
    "a list": (lambda d: (d / ABOUT).write_text("[]"), "is no exported network"),
    "of a later version": (lambda d: changed(d, format="flax_resnet export 2"), "load.py there"),
    "one bit of a weight": (lambda d: flip(d / WEIGHTS), "weights.npz is not what about.json desc"),
    "one bit": (lambda d: flip(d / ARTIFACT), "is not what about.json describes"),
    "of another kind": (lambda d: changed(d, b"PK\x03\x04" * 99), "cannot be read by jax"),
    "empty": (lambda d: changed(d, b""), "cannot be read by jax"),
    "a pickle": (lambda d: changed(d, pickle.dumps(Trap())), "cannot be read by jax"),
    "no input": (lambda d: changed(d, input=None), "cannot be read by jax"),
}


def test_a_damaged_export_is_one_line_and_nothing_is_unpickled(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (damage, message) in enumerate(DAMAGES.values()):
        directory = shutil.copytree(exported[1], tmp_path / str(number))
        damage(directory)
        with pytest.raises(ExportError, match=message) as error:
            loader.load(directory)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600
    assert not (tmp_path / "trapped").exists()


ALL = ("net", "net.onnx", "net.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("converter")
def test_a_trained_run_is_exported(tmp_path, digits_dir, call):
    """ResNet-20 on the digits: its exports are right as often as it is."""
    from experiments import digits

    config = digits.get_config()
    config = flax_resnet.replaced(config, "data.data_dir", digits_dir)
    config = flax_resnet.replaced(config, "num_epochs", None)
    config = flax_resnet.replaced(config, "num_steps", 120)
    flax_resnet.train_and_evaluate(config, tmp_path / "run")
    for name in ALL:
        code, out, err = call("export", tmp_path / "run", tmp_path / name)
        assert (code, err) == (0, "")
        print(out, end="")
    source = open_network(tmp_path / "run")
    assert source.preprocessing.decoder is not None
    from sklearn.datasets import load_digits

    rows = load_digits()
    images = (rows.images[..., None] * 15.9375).astype(np.uint8)
    want = own_logits(source, images)
    assert np.mean(want.argmax(-1) == rows.target) > 0.8
    check_both(tmp_path, images, want)


def check_both(directory, images, want):
    """Of the exports ALL, those that run: they agree on every class."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(directory / "net.onnx", providers=["CPUExecutionProvider"])
    for logits in (
        loader.load(directory / "net")(images),
        session.run(None, {"images": images})[0],
    ):
        assert relative(logits, want) < 1e-4
        assert np.mean(logits.argmax(-1) == want.argmax(-1)) > 0.999


@pytest.mark.slow
@pytest.mark.usefixtures("converter")
def test_resnet50_at_224(tmp_path, rng):
    """Prints sizes, times and differences; the speeds are of one batch of 8."""
    source = opened(flax_resnet.create("resnet50"), TORCH, class_names=None)
    for name in ALL:
        start = time.perf_counter()
        exported = flax_resnet.export(source, tmp_path / name)
        print(f"{time.perf_counter() - start:.1f} s: {exported}")
        assert exported.difference.largest < 1e-5
        assert 100e6 < exported.num_bytes < 106e6
    images = batch(rng, source, 8)
    check_both(tmp_path, images, own_logits(source, images))
