"""Addresses of the hub, and the hashes of what its client has kept."""

import hashlib
import logging

import pytest

from flax_resnet.errors import UserError
from flax_resnet.pretrained import hub as files
from flax_resnet.pretrained import is_path
from flax_resnet.pretrained.hub import Repo, commit_of, fetch_file, fetch_optional, parse


@pytest.mark.parametrize(
    ("text", "repo"),
    [
        ("me/net", Repo("me/net")),
        ("hf://me/net", Repo("me/net")),
        ("hf://timm/resnet50.a1_in1k@refs/pr/1", Repo("timm/resnet50.a1_in1k", "refs/pr/1")),
        ("hf://me/net@" + "0" * 40, Repo("me/net", "0" * 40)),
    ],
)
def test_addresses(text, repo):
    assert parse(text) == repo
    assert parse(str(repo)) == repo
    assert is_path(str(repo))


@pytest.mark.parametrize(
    "text",
    ["", "net", "hf://net", "a/b/c", "a/b@", "a/b@c@d", "a/..", "a--b/c", "a /b", "https://x/y"],
)
def test_what_is_no_address(text):
    with pytest.raises(UserError, match="expected OWNER/NAME of a repository on the hub"):
        parse(text)


def test_small_files_have_the_hash_of_git(hub):
    commit = hub.add("me/net", {"config.json": b"{}"})
    path = fetch_file(Repo("me/net"), "config.json")
    assert path.read_bytes() == b"{}"
    assert path.resolve().name == hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert commit_of(path) == commit
    path.resolve().write_bytes(b"[]")
    with pytest.raises(UserError, match=r"hf://me/net: config\.json has the hash .* was altered"):
        fetch_file(Repo("me/net"), "config.json")
    assert not path.is_symlink()
    assert fetch_file(Repo("me/net"), "config.json").read_bytes() == b"{}"


def test_a_cache_without_links_is_used_with_a_warning(tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        files._verify(Repo("me/net"), path)
    assert "is used unverified" in caplog.text


def test_an_optional_file_is_missing_only_where_it_is(hub, monkeypatch):
    hub.add("me/net", {"config.json": b"{}"})
    assert fetch_optional(Repo("me/net"), "README.md") is None
    hub.close()
    with pytest.raises(UserError, match="is not reached"):
        fetch_optional(Repo("me/net"), "LICENSE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_optional(Repo("me/net"), "LICENSE") is None
