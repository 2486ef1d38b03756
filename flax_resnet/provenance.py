"""What a run's numbers come from besides its config: commit, versions, this library's source."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
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


def command_of(argv: Sequence[str]) -> str | None:
    """A process's ``sys.argv`` as what was typed; None where it was no command.

    The home directory is written ~, and of a script only the name.
    """
    if not argv or argv[0] in ("", "-c", "-"):
        return None
    path = PurePath(argv[0])
    words = ["python", path.name] if path.suffix == ".py" else [path.name]
    for package in ("experiments", "flax_resnet"):
        if path.suffix == ".py" and package in path.parts[:-1]:
            last = len(path.parts) - 1 - path.parts[::-1].index(package)
            inner = [*path.parts[last:-1], *([path.stem] if path.stem != "__main__" else [])]
            words = ["python", "-m", ".".join(inner)]
            break
    return " ".join([*map(shlex.quote, words), *map(_word, argv[1:])])


def _word(word: str) -> str:
    word = without_home(word)
    return "~/" + shlex.quote(word[2:]) if word.startswith("~/") and word[2:] else shlex.quote(word)


def without_home(text: str) -> str:
    """A text with ~ for the user's home directory, which is nobody else's business."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if len(home) > 1 else text
