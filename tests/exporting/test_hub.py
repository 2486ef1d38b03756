"""Push and pull against a stand-in for the hub on loopback; weights from hf:// addresses."""

import dataclasses
import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
from helpers import assert_one_line_error, assert_trees_equal
from inspection_helpers import tiny_run
from PIL import Image
from prediction_helpers import make_weights
from safetensors.numpy import load_file, save
from weights_helpers import TIMM

import flax_resnet
from flax_resnet.data.preprocess import TORCH
from flax_resnet.errors import Note, UserError
from flax_resnet.exporting.hub import CARD, RESULT
from flax_resnet.inference.classifier import predict_images
from flax_resnet.weights import open_weights
from flax_resnet.weights.hub import CONFIG, WEIGHTS, parse

OURS = (WEIGHTS, CONFIG, CARD)
pytest.importorskip("huggingface_hub", reason="needs [hub]")
# The client's own: it sends large files by an argument that its HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run(digits_dir):
    return tiny_run(digits_dir)


def test_a_run_goes_there_and_comes_back_to_the_bit(hub, run, tmp_path):
    address = flax_resnet.push_to_hub(run, "me/digits", license="apache-2.0")
    assert address == f"hf://me/digits@{hub.branches['me/digits', 'main']}"
    assert parse(address) == ("me/digits", hub.branches["me/digits", "main"])
    files = hub.files("me/digits")
    assert set(files) == {".gitattributes", *OURS}
    config = json.loads(files[CONFIG])
    assert config["training"] == json.loads((run / CONFIG).read_text())
    assert config["result"] == json.loads((run / RESULT).read_text())

    flax_resnet.pull_from_hub("me/digits", tmp_path / "deep" / "there")
    pulled = {p.name: p.read_bytes() for p in (tmp_path / "deep" / "there").iterdir()}
    assert pulled == {name: files[name] for name in OURS}
    here, names = open_weights(run), {}
    exec(files[CARD].decode().split("```python\n")[1].split("```")[0], names)
    pulled = open_weights(tmp_path / "deep" / "there" / WEIGHTS)
    for there in (open_weights(address), pulled, names["opened"]):
        assert (there.module, there.class_names) == (here.module, here.class_names)
        assert there.preprocessing == here.preprocessing
        assert_trees_equal(there.variables, here.variables)
    # The large files' host is shown no token, the hub always.
    stored = [r for r in hub.seen if r.path.startswith("/files/")]
    assert {r.method for r in stored} == {"PUT", "GET"}
    assert {r.authorization for r in stored} == {""}
    assert {r.authorization for r in hub.seen if r not in stored} == {"Bearer hf_me"}


OLDER = """from pathlib import Path

from flax_resnet.predict import predict
from flax_resnet.pretrained import open_weights

opened = open_weights("hf://me/digits")
for found in predict(opened, [Path("photo.png")], top=3):
    print(found.names, found.probabilities)
"""


def test_the_python_of_older_cards_still_runs(hub, run, tmp_path, monkeypatch, capsys):
    flax_resnet.push_to_hub(run, "me/digits", license="mit")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save("photo.png")
    exec(OLDER, {})
    assert capsys.readouterr().out.count("'") == 6  # three names


def test_a_second_push_is_a_commit_and_the_first_one_stays(hub, run, net):
    first = flax_resnet.push_to_hub(run, "me/net", license="mit")
    hub.add("me/net", hub.files("me/net") | {RESULT: b"{}"})  # of an earlier version
    second = flax_resnet.push_to_hub(net, "me/net", license="mit")
    # The record of the run is not that of the file.
    assert set(hub.files("me/net")) == {".gitattributes", *OURS}
    for address, source in ((first, run), (second, net), ("hf://me/net", net)):
        assert_trees_equal(open_weights(address).variables, open_weights(source).variables)
    flax_resnet.push_to_hub(run, "me/net", license="mit", revision="trial")
    assert_trees_equal(open_weights("hf://me/net@trial").variables, open_weights(run).variables)


