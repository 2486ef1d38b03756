"""An exported directory alone: it runs where only jax is, and damage is one line."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from exporting_helpers import batch, opened, own_logits, relative
from helpers import tiny_resnet
from PIL import Image
from sklearn.datasets import load_sample_image

import flax_resnet
from flax_resnet.data.decode import Decoder
from flax_resnet.data.preprocess import KERAS_V1, TORCH, Preprocessing
from flax_resnet.exporting import loader
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, WEIGHTS, ExportError
from flax_resnet.records.configs import to_record

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


DAMAGES = [
    (lambda d: (d / ARTIFACT).unlink(), "No such file"),
    (lambda d: (d / ABOUT).write_text("[]"), "TypeError"),
    (lambda d: changed(d, format="flax_resnet export 2"), "use the load.py there"),
    (lambda d: flip(d / WEIGHTS), "are not those that about.json desc"),
    (lambda d: changed(d, pickle.dumps(Trap())), "is no exported network that jax"),
]


def test_a_damaged_export_is_one_line_and_nothing_is_unpickled(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (damage, message) in enumerate(DAMAGES):
        directory = shutil.copytree(exported[1], tmp_path / str(number))
        damage(directory)
        with pytest.raises(ExportError, match=message) as error:
            loader.load(directory)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600
    assert not (tmp_path / "trapped").exists()


def test_a_jax_that_cannot_read_a_program_is_named_at_load(exported, monkeypatch):
    """jax 0.10 takes a program of jax 0.12 for whole until it is lowered."""

    def refuse(*arguments):
        raise ValueError("INVALID_ARGUMENT: Failed to deserialize StableHLO\nmore")

    monkeypatch.setattr(loader.jax, "jit", lambda call: types.SimpleNamespace(lower=refuse))
    changed(exported[1], jax="999.1")
    said = rf"by jax 999\.1, is no exported network that jax {jax.__version__} reads on cpu .*"
    with pytest.raises(ExportError, match=said + r"StableHLO\).*pip install 'jax>=999\.1'$"):
        loader.load(exported[1])


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_image("china.jpg")[:301, :427])


FILES = {
    "4:4:4": lambda photo: encoded(photo, "JPEG", subsampling=0, quality=60),
    "4:2:0": lambda photo: encoded(photo, "JPEG", subsampling=2),
    "progressive": lambda photo: encoded(photo, "JPEG", progressive=True, subsampling=1),
    "grey": lambda photo: encoded(photo.convert("L"), "JPEG"),
    "RGB": lambda photo: encoded(photo, "JPEG", keep_rgb=True),
    "CMYK": lambda photo: encoded(photo.convert("CMYK"), "JPEG"),
    "restarts": lambda photo: encoded(photo, "JPEG", restart_marker_rows=1),
    "bytes at the end": lambda photo: encoded(photo, "JPEG") + b"more",
    "tiny": lambda photo: encoded(photo.crop((0, 0, 9, 5)), "JPEG"),
    "PNG": lambda photo: encoded(photo, "PNG"),
    "palette": lambda photo: encoded(photo.convert("P"), "GIF"),
    "transparent": lambda photo: encoded(photo.convert("RGBA"), "WEBP"),
    "deep": lambda photo: encoded(Image.fromarray(np.arange(60000, dtype=np.uint16)
                                                  .reshape(200, 300)), "PNG"),
    "12 bits": lambda photo: encoded(Image.fromarray(np.full((50, 40), 4095, np.uint16)), "TIFF"),
    "clear": lambda photo: encoded(Image.new("RGBA", (50, 40), (0, 0, 0, 0)), "PNG"),
    **{f"{kind} turned by {n}": lambda photo, kind=kind, n=n: encoded(photo, kind, exif=turned(n))
       for kind in ("JPEG", "PNG") for n in range(2, 9)},
}  # fmt: skip
PREPARATIONS = {
    "run": Preprocessing(size=32, decoder=Decoder(3, 32)),
    "run, cropped and padded": Preprocessing(size=68, decoder=Decoder(3, 64, 0.875, pad=2)),
    "run, larger": Preprocessing(size=224, decoder=Decoder(3, 224, 0.9)),
    "run, grey": Preprocessing(
        size=40, channels=1, mean=(0.5,), std=(0.2,), decoder=Decoder(1, 40)
    ),
    "run, four channels": Preprocessing(
        size=24, channels=4, mean=(0.5,), std=(0.2,) * 4, decoder=Decoder(4, 24)
    ),
    "torchvision": TORCH,
    "Keras": KERAS_V1,
    "bicubic": Preprocessing(size=60, resize=70, interpolation="bicubic"),
}


@pytest.mark.parametrize("as_displayed", [False, True])
@pytest.mark.parametrize("how", PREPARATIONS)
def test_prepare_is_predicts_bit_for_bit(photo, how, as_displayed, tmp_path):
    prepared = PREPARATIONS[how]
    if prepared.decoder is None:
        prepared = dataclasses.replace(prepared, as_displayed=as_displayed)
    else:
        decoder = dataclasses.replace(prepared.decoder, as_displayed=as_displayed)
        prepared = dataclasses.replace(prepared, decoder=decoder)
    for name, encode in FILES.items():
        data = encode(photo)
        found = loader.prepare(data, to_record(prepared))
        np.testing.assert_array_equal(found, prepared(data), err_msg=name)
        (tmp_path / "x").write_bytes(data)
        for path in (tmp_path / "x", str(tmp_path / "x")):
            np.testing.assert_array_equal(loader.prepare(path, to_record(prepared)), found)


def test_a_photograph_goes_through_an_export_as_through_predict(exported, photo, tmp_path):
    source, directory = exported
    (tmp_path / "photo.jpg").write_bytes(encoded(photo, "JPEG"))
    net = loader.load(directory)
    logits = net(net.prepare(tmp_path / "photo.jpg")[None])
    wanted = flax_resnet.Classifier(source)(tmp_path / "photo.jpg", top=10)
    assert tuple(np.argsort(-logits[0])) == wanted.classes
    shares = np.sort(np.exp(logits[0]) / np.exp(logits[0]).sum())[::-1]
    np.testing.assert_allclose(shares, wanted.probabilities, rtol=1e-5)
