"""``python -m flax_resnet pull``."""

import pytest
from helpers import assert_one_line_error

import flax_resnet
from flax_resnet.hub import CARD, CONFIG
from flax_resnet.pretrained.hub import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_it_says_where_the_files_are(hub, net, call, tmp_path):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    assert call("pull", "me/net", tmp_path / "a" / "b") == (0, f"{tmp_path / 'a' / 'b'}\n", "")
    files = {p.name: p.read_bytes() for p in (tmp_path / "a" / "b").iterdir()}
    assert files == {name: hub.files("me/net")[name] for name in (WEIGHTS, CONFIG, CARD)}
    asked = len(hub.seen)
    assert_one_line_error(call("pull", "me/net", tmp_path / "a"), "a is there already")
    assert len(hub.seen) == asked


def test_a_directory_that_cannot_be_made(hub, net, call, tmp_path):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    assert_one_line_error(call("pull", "me/net", net / "below"), "cannot be written")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://me/none", "there is no such repository at http://127.0.0.1:"),
        ("hf://me/gated", "it is gated (HTTP 403): ask for access at http://127.0.0.1:"),
        ("hf://me/net@never", "there is no revision 'never': expected a branch, a tag or a commit"),
        ("hf://me/pickled", "model.safetensors cannot be downloaded: there is no such file in it"),
        ("hf://me", "'hf://me': expected OWNER/NAME of a repository on the hub"),
        ("hf://me/../x", "expected OWNER/NAME"),
        ("hf://me/net/model.bin", "expected OWNER/NAME"),
    ],
)
def test_what_cannot_be_had_is_one_line(hub, net, tmp_path, call, address, message):
    flax_resnet.push_to_hub(net, "me/net", license="mit")
    hub.add("me/gated", {WEIGHTS: net.read_bytes()}, gated=True)
    hub.add("me/pickled", {"pytorch_model.bin": b"evil"})
    assert_one_line_error(call("pull", address, tmp_path / "there"), message)
    assert not (tmp_path / "there").exists()
