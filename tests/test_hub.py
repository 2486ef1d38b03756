"""Push and pull, against a stand-in for the hub on loopback."""

import dataclasses
import hashlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_one_line_error, assert_trees_equal
from inspection_helpers import tiny_config, tiny_run
from PIL import Image
from prediction_helpers import make_weights

import flax_resnet
from flax_resnet.errors import UserError
from flax_resnet.hub import CARD, CONFIG, OURS, RESULT, write_repository
from flax_resnet.licenses import License
from flax_resnet.predict import predict
from flax_resnet.pretrained import open_weights
from flax_resnet.pretrained.hub import WEIGHTS

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs [hub]")
# The client's own: it sends large files by an argument that its HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run(digits_dir):
    return tiny_run(digits_dir)


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "hf" / "hub").rglob("blobs/*"))


def test_a_run_goes_there_and_comes_back_to_the_bit(hub, run, rng):
    address = flax_resnet.push_to_hub(run, "me/digits", license="apache-2.0", message="first")
    repo = hub.repositories["me/digits"]
    assert address == f"hf://me/digits@{repo.branches['main']}"
    assert repo.messages == ["initial commit", "first"]
    assert set(hub.files("me/digits")) == {".gitattributes", *OURS}
    assert {path for path, file in repo.commits[address[-40:]].items() if file.lfs} == {WEIGHTS}

    here, there = open_weights(run), open_weights("hf://me/digits")
    assert (there.module, there.class_names) == (here.module, here.class_names)
    assert there.preprocessing == here.preprocessing
    assert_trees_equal(there.variables, here.variables)
    images = jnp.asarray(rng.normal(size=(3, 8, 8, 1)), jnp.float32)
    np.testing.assert_array_equal(
        there.module.apply(there.variables, images), here.module.apply(here.variables, images)
    )


def test_load_takes_an_address(hub, net, rng):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    module, variables = flax_resnet.read_weights(net)
    own = ("stage_sizes", "num_filters", "stem", "block_cls", "shortcut")
    fields = {name: getattr(module, name) for name in own}
    loaded, found = flax_resnet.load(
        "resnet20", weights="hf://me/net", input_shape=(32, 32, 3), **fields
    )
    assert_trees_equal(found, variables)
    assert loaded.num_classes == module.num_classes
    assert flax_resnet.preprocessing("resnet20", "hf://me/net") == open_weights(net).preprocessing


def test_what_is_pushed_says_what_it_is(hub, run):
    flax_resnet.push_to_hub(run, "me/digits", license="apache-2.0")
    files = hub.files("me/digits")
    assert json.loads(files[RESULT]) == json.loads((run / RESULT).read_text())
    config = json.loads(files[CONFIG])
    record = json.loads((run / CONFIG).read_text())
    assert config["training"] == record
    assert config["model"]["class"] == "flax_resnet.models.resnet:ResNet"
    assert (config["num_classes"], config["input_shape"]) == (10, [8, 8, 1])
    card = huggingface_hub.ModelCard(files[CARD].decode())
    (top1, top5, loss) = card.data.eval_results
    result = json.loads(files[RESULT])
    assert [r.metric_value for r in (top1, top5, loss)] == [
        result[name] for name in ("top1", "top5", "loss")
    ]
    assert (top1.dataset_name, top1.dataset_split) == ("sklearn_digits", "test")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "flax_resnet")


def test_home_is_nobodys_business(hub, run, tmp_path, monkeypatch):
    own = shutil.copytree(run, tmp_path / "own")
    record = json.loads((own / CONFIG).read_text())
    record["config"]["data"]["data_dir"] = "/home/someone/sets"
    record["starts"][0]["argv"] = ["/home/someone/x/experiments/digits.py", "--data.data-dir",
                                   "/home/someone/my sets"]  # fmt: skip
    (own / CONFIG).write_text(json.dumps(record))
    monkeypatch.setenv("HOME", "/home/someone")
    flax_resnet.push_to_hub(own, "me/digits", license="apache-2.0")
    files = hub.files("me/digits")
    assert not any(b"someone" in data for data in files.values())
    assert b"python -m experiments.digits --data.data-dir ~/'my sets'" in files[CARD]


def test_a_second_push_is_a_commit_and_the_first_one_stays(hub, run, net):
    first = flax_resnet.push_to_hub(run, "me/net", license="apache-2.0")
    second = flax_resnet.push_to_hub(net, "me/net", license="apache-2.0")
    repo = hub.repositories["me/net"]
    assert len(repo.messages) == 3
    # The record of the run is not that of the file.
    assert set(hub.files("me/net")) == {".gitattributes", WEIGHTS, CONFIG, CARD}
    assert open_weights(first).module == open_weights(run).module
    assert open_weights(second).module == open_weights(net).module
    assert_trees_equal(open_weights(first).variables, open_weights(run).variables)
    assert len(hub.asked("PUT", "/storage/")) == 2
    assert flax_resnet.push_to_hub(net, "me/net", license="apache-2.0") == second
    assert len(repo.messages) == 3
    assert len(hub.asked("PUT", "/storage/")) == 2