def test_home_is_nobodys_business(hub, run, tmp_path, monkeypatch):
    own = shutil.copytree(run, tmp_path / "own")
    record = json.loads((own / CONFIG).read_text())
    record["config"]["data"]["data_dir"] = "/home/someone/sets"
    record["starts"][0]["argv"] = ["/home/someone/x.py", "/home/someone/my sets", "/home/someones"]
    (own / CONFIG).write_text(json.dumps(record))
    monkeypatch.setenv("HOME", "/home/someone")
    flax_resnet.push_to_hub(own, "me/digits", license="mit")
    files = hub.files("me/digits")
    assert b'"data_dir": "~/sets"' in files[CONFIG]
    argv = json.loads(files[CONFIG])["training"]["starts"][0]["argv"]
    assert argv == ["~/x.py", "~/my sets", "/home/someones"]
    assert not any(b"/home/someone/" in data for data in files.values())


def test_timms_weights_are_prepared_as_their_config_says(hub, tmp_path, rng):
    make_weights(tmp_path / "a.safetensors", stem="imagenet", num_classes=1000)
    plain = save(load_file(tmp_path / "a.safetensors"))
    config = {"architecture": "resnet50", "num_classes": 1000, "pretrained_cfg": TIMM}
    hub.add("timm/resnet50.new_in1k", {WEIGHTS: plain, CONFIG: json.dumps(config).encode()})
    prepared = flax_resnet.preprocessing("resnet50", "timm/new")
    assert (prepared.size, prepared.resize, prepared.interpolation) == (288, 288, "bicubic")
    flax_resnet.pull_from_hub("timm/resnet50.new_in1k", tmp_path / "there")
    (tmp_path / "alone.safetensors").write_bytes(plain)
    with pytest.warns(Note, match="nothing says how images are prepared"):
        taken = open_weights(tmp_path / "alone.safetensors").preprocessing
    assert taken == dataclasses.replace(TORCH, as_displayed=True)
    Image.fromarray(rng.integers(0, 256, (300, 320, 3), np.uint8)).save(tmp_path / "a.png")
    for weights in ("hf://timm/resnet50.new_in1k", tmp_path / "there" / WEIGHTS):
        opened = open_weights(weights)
        assert (opened.preprocessing, opened.class_names[0]) == (prepared, "tench")
        (answer,) = predict_images(opened, [tmp_path / "a.png"], top=1)
        assert len(answer.names) == 1
    # The tag's network is the one of its name, whatever the shapes might also fit.
    opened = open_weights("timm/new", "resnet50")
    assert (opened.network, opened.certain, opened.preprocessing) == ("resnet50", True, prepared)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_file_that_was_altered_is_found_and_is_not_kept(hub, net, tmp_path, name):
    address = flax_resnet.push_to_hub(net, "me/net", license="mit")
    open_weights(address)
    (path,) = (tmp_path / "hf" / "hub").rglob(f"snapshots/*/{name}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} has the hash [0-9a-f]+, not .* was altered"):
        open_weights(address)
    assert not path.is_symlink()
    assert_trees_equal(open_weights(address).variables, open_weights(net).variables)


def test_a_byte_that_is_sent_wrong_is_found(hub, net, call, tmp_path):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    hub.flip = 1000
    pull = ("pull", "me/net", tmp_path / "there")
    assert_one_line_error(call(*pull), "was altered or cut short, and was removed from the cache")
    sha256 = hashlib.sha256(hub.files("me/net")[WEIGHTS]).hexdigest()
    assert not [*(tmp_path / "hf").rglob(sha256)]
    assert not (tmp_path / "there").exists()
    hub.flip = None
    assert call(*pull) == (0, f"{tmp_path / 'there'}\n", "")
    assert (tmp_path / "there" / WEIGHTS).read_bytes() == hub.files("me/net")[WEIGHTS]


