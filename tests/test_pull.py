"""``flax-resnet pull``."""

import pytest
from helpers import assert_one_line_error

from flax_resnet.pretrained.hub import WEIGHTS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("hf://me/none", "{tmp}/there"), "me/none cannot be downloaded (RepositoryNotF"),
        (("you/private", "{tmp}/there"), "you/private cannot be downloaded (RepositoryN"),
        (("me/net@never", "{tmp}/there"), "me/net@never cannot be downloaded (RevisionN"),
        (("me/pickled", "{tmp}/there"), "hf://me/pickled has no model.safetensors"),
        (("me/net", "{tmp}"), "is there already"),
        (("me/net", "{net}/below"), "cannot be written"),
        (("hf://me", "{tmp}/there"), "'hf://me': expected OWNER/NAME of a repository"),
        (("hf://me/../x", "{tmp}/there"), "expected OWNER/NAME"),
        (("a--b/c", "{tmp}/there"), "expected OWNER/NAME"),
    ],
)
def test_what_is_wrong_is_one_line(hub, net, tmp_path, call, words, message):
    hub.add("me/net", {WEIGHTS: net.read_bytes()})
    hub.add("me/pickled", {"pytorch_model.bin": b"evil"})
    hub.add("you/private", {WEIGHTS: net.read_bytes()}, private=True)
    result = call("pull", *(word.format(net=net, tmp=tmp_path) for word in words))
    assert_one_line_error(result, message)
    assert not (tmp_path / "there").exists()
