import logging
import sys
import threading
import types

import pytest
from buckets import Objects
from etils import epath

from flax_resnet import storage
from flax_resnet.errors import UserError


def test_what_a_place_needs_is_asked_for(monkeypatch, tmp_path):
    assert storage.opened(tmp_path / "x/../y") == epath.Path(tmp_path / "y")
    with pytest.raises(UserError, match=r"az://b/c: expected a path, gs://BUCKET/PATH or s3://"):
        storage.opened("az://b/c")
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs: pip install 'flax_resnet\[remote\]'"):
        storage.opened("gs://bucket/x")
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("EPATH_USE_TF", raising=False)
    with pytest.raises(UserError, match="instead of s3fs: set EPATH_USE_TF=0 in the environment"):
        storage.opened("s3://bucket/x")


def test_a_bucket_that_is_not_there_or_not_ours_is_one_line(bucket):
    with pytest.raises(UserError, match=r"s3://other/x cannot be used \(FileNotFoundError: other"):
        storage.prepare(storage.opened("s3://other/x"))
    place = storage.opened("s3://bucket/x")
    storage.prepare(place)
    assert Objects.held == {}
    bucket("forbids")
    with pytest.raises(UserError, match=r"s3://bucket/x cannot be used \(PermissionError: Forb"):
        storage.prepare(place)


def test_copies_there_and_back(bucket, tmp_path):
    here, there = epath.Path(tmp_path / "a"), storage.opened("s3://bucket/x/7")
    (here / "deep").mkdir(parents=True)
    (here / "deep/b").write_bytes(b"b" * 3_000_000)
    (here / "c").write_bytes(b"")
    names = ["deep/b", "c", "not there"]
    storage.copy(here, there, names)
    assert {k: len(v) for k, v in Objects.held.items()} == {
        "bucket/x/7/deep/b": 3_000_000,
        "bucket/x/7/c": 0,
    }
    storage.copy(there, epath.Path(tmp_path / "d"), names)
    assert (tmp_path / "d/deep/b").read_bytes() == b"b" * 3_000_000
    assert (tmp_path / "d/c").read_bytes() == b""


def test_reasons_are_short():
    assert storage.reason(ValueError("x" * 999 + "No space left on device")) == storage.FULL[0]
    assert storage.reason(ValueError("a\n b")) == "a b"
    assert storage.reason(KeyError()) == "KeyError"
    assert len(storage.reason(ValueError("x" * 999))) == 200


def test_only_the_echo_of_a_failed_save_is_hushed(monkeypatch, caplog):
    seen, hush = [], storage._Hush()
    monkeypatch.setattr(sys, "unraisablehook", lambda what: seen.append(what.exc_value))
    before, log = sys.unraisablehook, logging.getLogger("absl")
    hush.begin()
    threads = [threading.Thread(target=f) for f in (hush.begin, hush.end)]
    for thread in threads:
        thread.start()
        thread.join()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("other"), KeyError("k")):
        sys.unraisablehook(types.SimpleNamespace(exc_type=type(error), exc_value=error))
    for path in ("/x/orbax/checkpoint/future.py", "/x/mine.py"):
        record = logging.LogRecord("absl", logging.ERROR, path, 1, path, None, None)
        assert hush.filter(record) == ("orbax" not in path)
        assert "orbax" not in path or not log.filter(record)
    hush.end()
    assert [str(error) for error in seen] == ["other", "'k'"]
    assert sys.unraisablehook is before
    assert hush not in log.filters
