"""What a run's numbers come from: commit, versions, source."""

import hashlib
import pathlib
import shutil
import subprocess

import numpy as np

from flax_resnet.records import provenance

ROOT = pathlib.Path(__file__).parents[2]


def test_the_commit_is_that_of_a_checkout(monkeypatch):
    if (ROOT / ".git").exists() and shutil.which("git") is not None:
        commit, *changes = [
            subprocess.check_output(["git", "-C", ROOT, *words], text=True).strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
        assert provenance.git_state() == {"commit": commit, "changed": changes != [""]}
    else:
        assert provenance.git_state() is None
    # Installed in a directory of another repository, it is not that one's commit.
    monkeypatch.setattr(provenance, "LIBRARY", ROOT / "flax_resnet" / "records")
    assert provenance.git_state() is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() is None


def test_versions_of_packages():
    names = ("numpy", "no-such-package")
    expected = {"numpy": np.__version__, "no-such-package": "not installed"}
    assert provenance.versions(names) == expected


def test_the_source_hash_is_of_all_modules(tmp_path, monkeypatch):
    assert ROOT / "flax_resnet" == provenance.LIBRARY
    expected = hashlib.sha256()
    for file in sorted((ROOT / "flax_resnet").glob("**/*.py")):
        expected.update(f"{file.stat().st_size} ".encode() + file.read_bytes())
    assert provenance.source_hash() == expected.hexdigest()
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for name in ("a.py", "deep/b.py", "deep/deeper/c.py", "d.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(provenance, "LIBRARY", tmp_path)
    found = [provenance.source_hash()]
    for name in ("d.txt", "a.py", "deep/b.py", "deep/deeper/c.py"):
        (tmp_path / name).write_text("other")
        found.append(provenance.source_hash())
    assert found[0] == found[1]
    assert len(set(found)) == 4