@pytest.mark.parametrize("variable", ["FLAX_RESNET_OFFLINE", None])
def test_offline_the_cache_is_enough(hub, net, tmp_path, call, monkeypatch, variable):
    address = flax_resnet.push_to_hub(net, "me/net", license="mit")
    first = flax_resnet.pull_from_hub("me/net", tmp_path / "first")
    asked = len(hub.seen)
    hub.close() if variable is None else monkeypatch.setenv(variable, "1")
    for weights in ("hf://me/net", address):
        assert_trees_equal(open_weights(weights).variables, open_weights(net).variables)
    second = flax_resnet.pull_from_hub("me/net", tmp_path / "second")
    for name in OURS:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    said = f"hf://me/other cannot be downloaded{f', {variable} is set' if variable else ''} (Local"
    assert_one_line_error(call("pull", "me/other", tmp_path / "x"), said)
    with pytest.raises(UserError, match="me/net cannot be pushed to"):
        flax_resnet.push_to_hub(net, "me/net", license="mit")
    assert len(hub.seen) == asked


def test_a_repository_of_before_is_read(hub, net, tmp_path):
    """Its config.json and its card had more in them."""
    config = b'{"library_name": "flax_resnet", "architecture": "ResNet", "training": null}'
    card = b"---\nlicense: mit\n---\n\n# net\n\n## Network\n\n| | |\n| --- | --- |\n| a | b |\n"
    files = {WEIGHTS: net.read_bytes(), CONFIG: config, CARD: card, RESULT: b'{"top1": 0.5}'}
    hub.add("me/old", files)
    assert_trees_equal(open_weights("hf://me/old").variables, open_weights(net).variables)
    folder = flax_resnet.pull_from_hub("me/old", tmp_path / "old")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_push_and_its_dry_run(hub, net, tmp_path, call, monkeypatch):
    push = ("push", net, "me/net", "--license", "mit")
    dry = (*push, "--dry-run", tmp_path / "dry")
    assert call(*dry) == (0, f"card: {tmp_path / 'dry' / CARD}\nnothing was uploaded\n", "")
    assert hub.seen == []
    wrote = {p.name: p.read_bytes() for p in (tmp_path / "dry").iterdir()}
    code, out, err = call(*push, "--private")
    assert (code, err) == (0, "")
    assert out == f"pushed: hf://me/net@{hub.branches['me/net', 'main']}\n"
    assert hub.private == {"me/net"}
    files = hub.files("me/net")
    assert wrote == {name: files[name] for name in OURS}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    for words in (dry, ("pull", "me/net", tmp_path / "x")):
        assert_one_line_error(call(*words), "pip install 'flax_resnet[hub]'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("push {net} me/net@v1 --license mit", "give it as the revision"),
        ("push {net} net --license mit", "'net': expected OWNER/NAME"),
        ("push {net} me/new --license apache2", 'README.md. - "license" must be known'),
        ("push {tmp}/none.safetensors me/new --license mit", "none.safetensors"),
        ("push {tmp} me/new --license mit", "holds no run"),
        ("push {net} you/net --license mit", "hf://you/net cannot be pushed to (HfHubHTTP"),
        ("pull hf://me/none {tmp}/there", "me/none cannot be downloaded (RepositoryNotF"),
        ("pull you/private {tmp}/there", "you/private cannot be downloaded (RepositoryN"),
        ("pull me/net@never {tmp}/there", "me/net@never cannot be downloaded (RevisionN"),
        ("pull me/pickled {tmp}/there", "hf://me/pickled has no model.safetensors"),
        ("pull me/net {tmp}", "is there already"),
        ("pull me/net {net}/below", "cannot be written"),
        ("pull hf://me {tmp}/there", "'hf://me': expected OWNER/NAME of a repository"),
        ("pull a--b/c {tmp}/there", "a--b/c cannot be downloaded (HFValidationError)"),
    ],
)
def test_what_is_wrong_is_one_line(hub, net, tmp_path, call, words, message):
    for name in ("me/net", "you/private"):
        hub.add(name, {WEIGHTS: net.read_bytes()})
    hub.private.add("you/private")
    hub.add("me/pickled", {"pytorch_model.bin": b"evil"})
    result = call(*(word.format(net=net, tmp=tmp_path) for word in words.split()))
    assert_one_line_error(result, message)
    assert not (tmp_path / "there").exists()