def test_a_branch_of_its_own(hub, net, run):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    for _ in range(2):
        flax_resnet.push_to_hub(run, "me/net", license="mit", revision="trial")
    assert open_weights("hf://me/net").module == open_weights(net).module
    assert open_weights("hf://me/net@trial").module == open_weights(run).module
    assert RESULT not in hub.files("me/net")


def test_a_private_one_is_private(hub, net, call, monkeypatch):
    flax_resnet.push_to_hub(net, "me/net", license="mit", private=True)
    assert hub.repositories["me/net"].private
    command = ("convert", "hf://me/net", net.with_name("copy.safetensors"))
    for token, status in (("", 401), ("hf_other", 404)):
        monkeypatch.setenv("HF_TOKEN", token)
        assert_one_line_error(call(*command), f"private and not yours (HTTP {status})")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    assert call(*command)[0] == 0
    assert_trees_equal(
        open_weights(net.with_name("copy.safetensors")).variables, open_weights(net).variables
    )


def test_the_token_is_shown_to_the_hub_alone(hub, net):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    open_weights("hf://me/net")
    stored = [r for r in hub.seen if r.path.startswith("/storage/")]
    assert {r.method for r in stored} == {"PUT", "GET"}
    assert {r.authorization for r in stored} == {""}
    assert {r.authorization for r in hub.seen if r not in stored} == {"Bearer hf_me"}


def test_weights_of_others_open_as_files_do(hub, tmp_path):
    from safetensors.numpy import load_file, save

    make_weights(tmp_path / "a.safetensors")
    plain = save(load_file(tmp_path / "a.safetensors"))
    (tmp_path / "plain.safetensors").write_bytes(plain)
    hub.add("someone/net", {"model.safetensors": plain, "config.json": b"{}"})
    there, here = open_weights("hf://someone/net"), open_weights(tmp_path / "plain.safetensors")
    assert (there.module, there.certain) == (here.module, False)
    assert_trees_equal(there.variables, here.variables)


def test_a_repository_that_has_a_tag_is_prepared_as_the_tag_says(hub, tmp_path):
    from safetensors.numpy import load_file, save

    make_weights(tmp_path / "a.safetensors", stem="imagenet", num_classes=1000)
    plain = save(load_file(tmp_path / "a.safetensors"))
    hub.add("timm/resnet50.a1_in1k", {WEIGHTS: plain})
    opened = open_weights("hf://timm/resnet50.a1_in1k")
    assert opened.preprocessing == flax_resnet.preprocessing("resnet50", "timm/a1")
    assert opened.class_names[0] == "tench"


def test_a_flipped_bit_is_an_error_and_is_not_kept(hub, net, call, tmp_path):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    hub.flip = 1000
    pull = ("pull", "me/net", tmp_path / "there")
    assert_one_line_error(call(*pull), "was altered or cut short, and was removed from the cache")
    assert cached(tmp_path) == []
    assert not (tmp_path / "there").exists()
    hub.flip = None
    assert call(*pull) == (0, f"{tmp_path / 'there'}\n", "")
    assert (tmp_path / "there" / WEIGHTS).read_bytes() == hub.files("me/net")[WEIGHTS]


def test_a_file_that_was_altered_here_is_seen(hub, net, tmp_path, monkeypatch):
    address = flax_resnet.push_to_hub(net, "me/net", license="mit")
    open_weights(address)
    sha256 = hashlib.sha256(hub.files("me/net")[WEIGHTS]).hexdigest()
    (blob,) = (tmp_path / "hf" / "hub").rglob(f"blobs/{sha256}")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(UserError, match=f"not {sha256}: it was altered"):
        open_weights(address)
    assert_trees_equal(open_weights(address).variables, open_weights(net).variables)


def test_a_download_that_breaks_off_goes_on(hub, net, monkeypatch):
    # What the client writes down at a time, 10 MB, and so what a break takes with it.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    size = len(hub.files("me/net")[WEIGHTS])
    hub.cuts = [2000, 100]
    opened = open_weights("hf://me/net")
    gets = hub.asked("GET", "/storage/")
    assert [r.range for r in gets] == ["", "bytes=2000-", "bytes=2100-"]
    assert [r.sent for r in gets] == [2000, 100, size - 2100]
    assert_trees_equal(opened.variables, open_weights(net).variables)


