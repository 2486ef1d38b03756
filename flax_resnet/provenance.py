"""What a run's numbers come from besides its config: commit, versions, this library's source."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax_resnet.files import digest

GIT_SECONDS = 30


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it was changed; else None."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        ask = ["git", "-C", str(root), *arguments]
        said = subprocess.run(ask, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return said.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


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
