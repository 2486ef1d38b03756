"""An exported directory alone: it runs where only jax is, and damage is one line."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from exporting_helpers import batch, opened, own_logits, relative
from helpers import tiny_resnet

import flax_resnet
from flax_resnet.exporting import loader
from flax_resnet.exporting.loader import ABOUT, ARTIFACT, WEIGHTS, ExportError

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
    (lambda d: flip(d / ARTIFACT), "are not those that about.json describes"),
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
