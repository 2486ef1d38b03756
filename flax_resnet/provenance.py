"""What a run's numbers come from besides its config: commit, versions, this library's source."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax_resnet.files import digest


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it was changed; else None."""
    root = Path(__file__).resolve().parent.parent
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 30, "check": True}
    try:
        ask = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
        top, commit = subprocess.run(ask, **options).stdout.splitlines()
        ask = ["git", "-C", str(root), "status", "--porcelain"]
        changed = bool(subprocess.run(ask, **options).stdout)
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": changed} if Path(top).resolve() == root else None


def versions(names: Iterable[str]) -> dict[str, str]:
    """The packages' versions, or "not installed"."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_hash() -> str:
    """A hash of this library's modules: a change in any might change what it computes."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return digest([file.read_bytes() for file in files])
