"""Downloads of torchvision's and Keras's files: continued, verified, refused."""

import hashlib
import stat
import sys
import threading

import numpy as np
import pytest

from flax_resnet.errors import UserError
from flax_resnet.records.files import cache_dir
from flax_resnet.weights.published import Published
from flax_resnet.weights.published_cache import CHUNK, fetch

DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
MD5 = hashlib.md5(DATA).hexdigest()


@pytest.fixture
def host(hub, tmp_path, monkeypatch):
    """A file server, and a cache of the test's own."""
    pytest.importorskip("pooch", reason="needs [hub]")
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "cache"))
    hub.uploaded["a.pth"] = DATA
    return hub


def entry(host, checksum=f"sha256:{SHA256[:8]}"):
    return Published("resnet50", "tv_v2", f"{host.files_url}/a.pth", "a.pth", checksum)


def names():
    return sorted(p.name for p in (cache_dir() / "weights").glob("*"))


@pytest.mark.parametrize("checksum", [f"sha256:{SHA256[:8]}", f"md5:{MD5}"])
def test_a_file_is_downloaded_once_and_needs_no_network_then(host, monkeypatch, capfd, checksum):
    path = fetch(entry(host, checksum))
    assert path == cache_dir() / "weights" / "a.pth"
    assert path.read_bytes() == DATA
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    assert names() == ["a.pth"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(entry(host, checksum)) == path
    assert [r.authorization for r in host.seen] == [""]
    assert capfd.readouterr() == ("", "")


def test_a_download_that_breaks_off_goes_on_where_it_was(host):
    host.cuts = [CHUNK, CHUNK, 0]
    with pytest.raises(UserError, match=r"cannot be downloaded .*IncompleteRead"):
        fetch(entry(host))
    assert names() == ["a.pth.partial"]
    assert fetch(entry(host)).read_bytes() == DATA  # as a later process
    assert [r.range for r in host.seen] == [f"bytes={n * CHUNK}-" for n in (0, 1, 2, 2)]
    assert sum(r.sent for r in host.seen) == len(DATA)
    assert names() == ["a.pth"]


@pytest.mark.parametrize("partial", [DATA, DATA + b"more", b"other" * CHUNK, b"x"])
def test_a_partial_file_of_whatever_is_never_spliced(host, partial):
    (cache_dir() / "weights").mkdir(parents=True)
    (cache_dir() / "weights" / "a.pth.partial").write_bytes(partial)
    assert fetch(entry(host)).read_bytes() == DATA
    assert names() == ["a.pth"]


def test_a_wrong_hash_is_refused_and_nothing_is_left(host):
    host.flip = 1000
    with pytest.raises(UserError, match=rf"has the sha256 [0-9a-f]{{64}}, not {SHA256[:8]}\.\.\."):
        fetch(entry(host))
    assert names() == []


@pytest.mark.parametrize("damaged", [DATA[:-1], DATA[:-1] + b"x"])
def test_a_file_in_the_cache_that_is_another_is_never_used(host, damaged):
    (cache_dir() / "weights").mkdir(parents=True)
    (cache_dir() / "weights" / "a.pth").write_bytes(damaged)
    with pytest.raises(UserError, match=f"not {SHA256[:8]}.*delete it, or save http"):
        fetch(entry(host))
    assert host.seen == []


def test_what_cannot_be_downloaded_is_one_line(host, monkeypatch):
    path = cache_dir() / "weights" / "a.pth"
    start = f"weights 'tv_v2' of resnet50 are not on this machine and {host.files_url}/a.pth cannot"
    end = f"get it elsewhere and save it as {path}, or give the path of a file"

    def said():
        with pytest.raises(UserError) as caught:
            fetch(entry(host))
        text = str(caught.value)
        assert text.startswith(start)
        assert text.endswith(end)
        assert not path.exists()
        return text

    del host.uploaded["a.pth"]
    assert "404 Client Error" in said()
    host.close()
    assert "Connection refused" in said()
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "pooch", None)
        assert "pip install 'flax_resnet[hub]', or get it elsewhere" in said()
    monkeypatch.setenv("FLAX_RESNET_OFFLINE", "1")
    assert "FLAX_RESNET_OFFLINE is set" in said()
    monkeypatch.delenv("FLAX_RESNET_OFFLINE")
    monkeypatch.setenv("FLAX_RESNET_CACHE", __file__)
    with pytest.raises(UserError, match=r"cannot be downloaded .*Not a directory"):
        fetch(entry(host))


def test_those_who_want_one_file_at_once_download_it_once(host):
    paths = []
    ask = [threading.Thread(target=lambda: paths.append(fetch(entry(host)))) for _ in range(4)]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert paths == [cache_dir() / "weights" / "a.pth"] * 4
    assert len(host.seen) == 1


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_RESNET_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("FLAX_RESNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "flax_resnet"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == tmp_path / ".cache" / "flax_resnet"
