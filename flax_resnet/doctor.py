"""What this machine has: versions, devices, data; and for what is missing the command.

``jax.print_environment_info`` and ``pip check`` report the versions. A full disk, a cache that
cannot be written and a device that does not compute are said by the command that meets them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from flax_resnet.classify import flag
from flax_resnet.datasets import sources
from flax_resnet.errors import UserError
from flax_resnet.provenance import git_state, versions

PACKAGE = "flax_resnet"
State = Literal["ok", "absent", "wrong"]
MARKS = {"ok": " ", "absent": "-", "wrong": "!"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact about this machine."""

    topic: str
    """What the fact is about."""
    text: str
    """The fact."""
    state: State = "ok"
    """"absent": not everybody needs it; "wrong": something does not work without it."""
    advice: str | None = None
    """A command, or what else to do."""


def findings(data_dir: str | None = None) -> Iterator[Finding]:
    """Looks at this machine; nothing is downloaded or written.

    Args:
      data_dir: directory of tfds sets; None is tfds's default.
    """
    git = git_state()
    commit = f", commit {git['commit'][:10]}{' and changes' * git['changed']}" if git else ""
    version = versions([PACKAGE])[PACKAGE]
    yield Finding(PACKAGE, f"{version} in {Path(__file__).parent}{commit}")
    facts = jax.print_environment_info(return_string=True) or ""
    for line in facts.splitlines():
        topic, colon, text = line.partition(": ")
        if colon:
            yield Finding(topic, text.strip())
    yield _requirements()
    gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    if gpu and jax.default_backend() == "cpu":
        text = "there is an NVIDIA GPU, and jax has no CUDA"
        yield Finding("GPU", text, "wrong", 'pip install "jax[cuda13]"')
    root = Path(sources.data_root(data_dir))
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    sets = sorted(str(info.parent.relative_to(root)) for info in infos)
    advice = None if sets else f"flax-resnet prepare NAME --data-dir {root}"
    text = ", ".join(sets) or "no tfds sets (digits need none)"
    yield Finding("data", f"{text} in {root}", "ok" if sets else "absent", advice)
    yield from _extras(from_checkout=git is not None)


def _requirements() -> Finding:
    """What ``pip check`` says of the installed packages."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    lines = (done.stdout or done.stderr).splitlines()
    if done.returncode == 0:
        return Finding("pip check", "; ".join(lines))
    ours = any(line.replace("-", "_").startswith(PACKAGE) for line in lines)
    advice = "pip install what it names" if done.stdout else "python -m ensurepip"
    return Finding("pip check", "; ".join(lines), "wrong" if ours else "absent", advice)


def _extras(from_checkout: bool) -> Iterator[Finding]:
    """What each extra of this library needs, and what of it is not installed."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a directory on the path, not installed
        return
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    for extra in metadata.get_all("Provides-Extra") or []:
        needed = [r for r in lines if r.marker and r.marker.evaluate({"extra": extra})
                  and not r.marker.evaluate({"extra": ""})]  # fmt: skip
        there = versions([r.name for r in needed])
        lacking = [r for r in needed if there[r.name] == "not installed"
                   or not r.specifier.contains(there[r.name], prereleases=True)]  # fmt: skip
        if lacking:
            text = ", ".join(f"{r.name} ({there[r.name]})" for r in lacking)
            what = f"-e '.[{extra}]'" if from_checkout else f"'{PACKAGE}[{extra}]'"
            yield Finding(f"[{extra}]", f"not here: {text}", "absent", f"pip install {what}")
        else:
            text = ", ".join(f"{name} {version}" for name, version in there.items())
            yield Finding(f"[{extra}]", text)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Says what this machine has: versions, devices, data sets, extras; and for what is missing
    the command. A line that begins with ! is wrong, with - is absent and may not be needed.
    Ends with status 1 where something is wrong. Nothing is downloaded or written.

    Examples:
      flax-resnet doctor
      flax-resnet doctor --data-dir ~/data --json
    """

    data_dir: Annotated[str | None, flag("DIR", "$TFDS_DATA_DIR or ~/tensorflow_datasets")] = None
    """Directory of tfds sets to look into."""
    json: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """Print JSON, for a bug report."""


def main(settings: Settings) -> None:
    """``flax-resnet doctor``."""
    found = list(findings(settings.data_dir))
    if settings.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            advice = f"   -> {finding.advice}" if finding.advice else ""
            print(f"{MARKS[finding.state]} {finding.topic:16} {finding.text}{advice}")
        print("(! is wrong; - is absent, and not everybody needs it; -> what to do)")
    if wrong := [finding.topic for finding in found if finding.state == "wrong"]:
        error = UserError(
            f"{len(wrong)} wrong: {', '.join(wrong)}; the lines with ! say what to do"
        )
        error.status = 1
        raise error
