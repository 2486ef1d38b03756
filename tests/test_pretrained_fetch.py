import contextlib
import hashlib
import http.server
import io
import logging
import os
import re
import stat
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from flax_resnet.errors import UserError
from flax_resnet.preprocess import TORCH
from flax_resnet.pretrained import download
from flax_resnet.pretrained import fetch as fetching
from flax_resnet.pretrained.fetch import cache_dir, fetch
from flax_resnet.pretrained.published import HUB, Checksum, Published

DATA = np.random.default_rng(0).bytes(300_000)
BLOCK = download.CHUNK
OTHER = np.random.default_rng(1).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
COMMIT = "0123456789abcdef" * 2 + "01234567"
HUB_PATH = "/timm/resnet50.a1_in1k/resolve/main/model.safetensors"


class Host:
    """A file server in a thread whose ways can be set."""

    def __init__(self):
        self.data = DATA
        self.etag = '"one"'
        self.dates = False
        self.ranges = True  # False: always the whole file
        self.statuses = []  # answered first, one a GET
        self.cuts = []  # bytes after which the next GETs break off
        self.redirect = None
        self.heads = []  # headers of the first answers to HEAD
        self.head = {}  # and of those after them
        self.delay = 0.0
        self.seen = []  # of each request: method, path, headers, bytes sent
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def gets(self):
        return [r for r in self.seen if r.method == "GET"]

    def handler(host):
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.note("HEAD")
                self.send_response(host.statuses.pop(0) if host.statuses else 302)
                for name, value in (host.heads.pop(0) if host.heads else host.head).items():
                    self.send_header(name, value)
                self.end_headers()

            def do_GET(self):
                seen = self.note("GET")
                time.sleep(host.delay)
                if host.redirect:
                    self.send_response(302)
                    self.send_header("Location", host.redirect)
                    self.end_headers()
                    return
                if host.statuses:
                    self.send_error(host.statuses.pop(0))
                    return
                with contextlib.suppress(OSError):
                    self.send_file(seen)

            def note(self, method):
                record = types.SimpleNamespace(
                    method=method, path=self.path, headers=dict(self.headers), sent=0
                )
                host.seen.append(record)
                return record

            def send_file(self, seen):
                found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start, total = int(found[1]) if found else 0, len(host.data)
                if not host.ranges or self.headers.get("If-Range") not in (None, host.etag):
                    start = 0
                if start >= total:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{total}")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                self.send_header("Content-Length", str(total - start))
                if host.etag:
                    self.send_header("Last-Modified" if host.dates else "ETag", host.etag)
                self.end_headers()
                end = start + host.cuts.pop(0) if host.cuts else total
                for at in range(start, end, 10_000):
                    seen.sent += self.wfile.write(host.data[at : min(at + 10_000, end)])

        return Handler


@pytest.fixture
def host():
    with contextlib.closing(Host()) as running:
        yield running


@pytest.fixture
def second():
    with contextlib.closing(Host()) as running:
        yield running