def test_one_that_keeps_breaking_off_leaves_nothing(hub, net, tmp_path):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    hub.cuts = [500] + [0] * 20
    with pytest.raises(UserError, match=r"model\.safetensors cannot be downloaded: RemoteProtocol"):
        open_weights("hf://me/net")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("variable", ["FLAX_RESNET_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_the_cache_is_enough(hub, net, tmp_path, call, monkeypatch, variable):
    address = flax_resnet.push_to_hub(net, "me/net", license="mit")
    flax_resnet.pull_from_hub("me/net", tmp_path / "first")
    asked = len(hub.seen)
    monkeypatch.setenv(variable, "1")
    for given in ("hf://me/net", address):
        assert_trees_equal(open_weights(given).variables, open_weights(net).variables)
    flax_resnet.pull_from_hub("me/net", tmp_path / "second")
    names = [WEIGHTS, CONFIG, CARD]
    for name in names:
        first, second = (tmp_path / d / name for d in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in (tmp_path / "second").iterdir()) == sorted(names)
    assert len(hub.seen) == asked
    flags = ("--size", "8", "--mean", "0.5", "--std", "0.5")
    result = call("convert", "hf://me/unknown", tmp_path / "x.safetensors", *flags)
    assert_one_line_error(result, f"it is not in {tmp_path / 'hf' / 'hub'} and {variable} is set")
    with pytest.raises(UserError, match=f"cannot be pushed to, {variable} is set"):
        flax_resnet.push_to_hub(net, "me/net", license="mit")
    assert len(hub.seen) == asked


def test_without_a_network_the_cache_is_enough(hub, net):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    open_weights("hf://me/net")
    hub.close()
    assert_trees_equal(open_weights("hf://me/net").variables, open_weights(net).variables)
    with pytest.raises(UserError, match=f"{hub.url} is not reached .*refused.* not in .*later"):
        open_weights("hf://me/other")
    with pytest.raises(UserError, match="hf://me/net cannot be pushed to: ConnectError"):
        flax_resnet.push_to_hub(net, "me/net", license="mit")


def test_pull_takes_one_commit(hub, run, net, tmp_path):
    address = flax_resnet.push_to_hub(run, "me/net", license="mit")
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    hub.add("me/net", {**hub.files("me/net"), "LICENSE": b"mine", "pickled.bin": b"evil"})
    old = flax_resnet.pull_from_hub(address, tmp_path / "old")
    new = flax_resnet.pull_from_hub("hf://me/net", str(tmp_path / "deep" / "new"))
    assert {p.name: p.read_bytes() for p in old.iterdir()} == {
        name: hub.files("me/net", address[-40:])[name] for name in OURS
    }
    assert sorted(p.name for p in new.iterdir()) == sorted([WEIGHTS, CONFIG, CARD, "LICENSE"])
    assert not any(p.is_symlink() for p in [*old.iterdir(), *new.iterdir()])
    # Everything after the first file is asked for by its commit.
    asked = [r.path for r in hub.asked("HEAD", "/resolve/") if "/main/" in r.path]
    assert asked == [f"/me/net/resolve/main/{WEIGHTS}"]
    with pytest.raises(UserError, match="old is there already"):
        flax_resnet.pull_from_hub("me/net", old)


def test_statuses_are_said(hub, net, monkeypatch):
    hub.down = 503
    with pytest.raises(UserError, match=r"is not reached .*503 Service Unavailable"):
        open_weights("hf://me/net")
    hub.down = None
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"Invalid credentials .*\(HTTP 401\): set HF_TOKEN, or"):
        flax_resnet.push_to_hub(net, "me/net", license="mit")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match=r"no rights in the namespace me \(HTTP 403\)"):
        flax_resnet.push_to_hub(net, "me/net", license="mit")
    assert hub.repositories == {}


def test_a_full_disk_is_one_line(hub, net, monkeypatch):
    import errno

    from huggingface_hub import file_download

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    flax_resnet.push_to_hub(net, "me/net", license="mit")
    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(UserError, match="No space left on device: free space, or set HF_HUB_CACHE"):
        open_weights("hf://me/net")


def test_what_a_dry_run_wrote_is_what_a_push_uploads(hub, run, tmp_path):
    paths = write_repository(run, "me/digits", tmp_path, license=License("mit"))
    flax_resnet.push_to_hub(run, "me/digits", license="mit")
    files = hub.files("me/digits")
    assert {p.name: p.read_bytes() for p in paths} == {name: files[name] for name in OURS}


def test_weights_are_pushed_as_they_were_opened(hub, net):
    opened = dataclasses.replace(open_weights(net), class_names=tuple("abcdefghij"[:3]))
    address = flax_resnet.push_to_hub(opened, "me/net", license="mit")
    assert open_weights(address).class_names == opened.class_names
    assert b"published without the record of a run" in hub.files("me/net")[CARD]


def test_a_run_starts_from_an_address_and_says_so(hub, run, digits_dir, tmp_path, mesh):
    address = flax_resnet.push_to_hub(run, "me/digits", license="mit")
    config = tiny_config(digits_dir, weights=address, num_steps=1)
    flax_resnet.train_and_evaluate(config, tmp_path / "on", mesh=mesh)
    flax_resnet.push_to_hub(tmp_path / "on", "me/on", license="mit")
    card = huggingface_hub.ModelCard(hub.files("me/on")[CARD].decode())
    assert card.data.base_model == "me/digits"
    escaped = address.replace("://", r"\://").replace("@", r"\@")
    assert f"trained from {escaped}, whose" in card.text


def test_the_python_of_the_card_runs(hub, run, tmp_path, monkeypatch, capsys):
    flax_resnet.push_to_hub(run, "me/digits", license="mit")
    code = hub.files("me/digits")[CARD].decode().split("```python\n")[1].split("```")[0]
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = open_weights(run)
    (expected,) = predict(found, [tmp_path / "photo.png"], top=3)
    assert capsys.readouterr().out == f"{expected.names} {expected.probabilities}\n"
