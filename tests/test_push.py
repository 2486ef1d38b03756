"""``python -m flax_resnet push``, and both commands in processes of their own."""

import subprocess
import sys

import pytest
from helpers import assert_one_line_error, assert_trees_equal
from inspection_helpers import tiny_run

from flax_resnet.hub import CARD, OURS
from flax_resnet.pretrained import open_weights
from flax_resnet.pretrained.hub import WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def run(digits_dir):
    return tiny_run(digits_dir)


def test_a_push_is_one_commit(hub, net, call):
    flags = ("--license", "mit", "--revision", "trial", "--message", "tried", "--private")
    code, out, err = call("push", net, "me/net", *flags)
    repo = hub.repositories["me/net"]
    assert (code, err) == (0, "")
    assert out == f"pushed: hf://me/net@{repo.branches['trial']}\npage: {hub.url}/me/net\n"
    assert (repo.private, repo.messages) == (True, ["initial commit", "tried"])
    assert set(hub.files("me/net")) == {".gitattributes"}
    assert_trees_equal(open_weights("hf://me/net@trial").variables, open_weights(net).variables)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{net}", "me/net", "--license", "apache2"], "did you mean 'apache-2.0'?"),
        (["{net}", "me/net", "--license", "other"], "expected both with 'other'"),
        (["{net}", "me/net@v1", "--license", "mit"], "give it as the revision"),
        (["{net}", "net", "--license", "mit"], "'net': expected OWNER/NAME"),
        (["{net}", "me/net", "--license", "mit", "--message", " "], "what the commit is to be"),
        (["{tmp}/none.safetensors", "me/net", "--license", "mit"], "none.safetensors"),
        (["{tmp}", "me/net", "--license", "mit"], "holds no run"),
    ],
)
def test_bad_pushes_are_one_line_and_ask_nothing(hub, net, tmp_path, call, arguments, message):
    result = call("push", *[a.format(net=net, tmp=tmp_path) for a in arguments])
    assert_one_line_error(result, message)
    assert hub.seen == []


def test_a_dry_run_asks_nothing(hub, run, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    flags = ("--license", "other", "--license-name", "Mine", "--license-link", "https://x.org/l")
    result = call("push", run, "me/digits", *flags, "--dry-run", tmp_path / "dry")
    assert result == (0, f"card: {tmp_path / 'dry' / CARD}\nnothing was uploaded\n", "")
    assert sorted(p.name for p in (tmp_path / "dry").iterdir()) == sorted(OURS)
    assert_trees_equal(
        open_weights(tmp_path / "dry" / WEIGHTS).variables, open_weights(run).variables
    )
    assert "license_name: Mine" in (tmp_path / "dry" / CARD).read_text()
    assert hub.seen == []
    assert_one_line_error(call("push", run, "me/digits", "--license", "mit"), "flax_resnet[hub]")
    assert_one_line_error(call("pull", "me/digits", tmp_path / "x"), "flax_resnet[hub]")


@pytest.mark.slow
def test_commands_in_processes_of_their_own(hub, run, tmp_path, clean_environment):
    environment = clean_environment | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_me",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def command(*arguments, **more):
        asked = [sys.executable, "-m", "flax_resnet", *map(str, arguments)]
        done = subprocess.run(asked, env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = command("push", run, "me/digits", "--license", "apache-2.0", "--private")
    commit = hub.repositories["me/digits"].branches["main"]
    assert out == f"pushed: hf://me/digits@{commit}\npage: {hub.url}/me/digits\n"
    assert command("pull", "me/digits", tmp_path / "there") == f"{tmp_path / 'there'}\n"
    hub.close()
    command("pull", "me/digits", tmp_path / "again", HF_HUB_OFFLINE="1")
    again = (tmp_path / "again" / WEIGHTS).read_bytes()
    assert again == (tmp_path / "there" / WEIGHTS).read_bytes() == hub.files("me/digits")[WEIGHTS]