@pytest.fixture(autouse=True)
def weights(tmp_path, monkeypatch):
    """The cache's folder of weights, with no pauses, no proxies and no tokens about."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("HF_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("FLAX_RESNET_OFFLINE", raising=False)
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
    return tmp_path / "cache" / "weights"


def entry(url, checksum=SHA256[:8], algorithm="sha256"):
    kind = Checksum(algorithm, checksum) if checksum else None
    return Published("resnet50", "tv_v2", url, "a.pth", kind, TORCH, None, "none")


def hub_entry():
    return entry(HUB + HUB_PATH, None)


def linked(data=DATA):
    return {
        "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        "X-Linked-Size": str(len(data)),
        "X-Repo-Commit": COMMIT,
    }


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def break_off(host, monkeypatch, after=6 * BLOCK):
    """Leaves a partial file, as a process that was stopped does."""
    with monkeypatch.context() as without:
        without.setattr(download, "PAUSES", ())
        host.cuts = [after]
        with pytest.raises(UserError, match="cannot be downloaded"):
            fetch(entry(f"{host.url}/a.pth"))


def test_a_file_is_downloaded_once(host, weights, capfd):
    path = fetch(entry(f"{host.url}/a.pth"))
    assert path == weights / "a.pth"
    assert path.read_bytes() == DATA
    assert fetch(entry(f"{host.url}/a.pth")) == path
    assert len(host.seen) == 1
    assert names_in(weights) == ["a.pth"]
    assert capfd.readouterr() == ("", "")


def test_md5_is_verified_too(host):
    good = hashlib.md5(DATA).hexdigest()
    assert fetch(entry(f"{host.url}/a", good, "md5")).read_bytes() == DATA


def test_a_dropped_connection_is_resumed_in_the_same_process(host, weights):
    host.cuts = [BLOCK, BLOCK, 2 * BLOCK, 0, 0, BLOCK, BLOCK]
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    rest = len(DATA) - 6 * BLOCK
    assert [r.sent // BLOCK for r in host.seen] == [1, 1, 2, 0, 0, 1, 1, rest // BLOCK]
    assert sum(r.sent for r in host.seen) == len(DATA)
    assert names_in(weights) == ["a.pth"]


def test_a_later_process_goes_on_from_the_partial_file(host, weights, monkeypatch):
    break_off(host, monkeypatch)
    assert names_in(weights) == ["a.pth.partial", "a.pth.partial.validator"]
    assert (weights / "a.pth.partial").stat().st_size == 6 * BLOCK
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    again = host.seen[-1]
    assert again.headers["Range"] == f"bytes={6 * BLOCK}-"
    assert again.headers["If-Range"] == '"one"'
    assert again.sent == len(DATA) - 6 * BLOCK
    assert names_in(weights) == ["a.pth"]


def test_a_date_serves_as_well_as_an_etag(host, monkeypatch):
    host.dates, host.etag = True, "Wed, 21 Oct 2015 07:28:00 GMT"
    break_off(host, monkeypatch)
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    assert [r.sent for r in host.seen] == [6 * BLOCK, len(DATA) - 6 * BLOCK]


def test_a_changed_file_is_not_spliced(host, monkeypatch):
    host.data = OTHER
    break_off(host, monkeypatch)
    host.data, host.etag = DATA, '"two"'
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    assert host.seen[-1].sent == len(DATA)


def test_a_server_that_minds_neither_etag_nor_change_is_found_out(host, monkeypatch):
    host.data = OTHER
    break_off(host, monkeypatch)
    host.data = DATA
    with pytest.raises(UserError, match=r"sha256 .*it was removed; try again"):
        fetch(entry(f"{host.url}/a.pth"))
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA


@pytest.mark.parametrize("etag", ['"one"', 'W/"weak"', ""])
def test_a_server_without_ranges_starts_again(host, monkeypatch, etag):
    host.ranges, host.etag = False, etag
    break_off(host, monkeypatch)
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    assert ("Range" in host.seen[-1].headers) == (etag == '"one"')
    assert host.seen[-1].sent == len(DATA)


def test_a_partial_file_that_is_whole_is_only_verified(host, weights, monkeypatch):
    break_off(host, monkeypatch)
    (weights / "a.pth.partial").write_bytes(DATA)
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    assert host.seen[-1].sent == 0


def test_a_partial_file_that_is_too_long_is_dropped(host, weights, monkeypatch):
    break_off(host, monkeypatch)
    (weights / "a.pth.partial").write_bytes(DATA + b"more")
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    assert [r.sent for r in host.seen[1:]] == [0, len(DATA)]


def test_a_wrong_checksum_is_one_line_with_both_and_leaves_nothing(host, weights):
    host.data = OTHER
    got = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(UserError, match=f"sha256 {got}, not {SHA256[:8]}\\.\\.\\.: it was removed"):
        fetch(entry(f"{host.url}/a.pth"))
    assert names_in(weights) == []


def test_a_server_that_is_busy_is_asked_again(host):
    host.statuses = [503, 429, 500]
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    assert len(host.seen) == 4


@pytest.mark.parametrize(
    ("status", "times", "said"),
    [
        (404, 1, "HTTP 404: there is no such file"),
        (403, 1, "HTTP 403: access is refused.*HF_TOKEN"),
        (503, 4, "HTTP 503: Service Unavailable"),
    ],
)
def test_a_refusal_is_one_line(host, weights, status, times, said):
    host.statuses = [status] * 9
    with pytest.raises(UserError, match=said) as caught:
        fetch(entry(f"{host.url}/a.pth"))
    assert f"{host.url}/a.pth" in str(caught.value)
    assert str(weights / "a.pth") in str(caught.value)
    assert len(host.seen) == times
    assert names_in(weights) == []


def test_a_refusal_keeps_what_has_come(host, weights, monkeypatch):
    break_off(host, monkeypatch)
    host.statuses = [404]
    with pytest.raises(UserError, match="HTTP 404"):
        fetch(entry(f"{host.url}/a.pth"))
    assert (weights / "a.pth.partial").stat().st_size == 6 * BLOCK


def test_a_host_out_of_reach_is_one_line_at_once(host, weights, monkeypatch):
    host.close()
    host.close = lambda: None
    monkeypatch.setattr(download, "PAUSES", (60.0,))
    with pytest.raises(UserError, match="Connection refused") as caught:
        fetch(entry(f"{host.url}/a.pth"))
    said = str(caught.value)
    assert said.startswith("weights 'tv_v2' of resnet50 are not on this machine and http://127.")
    assert said.endswith(f"save it as {weights / 'a.pth'}, or give the path of a file")
    assert names_in(weights) == []


@pytest.mark.parametrize("url", ["https://", "gopher://127.0.0.1/a", "https://[::1/a"])
def test_an_address_that_is_none_is_one_line(url):
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(entry(url))


@pytest.mark.parametrize("variable", ["FLAX_RESNET_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_asked(host, weights, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match=rf"{host.url}/a.pth .*{variable} is set.*{weights}/a.pth"):
        fetch(entry(f"{host.url}/a.pth"))
    weights.mkdir(parents=True)
    (weights / "a.pth").write_bytes(DATA)
    assert fetch(entry(f"{host.url}/a.pth")).read_bytes() == DATA
    assert host.seen == []


@pytest.mark.parametrize("damaged", [DATA[:-1], OTHER, b""])
def test_a_file_in_the_cache_that_is_another_is_never_used(host, weights, damaged):
    weights.mkdir(parents=True)
    (weights / "a.pth").write_bytes(damaged)
    with pytest.raises(UserError, match=f"not {SHA256[:8]}.*altered or cut short; delete it"):
        fetch(entry(f"{host.url}/a.pth"))
    assert host.seen == []


def test_the_hub_is_asked_for_the_digest_and_the_token_stays_there(host, second, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{host.url}/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    host.head, host.redirect = linked(), f"{second.url}/cdn/file?signature=x"
    second.cuts = [6 * BLOCK]
    assert fetch(hub_entry()).read_bytes() == DATA
    assert [r.method for r in host.seen] == ["HEAD", "GET", "GET"]
    assert {r.headers["Authorization"] for r in host.seen} == {"Bearer secret"}
    assert host.seen[0].path == HUB_PATH
    assert host.seen[1].path == HUB_PATH.replace("main", COMMIT)
    assert [r.sent for r in second.seen] == [6 * BLOCK, len(DATA) - 6 * BLOCK]
    assert all("Authorization" not in r.headers for r in second.seen)


def test_no_other_host_sees_the_token(host, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(entry(f"{host.url}/a.pth"))
    assert "Authorization" not in host.seen[0].headers


def test_a_renamed_repository_is_followed(host, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    moved = "/timm/new/resolve/main/model.safetensors"
    host.heads, host.head = [{"Location": moved}], linked()
    assert fetch(hub_entry()).read_bytes() == DATA
    assert [r.path for r in host.seen] == [HUB_PATH, moved, moved.replace("main", COMMIT)]


def test_a_hub_file_is_verified_by_its_record_without_the_network(host, weights, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    host.head = linked()
    path = fetch(hub_entry())
    assert (weights / "a.pth.sha256").read_text() == SHA256
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch(hub_entry()) == path
    assert len(host.seen) == 2
    path.write_bytes(DATA[:-1])
    with pytest.raises(UserError, match="altered or cut short"):
        fetch(hub_entry())


def test_a_wrong_hub_file_is_refused(host, weights, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    host.head, host.data = linked(), OTHER
    with pytest.raises(UserError, match=f"not {SHA256}: it was removed"):
        fetch(hub_entry())
    assert names_in(weights) == []


def test_a_hub_that_gives_no_digest_is_refused(host, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    host.head = {"ETag": '"abc"'}
    with pytest.raises(UserError, match="does not say its sha256"):
        fetch(hub_entry())


def test_a_hub_file_put_there_by_hand_is_verified_with_the_hub(host, weights, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    host.head = linked()
    weights.mkdir(parents=True)
    (weights / "a.pth").write_bytes(DATA)
    for _ in range(2):
        assert fetch(hub_entry()) == weights / "a.pth"
    assert [r.method for r in host.seen] == ["HEAD"]
    (weights / "a.pth.sha256").unlink()
    (weights / "a.pth").write_bytes(OTHER)
    with pytest.raises(UserError, match=f"not {SHA256}"):
        fetch(hub_entry())


def test_a_hub_file_put_there_by_hand_is_used_offline_with_a_warning(weights, monkeypatch, caplog):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights.mkdir(parents=True)
    (weights / "a.pth").write_bytes(DATA)
    with caplog.at_level(logging.WARNING):
        assert fetch(hub_entry()) == weights / "a.pth"
    assert "used unverified" in caplog.text
    assert names_in(weights) == ["a.pth"]


def test_those_who_want_one_file_at_once_download_it_once(host, weights, caplog):
    host.delay = 0.3
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(entry(f"{host.url}/a.pth"))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [weights / "a.pth"] * 4
    assert found[0].read_bytes() == DATA
    assert len(host.seen) == 1
    assert names_in(weights) == ["a.pth"]
    assert "waiting for another process" in caplog.text


def test_the_next_in_line_takes_over_from_one_that_fails(host, weights):
    host.delay, host.statuses = 0.2, [404]
    results = []

    def ask():
        try:
            results.append(fetch(entry(f"{host.url}/a.pth")))
        except UserError as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(r, UserError) for r in results) == 1
    assert sum(r == weights / "a.pth" for r in results) == 2
    assert len(host.seen) == 2


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, host):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLAX_RESNET_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be read or written .*FLAX_RESNET_CACHE"):
        fetch(entry(f"{host.url}/a.pth"))


def test_a_full_disk_is_one_line(host, weights, monkeypatch):
    class Full(io.BufferedWriter):
        def write(self, data):
            raise OSError(28, "No space left on device")

    def open_full(path, mode):
        return Full(io.FileIO(path, mode.replace("b", "")))

    weights.mkdir(parents=True)
    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda p, mode="r", **k: open_full(p, mode) if mode == "ab" else real(p, mode, **k),
    )
    with pytest.raises(UserError, match=r"No space left on device\): free space there"):
        fetch(entry(f"{host.url}/a.pth"))


def test_the_bar_is_drawn_on_a_terminal_only(host, monkeypatch, capsys):
    monkeypatch.setattr(fetching.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    fetch(entry(f"{host.url}/a.pth"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "a.pth" in err


def test_the_file_is_readable_as_any_other(host, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    path = fetch(entry(f"{host.url}/a.pth"))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FLAX_RESNET_CACHE", "~/mine")
    assert cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("FLAX_RESNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "flax_resnet"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache" / "flax_resnet"
