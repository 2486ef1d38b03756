"""Exports compute what their source does; what is not near enough, or cannot be, leaves nothing."""

import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from exporting_helpers import CIFAR, FAMILIES, PHOTO, named, opened, own_logits, relative
from flax import linen as nn
from helpers import assert_one_line_error, assert_trees_equal, tiny_resnet
from prediction_helpers import NAMES, SQUARE, damaged, make_weights
from safetensors.numpy import load_file

import flax_resnet
from flax_resnet import cpu
from flax_resnet.classify import open_network
from flax_resnet.datasets.sources import open_tfds
from flax_resnet.errors import UserError
from flax_resnet.exporting import loader, stablehlo, to_onnx, to_torch, write
from flax_resnet.models import MiniModel
from flax_resnet.preprocess import TORCH
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
    pytest.importorskip("jax2onnx", reason="jax2onnx is not installed (the [export] extra)")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the [export] extra)")


@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_stablehlo_computes_the_network(name, tmp_path, rng):
    check_stablehlo(name, tmp_path / "net", rng)


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_onnx_computes_the_network(name, tmp_path, rng, capfd):
    before = nn.max_pool, nn.Conv.__call__, nn.BatchNorm.__call__
    check_onnx(name, tmp_path / "net.onnx", rng)
    assert capfd.readouterr() == ("", "")  # the converter and the runtime talk of their own
    assert (nn.max_pool, nn.Conv.__call__, nn.BatchNorm.__call__) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(QUICK_FAMILIES)))
def test_stablehlo_of_every_family(name, tmp_path, rng):
    check_stablehlo(name, tmp_path / "net", rng)


@pytest.mark.slow
@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(QUICK_FAMILIES)))
def test_onnx_of_every_family(name, tmp_path, rng):
    check_onnx(name, tmp_path / "net.onnx", rng)


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
    data = (photos / "b.png").read_bytes()
    np.testing.assert_array_equal(net.prepare(data), SQUARE(data))
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
    files = [load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert_trees_equal(*files)
    kept = open_weights(tmp_path / "b.safetensors")
    assert (kept.preprocessing, kept.class_names) == (SQUARE, NAMES)


@pytest.mark.parametrize(
    ("module", "prepared", "reason"),
    [
        (tiny_resnet(), SQUARE, "torch is not installed"),
        (tiny_resnet(se_reduction=2), SQUARE, "torchvision and CIFAR codes have no such network"),
        (MiniModel(10, (1,), 8), CIFAR, "torchvision and CIFAR codes have no such network"),
    ],
)
def test_without_torch_safetensors_are_read_back(monkeypatch, tmp_path, module, prepared, reason):
    monkeypatch.setitem(sys.modules, "torch", None)
    exported = flax_resnet.export(opened(module, prepared), tmp_path / "a.safetensors")
    assert exported.by == f"read back into jax, for {reason}"
    assert exported.difference.largest < 1e-6
    # What is read back is the file.
    tensors = to_torch.open_weights

    def other(path):
        found = tensors(path)
        return dataclasses.replace(
            found, variables=jax.tree.map(lambda x: x + 0.1, found.variables)
        )

    monkeypatch.setattr(to_torch, "open_weights", other)
    with pytest.raises(UserError, match="the export is not the network"):
        flax_resnet.export(opened(module, prepared), tmp_path / "b.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_not_near_enough_leaves_nothing(monkeypatch, tmp_path, call):
    source, dest = tmp_path / "a.safetensors", tmp_path / "net"
    make_weights(source)
    factor = 1.01

    def run(directory):
        net = loader.load(directory)
        return lambda images: factor * net(images)

    monkeypatch.setattr(stablehlo, "run", run)
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
        (["{source}", "{tmp}/x", "--platforms", "cpu", "gpu"], "--platforms gpu: expected some of"),
        (["{source}", "{tmp}/x", "--platforms", "tpu"], "--platforms tpu: expected each once, and"),
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
    with pytest.raises(UserError, match=rf"ONNX needs {name}, .*flax_resnet\[export\]"):
        flax_resnet.export(opened(tiny_resnet()), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("converter")
def test_what_the_converter_cannot_is_one_line(monkeypatch, tmp_path):
    def fails(source, images):
        raise NotImplementedError("no plugin\nfor this")

    monkeypatch.setattr(to_onnx, "_traced", fails)
    with pytest.raises(UserError, match=r"cannot convert .*NotImplementedError: no plugin\)"):
        flax_resnet.export(opened(tiny_resnet()), tmp_path / "net.onnx")


def test_a_machine_without_its_cpu_is_told(monkeypatch, tmp_path):
    def none(**kwargs):
        raise RuntimeError("Unknown backend: 'cpu' requested")

    monkeypatch.setattr(write.jax, "local_devices", none)
    with pytest.raises(UserError, match="JAX_PLATFORMS leaves it out: add cpu"):
        flax_resnet.export(opened(tiny_resnet()), tmp_path / "net")


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
def test_on_real_cifar_images(tmp_path, shared_data):
    (cifar,) = open_tfds("cifar10", shared_data, ["test"])
    encoded, _ = cifar.read(range(256))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, data in enumerate(encoded):
        (photos / f"{i:03}.png").write_bytes(data)
    prepared = dataclasses.replace(CIFAR, size=32)
    source = opened(flax_resnet.create("resnet20"), prepared)
    for name in ALL:
        exported = flax_resnet.export(source, tmp_path / name, images=[photos])
        print(exported)
        assert exported.difference.largest < 1e-5
        assert (exported.difference.images, exported.difference.batch_sizes) == (256, (1, 256))
    images = np.stack([prepared(data) for data in encoded])
    check_both(tmp_path, images, own_logits(source, images))


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
