"""What a run's numbers come from besides its config: commit, versions, this library's source."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax_resnet.records.files import digest

LIBRARY = Path(__file__).resolve().parents[1]
"""The directory of the package flax_resnet."""


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from, and whether it was changed; else None."""

    def ask(*words: str) -> str:
        command, silent = ["git", "-C", str(LIBRARY.parent), *words], subprocess.DEVNULL
        return subprocess.check_output(command, stderr=silent, text=True, timeout=30)

    try:
        top, commit = ask("rev-parse", "--show-toplevel", "HEAD").splitlines()
        changed = bool(ask("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": changed} if Path(top).resolve() == LIBRARY.parent else None


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
    return digest(file.read_bytes() for file in sorted(LIBRARY.rglob("*.py")))
