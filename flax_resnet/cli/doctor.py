"""What this machine has: versions, devices, data; and for what is missing the command.

``jax.print_environment_info`` and ``pip check`` report the versions. A full disk, a cache that
cannot be written and a device that does not compute are said by the command that meets them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from flax_resnet.cli.flags import DataDir
from flax_resnet.data import sources
from flax_resnet.distributed import workers
from flax_resnet.errors import TryAgain
from flax_resnet.records.files import quoted
from flax_resnet.records.provenance import git_state, versions

PACKAGE = "flax_resnet"
SHARED_MEMORY_BYTES = 6 * 128 * 224 * 224 * 3
"""Batches of ImageNet's size that the two worker processes of a default config hand over."""
OK, ABSENT, WRONG = " ", "-", "!"
"""Marks: not everybody needs what is absent; something does not work without what is wrong."""


def findings(data_dir: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Yields (mark, topic, the fact and, after an arrow, what to do); nothing is written."""
    git = git_state()
    commit = f", commit {git['commit'][:10]}{' and changes' * git['changed']}" if git else ""
    yield OK, PACKAGE, f"{versions([PACKAGE])[PACKAGE]} in {Path(__file__).parents[1]}{commit}"
    for line in (jax.print_environment_info(return_string=True) or "").splitlines():
        topic, colon, text = line.partition(": ")
        if colon:
            yield OK, topic, text.strip()
    check = [sys.executable, "-m", "pip", "check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    text = "; ".join((done.stdout or done.stderr).splitlines())
    is_ours = PACKAGE in text.replace("-", "_")
    yield OK if done.returncode == 0 else WRONG if is_ours else ABSENT, "pip check", text
    if shutil.which("nvidia-smi") and jax.default_backend() == "cpu":
        text = 'there is an NVIDIA GPU, and jax has no CUDA   -> pip install "jax[cuda13]"'
        yield WRONG, "GPU", text
    place = Path(workers.SHARED_MEMORY)
    if place.is_dir() and (free := shutil.disk_usage(place).free) < SHARED_MEMORY_BYTES:
        advice = "docker run --shm-size 2g, or --data.num-workers 0 for sets that stream"
        yield ABSENT, "shared memory", f"{free / 2**20:.0f} MiB free in {place}   -> {advice}"
    root = Path(sources.data_root(data_dir))
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    if sets := ", ".join(sorted(str(info.parent.relative_to(root)) for info in infos)):
        yield OK, "data", f"{sets} in {root}"
    else:
        advice = f"flax-resnet prepare NAME --data-dir {quoted(root)}"
        yield ABSENT, "data", f"no tfds sets (digits need none) in {root}   -> {advice}"
    yield from _extras("pip install " + ("-e '.[{}]'" if git else f"'{PACKAGE}[{{}}]'"))


def _extras(command: str) -> Iterator[tuple[str, str, str]]:
    """What each extra of this library needs, and what of it is not installed."""
    from packaging.requirements import Requirement

    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a directory on the path, not installed
        return
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    for extra in metadata.get_all("Provides-Extra") or []:
        needed = [one for one in lines if one.marker and one.marker.evaluate({"extra": extra})
                  and not one.marker.evaluate({"extra": ""})]  # fmt: skip
        there = versions([one.name for one in needed])
        lacking = [f"{one.name} ({there[one.name]})" for one in needed
                   if there[one.name] == "not installed"
                   or not one.specifier.contains(there[one.name], prereleases=True)]  # fmt: skip
        if lacking:
            text = f"not here: {', '.join(lacking)}   -> {command.format(extra)}"
            yield ABSENT, f"[{extra}]", text
        else:
            yield OK, f"[{extra}]", ", ".join(f"{n} {version}" for n, version in there.items())


@dataclasses.dataclass(frozen=True)
class Settings:
    """Says what this machine has: versions, devices, data sets, extras; and for what is missing
    the command. A line that begins with ! is wrong, with - is absent and may not be needed.
    Ends with status 1 where something is wrong. Nothing is downloaded or written.

    Examples:
      flax-resnet doctor
      flax-resnet doctor --data-dir ~/data
    """

    data_dir: DataDir = None
    """Directory of tfds sets to look into."""


def main(settings: Settings) -> None:
    """``flax-resnet doctor``."""
    wrong = []
    for mark, topic, text in findings(settings.data_dir):
        print(f"{mark} {topic:16} {text}")
        wrong += [topic] * (mark == WRONG)
    print("(! is wrong; - is absent, and not everybody needs it; -> what to do)")
    if wrong:
        raise TryAgain(f"{len(wrong)} wrong: {', '.join(wrong)}; the lines with ! say what it is")
