"""What a run's numbers come from: commit, versions, source."""

import pathlib
import shutil

import numpy as np

from flax_resnet import provenance

ROOT = pathlib.Path(__file__).parents[1]


def test_the_commit_is_that_of_a_checkout(monkeypatch):
    state = provenance.git_state()
    assert (state is not None) == ((ROOT / ".git").exists() and shutil.which("git") is not None)
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["changed"], bool))
    # Installed in a directory of another repository, it is not that one's commit.
    monkeypatch.setattr(provenance, "__file__", str(ROOT / "flax_resnet" / "deeper" / "x.py"))
    assert provenance.git_state() is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() is None


def test_versions_of_packages():
    names = ("numpy", "no-such-package")
    expected = {"numpy": np.__version__, "no-such-package": "not installed"}
    assert provenance.versions(names) == expected


def test_the_source_hash_is_of_all_modules(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("a.py", "deep/b.py", "c.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a.py"))
    found = [provenance.source_hash()]
    for name in ("c.txt", "deep/b.py"):
        (tmp_path / name).write_text("other")
        found.append(provenance.source_hash())
    assert found[0] == found[1] != found[2]
