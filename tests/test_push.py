"""``flax-resnet push``."""

import sys

import pytest
from helpers import assert_one_line_error

from flax_resnet.hub import CARD
from flax_resnet.pretrained.hub import CONFIG, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PUSH = ("push", "{net}", "me/new", "--license", "mit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PUSH[:2], "me/net@v1", *PUSH[3:]), "give it as the revision"),
        ((*PUSH[:2], "net", *PUSH[3:]), "'net': expected OWNER/NAME"),
        ((*PUSH[:4], "other"), "expected the licence's name and a link"),
        ((*PUSH[:4], "apache2"), 'Invalid metadata in README.md. - "license" must be known'),
        ((*PUSH, "--message", " "), "what the commit is to be"),
        (("push", "{tmp}/none.safetensors", *PUSH[2:]), "none.safetensors"),
        (("push", "{tmp}", *PUSH[2:]), "holds no run"),
        (("push", "{net}", "you/net", *PUSH[3:]), "hf://you/net cannot be pushed to (HfHubHTTP"),
    ],
)
def test_what_is_wrong_is_one_line(hub, net, tmp_path, call, words, message):
    result = call(*(word.format(net=net, tmp=tmp_path) for word in words))
    assert_one_line_error(result, message)


def test_a_push_and_its_dry_run(hub, net, tmp_path, call, monkeypatch):
    flags = ("--license", "other", "--license-name", "Mine", "--license-link", "https://x.org/l")
    dry = ("--dry-run", tmp_path / "dry")
    result = call("push", net, "me/net", *flags, *dry)
    assert result == (0, f"card: {tmp_path / 'dry' / CARD}\nnothing was uploaded\n", "")
    assert hub.seen == []
    wrote = {p.name: p.read_bytes() for p in (tmp_path / "dry").iterdir()}
    assert b"license_name: Mine" in wrote[CARD]
    code, out, err = call("push", net, "me/net", *flags, "--private")
    commit = hub.repositories["me/net"].branches["main"]
    assert (code, err) == (0, "")
    assert out == f"pushed: hf://me/net@{commit}\npage: {hub.url}/me/net\n"
    assert hub.repositories["me/net"].private
    files = hub.files("me/net")
    assert wrote == {name: files[name] for name in (WEIGHTS, CONFIG, CARD)}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    for words in (("push", net, "me/net", *flags, *dry), ("pull", "me/net", tmp_path / "x")):
        assert_one_line_error(call(*words), "pip install 'flax_resnet[hub]'")
