"""The loader of an export: by itself, Preprocessing's pixels, and one line for bad files."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from exporting_helpers import DIGITS, FAMILIES, opened, own_logits, relative
from helpers import tiny_resnet
from PIL import Image
from prediction_helpers import paint

import flax_resnet
from flax_resnet.classify import Classifier
from flax_resnet.datasets.decode import Decoder
from flax_resnet.exporting import loader
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, WEIGHTS, ExportError
from flax_resnet.predict import predict
from flax_resnet.preprocess import KERAS_V1, TORCH, Preprocessing
from flax_resnet.record import to_record

SIZES = [(151, 253), (41, 30), (5, 7), (16, 16)]
RUNS = {
    "squeezed to a size": Decoder(3, size=16),
    "a share, and a rim": Decoder(3, size=12, crop_ratio=0.875, random_crop=True, pad=2),
    "grey": Decoder(1, size=16, crop_ratio=0.9),
}
PREPARED = {
    "torchvision": TORCH,
    "keras": KERAS_V1,
    "bicubic": Preprocessing(size=61, resize=64, interpolation="bicubic"),
    "grey": Preprocessing(size=9, resize=None, channels=1, mean=(0.5,), std=(0.2,)),
    "four channels": Preprocessing(size=9, resize=12, channels=4, mean=(0.5,), std=(0.2,) * 4),
    **{
        f"a run, {name}": Preprocessing(
            size=16, resize=None, channels=decoder.channels, mean=(0.5,),
            std=(0.2,) * decoder.channels, decoder=decoder,
        )
        for name, decoder in RUNS.items()
    },
}  # fmt: skip


def net_of(prepared):
    """A loaded network of which only what it does to photographs is there."""
    about = {"input": {"shape": ["b", *prepared.shape]}, "preprocessing": to_record(prepared)}
    about = json.loads(json.dumps(about))
    return loader.Net(about, types.SimpleNamespace(call=lambda weights, images: images), {})


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind, quality=90)
    return file.getvalue()


def deep(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 250)


MODES = {
    "RGB": lambda image: encoded(image),
    "L": lambda image: encoded(image.convert("L")),
    "LA": lambda image: encoded(image.convert("LA")),
    "RGBA": lambda image: encoded(image.convert("RGBA")),
    "P": lambda image: encoded(image.convert("P")),
    "1": lambda image: encoded(image.convert("1")),
    "16 bits": lambda image: encoded(deep(image)),
    "GIF": lambda image: encoded(image, "GIF"),
    "CMYK": lambda image: encoded(image.convert("CMYK"), "JPEG"),
    "JPEG": lambda image: encoded(image, "JPEG"),
    "grey JPEG": lambda image: encoded(image.convert("L"), "JPEG"),
}


@pytest.mark.parametrize("name", PREPARED)
def test_photographs_are_prepared_as_the_library_does(rng, name):
    prepared = PREPARED[name]
    net, others = net_of(prepared), 0
    for width, height in SIZES:
        image = paint(rng, height, width)
        for mode, encode in MODES.items():
            data = encode(image)
            got, want = net.prepare(data), prepared(data)
            assert (got.dtype, got.shape) == (np.uint8, prepared.shape)
            if prepared.decoder is None or "JPEG" not in mode:
                np.testing.assert_array_equal(got, want, err_msg=f"{mode} {width}x{height}")
                continue
            # Another decoder and resizer, and, where a crop shrinks to a third, another filter.
            gap = np.abs(got.astype(int) - want)
            assert np.mean(gap) < 1.5, f"{mode} {width}x{height}"
            others += 1
            if min(width, height) < 3 * want.shape[0]:
                assert gap.max() <= 1, f"{mode} {width}x{height}"
    assert others == (0 if prepared.decoder is None else 2 * len(SIZES))


def test_what_the_library_refuses_is_refused():
    net = net_of(TORCH)
    for data, message in [
        (encoded(Image.new("RGB", (60_000, 1))), "too long and thin"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "its mode is F"),
    ]:
        for prepare in (net.prepare, TORCH):
            with pytest.raises(ValueError, match=message):
                prepare(data)


def test_without_pillow_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        net_of(TORCH).prepare(b"")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 9, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
)
def test_images_of_another_kind_are_refused(images):
    net = net_of(Preprocessing(size=8, resize=None))
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 8, 8, 3\), as prepare gives them"):
        net(images)


# No part of the library, of flax or of optax can be imported; what is run comes after.
ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax_resnet", "flax", "optax", "orbax", "sklearn", "tyro"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
"""
PROGRAM = """
import runpy, numpy
file, *arguments = sys.argv[1:]
loaded = runpy.run_path(file + "/load.py")
net = loaded["load"](file)
numpy.save("logits.npy", net(numpy.load("images.npy")))
numpy.save("prepared.npy", net.prepare(open(arguments[0], "rb").read()))
sys.argv = [file + "/load.py", "--top", "3", *arguments]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def exported(tmp_path):
    """(a network, its exported directory)."""
    source = opened(tiny_resnet())
    flax_resnet.export(source, tmp_path / "net")
    return source, tmp_path / "net"


def test_it_runs_where_only_jax_is(exported, tmp_path, photos, rng, clean_environment):
    source, directory = exported
    images = rng.integers(0, 256, (5, *source.preprocessing.shape), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    paths = [photos / "a.jpg", photos / "notes.txt", photos / "e.png"]
    ran = subprocess.run(
        [sys.executable, "-P", "-c", ALONE + PROGRAM, directory, *paths],
        cwd=tmp_path, env=clean_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    logits = np.load(tmp_path / "logits.npy")
    assert relative(logits, own_logits(source, images)) < 1e-5
    prepared = np.load(tmp_path / "prepared.npy")
    np.testing.assert_array_equal(prepared, source.preprocessing(paths[0].read_bytes()))
    want = []
    for found in predict(source, [paths[0], paths[2]], top=3):
        rows = zip(found.probabilities, found.names, strict=True)
        want += [str(found.path), *(f"  {p:.4f}  {name}" for p, name in rows)]
    assert ran.stdout.splitlines() == want
    assert ran.stderr.startswith(f"skipped {paths[1]}: ")


def test_the_command_ends_with_what_is_wrong(exported, photos, monkeypatch, capsys):
    _, directory = exported
    monkeypatch.setattr(loader, "__file__", str(directory / "load.py"))
    assert loader.main([str(photos / "a.jpg"), "--top", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert loader.main([str(photos / "notes.txt")]) == 2
    (directory / ARTIFACT).unlink()
    assert loader.main([str(photos / "a.jpg")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {directory} is no exported network (")


def test_a_run_on_small_images_gets_their_size(tmp_path, rng):
    source = opened(*FAMILIES["MiniModel of digits"])
    flax_resnet.export(source, tmp_path / "net")
    net = loader.load(tmp_path / "net")
    data = encoded(paint(rng, 40, 30))
    want = Classifier.of(source).preprocessing(data)
    assert want.shape == DIGITS.shape
    np.testing.assert_array_equal(net.prepare(data), want)
    assert net.name(3) == "name 3"
    assert net.name(10) == "class 10"
    (tmp_path / "photo.png").write_bytes(data)
    [(name, probability), _] = net.predict(tmp_path / "photo.png", top=2)
    (found,) = predict(source, [tmp_path / "photo.png"], top=1)
    assert (name, probability) == (found.names[0], pytest.approx(found.probabilities[0], rel=1e-4))


def with_sum(directory, data):
    """Puts another program there, described as it is."""
    (directory / ARTIFACT).write_bytes(data)
    about = json.loads((directory / ABOUT).read_text())
    about["sha256"][ARTIFACT] = hashlib.sha256(data).hexdigest()
    (directory / ABOUT).write_text(json.dumps(about))


def changed(directory, **values):
    about = json.loads((directory / ABOUT).read_text())
    (directory / ABOUT).write_text(json.dumps({**about, **values}))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "nothing there": (lambda d: shutil.rmtree(d), "is no exported network"),
    "no program": (lambda d: (d / ARTIFACT).unlink(), "is no exported network"),
    "no text": (lambda d: (d / ABOUT).write_bytes(b"\xff\xfe"), "is no exported network"),
    "no JSON": (lambda d: (d / ABOUT).write_text("{"), "about.json is damaged"),
    "a list": (lambda d: (d / ABOUT).write_text("[]"), "about.json is damaged"),
    "of a later version": (lambda d: changed(d, format="flax_resnet export 2"), "load.py beside"),
    "cut off": (lambda d: os.truncate(d / ARTIFACT, 1000), "is not what about.json describes"),
    "one bit of a weight": (lambda d: flip(d / WEIGHTS), "weights.npz is not what about.json desc"),
    "one bit": (lambda d: flip(d / ARTIFACT), "is not what about.json describes"),
    "of another kind": (lambda d: with_sum(d, b"PK\x03\x04" * 99), "cannot be read by jax"),
    "empty": (lambda d: with_sum(d, b""), "cannot be read by jax"),
    "half": (lambda d: with_sum(d, (d / ARTIFACT).read_bytes()[:3000]), "cannot be read by jax"),
    "no input": (lambda d: changed(d, input=None), "cannot be read by jax"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_export_is_one_line(exported, name):
    damage, message = DAMAGES[name]
    damage(exported[1])
    with pytest.raises(ExportError, match=message) as error:
        loader.load(exported[1])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_without_flatbuffers_it_says_so(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ExportError, match="which is not here: pip install flatbuffers"):
        loader.load(exported[1])


def test_nothing_is_unpickled(exported, monkeypatch):
    """A pickle in the place of the program, or of the text, is not opened."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(exported[1] / "trapped"),))

    with_sum(exported[1], pickle.dumps(Trap()))
    with pytest.raises(ExportError):
        loader.load(exported[1])
    assert not (exported[1] / "trapped").exists()


@pytest.mark.slow
def test_it_runs_in_an_environment_of_jax_alone(exported, tmp_path, rng):
    """A fresh virtual environment; skipped where packages cannot be fetched."""
    source, _ = exported
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    wanted = ["flatbuffers", f"jax=={jax.__version__}", f"numpy=={np.__version__}"]
    fetched = subprocess.run(
        [python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True
    )
    if fetched.returncode:
        pytest.skip(f"pip cannot fetch jax: {fetched.stderr[-200:]}")
    images = rng.integers(0, 256, (5, *source.preprocessing.shape), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy; sys.path.insert(0, 'net'); import load;"
        "numpy.save('logits.npy', load.load('net')(numpy.load('images.npy')))"
    )
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    subprocess.run([python, "-c", code], cwd=tmp_path, env=kept, check=True)
    assert relative(np.load(tmp_path / "logits.npy"), own_logits(source, images)) < 1e-5
