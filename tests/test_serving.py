"""The demo page: what it computes, one request to Gradio's server, and the command."""

import json
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from helpers import QUICK, assert_one_line_error
from PIL import Image
from prediction_helpers import SQUARE, make_weights, paint

from flax_resnet import inspection, serving
from flax_resnet.data.normalization import normalize
from flax_resnet.errors import UserError
from flax_resnet.inference.classifier import Classifier, predict_images
from flax_resnet.weights import Pretrained, open_weights

SERVE = pathlib.Path(__file__).parents[1] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    make_weights(path)
    return path


@pytest.fixture(scope="module")
def opened(weights):
    return open_weights(weights)


@pytest.mark.parametrize("name", ["a.jpg", "b.png", "f.gif"])
def test_the_page_says_what_predict_does_and_shows_grad_cam(opened, photos, name):
    of = Classifier(opened)
    (found,) = predict_images(opened, [photos / name])
    labels, overlay = serving.explain(of, photos / name)
    assert labels == dict(zip(found.names, found.probabilities, strict=True))
    pixels = opened.preprocessing((photos / name).read_bytes())
    maps, _, _ = inspection.grad_cam(
        of.module, of.variables, normalize(pixels[None], of.stats), [found.classes[0]]
    )
    (shares,) = inspection.heat(maps, 256, 256)
    assert (overlay.shape, overlay.dtype) == ((256, 256, 3), np.uint8)
    under = pixels.repeat(32, axis=0).repeat(32, axis=1).astype(int)
    colours = 2 * overlay.astype(int) - under
    hottest = np.unravel_index(shares.argmax(), shares.shape)
    assert colours[hottest][0] > 100 > colours[hottest][2]  # red


class Flat(nn.Module):
    """A network without a map."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(4, name="head")(images.reshape(len(images), -1))


def test_a_network_without_maps_has_no_grad_cam(photos):
    variables = Flat().init(jax.random.key(0), np.zeros((1, 8, 8, 3)))
    names = ("crane", "crane", "heron", "crane")
    flat = Pretrained(Flat(), variables, preprocessing=SQUARE, class_names=names)
    labels, overlay = serving.explain(Classifier(flat), photos / "a.jpg")
    assert overlay is None
    assert len(labels) == 4
    assert sum(labels.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"no picture"), "this image cannot be read"),
        (lambda path: Image.new("RGB", (40, 40)).save(path, "EPS"), "expected one of BMP, GIF"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "this image cannot be read"),
        (None, "no image: drop one"),
    ],
)
def test_a_file_that_is_no_image_is_one_line(opened, tmp_path, rng, write, message):
    path = tmp_path / "x.png"
    paint(rng, 50, 60).save(path)
    if write is not None:
        write(path)
    with pytest.raises(UserError, match=message):
        serving.explain(Classifier(opened), write and path)


CLIENT = """
import json, sys
import gradio_client, numpy as np
from PIL import Image
url, image, bad = sys.argv[1:]
client = gradio_client.Client(url, verbose=False)
label, picture = client.predict(gradio_client.handle_file(image))
try:
    client.predict(gradio_client.handle_file(bad))
except Exception as error:
    said = str(error)
print(json.dumps([label["confidences"], np.asarray(Image.open(picture)).tolist(), said]))
"""


@pytest.mark.slow
def test_a_request_is_answered(opened, weights, photos, tmp_path, clean_environment):
    """In processes of their own: Gradio leaves sockets open, and a warning would be an error."""
    pytest.importorskip("gradio", reason="the page needs the [serve] extra", exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = clean_environment | QUICK | {"GRADIO_TEMP_DIR": str(tmp_path)}
    proxied = environment | {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    answers = []
    words = ["serve", str(weights), "--port", str(port), "--no-browser"]
    command = [sys.executable, "-m", "flax_resnet", *words]
    process = subprocess.Popen(
        command, env=proxied, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        url, line = f"http://127.0.0.1:{port}", process.stdout.readline()
        assert line == f"ResNet: {url} (Ctrl-C ends it)\n", process.communicate()
        (tmp_path / "bad.png").write_bytes(b"no picture")
        files = [str(photos / "a.jpg"), str(tmp_path / "bad.png")]
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, url, *files],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        page = re.search(r"(?ms)^FILE=.*?(?=^```)", SERVE.read_text())[0]
        for file in files:
            curl = page.replace("http://127.0.0.1:7860", url).replace("PHOTO.jpg", file)
            answer = subprocess.check_output(["bash", "-euc", curl], env=environment)
            answers.append(json.loads(answer))
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        process.terminate()
        process.communicate()
    assert second.stderr == (
        f"error: port {port} of 127.0.0.1 cannot be used: try --port 0, or another --host\n"
    )
    found, picture, said = json.loads(done.stdout)
    assert answers[0]["data"][0]["confidences"] == found
    assert "cannot" in answers[1]["error"]
    labels, overlay = serving.explain(Classifier(opened), photos / "a.jpg")
    assert {c["label"]: c["confidence"] for c in found} == pytest.approx(labels, abs=1e-6)
    assert np.abs(np.array(picture) - overlay.astype(int)).max() <= 2  # QUICK's arithmetic
    assert "cannot" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected an argument, SOURCE"),
        (["w.safetensors", "--port", "70000"], "--port=70000: expected 0 or more, below 65536"),
        (["w.safetensors"], "pip install 'flax_resnet[serve]'"),
    ],
)
def test_bad_flags_are_one_line(call, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_one_line_error(call("serve", *arguments), message)
