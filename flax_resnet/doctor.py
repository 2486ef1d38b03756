"""What this machine has: versions, devices, caches, data; and for what is missing the command."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from flax_resnet import compilation, cpu, flags
from flax_resnet.classify import flag
from flax_resnet.datasets import sources
from flax_resnet.errors import UserError
from flax_resnet.pretrained.fetch import cache_dir, offline
from flax_resnet.provenance import git_state, versions

PACKAGE = "flax_resnet"
State = Literal["ok", "absent", "wrong"]
MARKS: Mapping[State, str] = {"ok": " ", "absent": "-", "wrong": "!"}
Needs = dict[str, list[tuple[str, Any]]]
"""{extra, "" of what is always needed: [(package, versions that will do)]}."""
LEAST_FREE = 2**31
"""Bytes on the disk of the working directory, below which a long run may fill it."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    """What."""
    text: str
    """What was found."""
    state: State = "ok"
    """"absent" is not needed by everybody; "wrong" keeps something from working."""
    advice: str | None = None
    """A command, or what else to do."""


def findings(data_dir: str | None = None) -> Iterator[Finding]:
    """Looks at this machine; nothing is downloaded or written.

    Args:
      data_dir: directory of tfds sets; None is tfds's default.
    """
    needs, git = _requirements(), git_state()
    yield from _python(needs, git)
    yield from _devices()
    yield _computation()
    yield from _memory()
    yield from _caches()
    yield from _data(data_dir)
    yield from _extras(needs, from_checkout=git is not None)


def _python(needs: Needs, git: Mapping[str, Any] | None) -> Iterator[Finding]:
    where = Path(__file__).parent
    commit = (
        f", commit {git['commit'][:10]}{' and changes' if git['changed'] else ''}" if git else ""
    )
    yield Finding(PACKAGE, f"{versions([PACKAGE])[PACKAGE]} in {where}{commit}")
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    for name, wanted in needs.get("", []):
        yield _package(name, wanted, f'pip install "{name}{wanted}"')


def _package(name: str, wanted: Any, advice: str) -> Finding:
    found = versions([name])[name]
    if found == "not installed":
        return Finding(name, f"not installed, {wanted or 'any version'} is needed", "wrong", advice)
    if not wanted.contains(found, prereleases=True):
        return Finding(name, f"{found}, {wanted} is needed", "wrong", advice)
    return Finding(name, found)


def _requirements() -> Needs:
    """What this machine needs of this library's requirements."""
    from packaging.requirements import Requirement

    found: Needs = {}
    try:
        said = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a directory on the path, not installed
        return found
    lines = [Requirement(line) for line in importlib.metadata.requires(PACKAGE) or []]
    for extra in ("", *(said.get_all("Provides-Extra") or [])):
        for line in lines:
            always = line.marker is None or line.marker.evaluate({"extra": ""})
            wanted = always if line.marker is None else line.marker.evaluate({"extra": extra})
            if wanted and always == (extra == ""):
                found.setdefault(extra, []).append((line.name, line.specifier))
    return found


def _devices() -> Iterator[Finding]:
    devices = jax.devices()
    kinds = ", ".join(sorted({d.device_kind for d in devices}))
    many = f", of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    yield Finding(
        "devices", f"{len(devices)} of kind {kinds}, platform {devices[0].platform}{many}"
    )
    if devices[0].platform == "cpu" and (
        Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
    ):
        yield Finding(
            "GPU",
            "there is an NVIDIA GPU, and jax has no CUDA",
            "wrong",
            'pip install "jax[cuda13]"',
        )
    settings = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_ENABLE_X64", "CUDA_VISIBLE_DEVICES")
    for name in settings:
        if name in os.environ:
            yield Finding(name, f"{os.environ[name]!r} is set")


def _computation() -> Finding:
    """Compiles a convolution and compares it with NumPy's."""
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(1, 6, 6, 2)), rng.normal(size=(3, 3, 2, 4))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    want = np.einsum("nhwcij,ijco->nhwo", windows, k)
    begun = time.perf_counter()
    try:
        got = jax.jit(
            lambda x, k: jax.lax.conv_general_dilated(
                x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )(jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32))
        error = float(np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want)))
    except jax.errors.JaxRuntimeError as failed:
        said = str(failed).splitlines()[0]
        return Finding("computation", f"a convolution fails: {said:.200}", "wrong",
                       "check driver and jax versions")  # fmt: skip
    text = f"a convolution compiles in {time.perf_counter() - begun:.1f} s, error {error:.0e}"
    if error > 1e-2:  # TF32 and bfloat16 products are less exact than float32's
        return Finding("computation", text, "wrong", "check driver and jax versions")
    return Finding("computation", text)


def _memory() -> Iterator[Finding]:
    yield Finding("cores", f"{cpu.usable_cores()} usable of {os.cpu_count()}")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Finding("memory", _size(memory))
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(
        "disk",
        f"{_size(free)} free in {Path.cwd()}",
        "ok" if free > LEAST_FREE else "wrong",
        None if free > LEAST_FREE else "free some, or run elsewhere",
    )


def _caches() -> Iterator[Finding]:
    try:
        programs = compilation.default_directory()
    except RuntimeError as error:
        advice = "set FLAX_RESNET_CACHE"
        yield Finding("cache", f"there is no place for it: {error}", "wrong", advice)
        return
    yield _cache("compiled programs", programs)
    yield _cache("weights", cache_dir() / "weights", partial=".partial")
    if (variable := offline()) is not None:
        yield Finding("network", f"{variable} is set: nothing is downloaded", "absent")


def _cache(topic: str, directory: Path, partial: str = "-") -> Finding:
    files = [f for f in directory.glob("*") if f.is_file() and not f.name.endswith(partial)]
    above = next(p for p in (directory, *directory.parents) if p.exists())
    text = f"{len(files)} files, {_size(sum(f.stat().st_size for f in files))} in {directory}"
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        advice = "make it writable, or set FLAX_RESNET_CACHE"
        return Finding(topic, f"{text}, which is not writable", "wrong", advice)
    return Finding(topic, text)


def _data(data_dir: str | None) -> Iterator[Finding]:
    root = Path(sources.data_root(data_dir))
    found = sorted({p.parent.parent.name for p in root.glob("*/*/dataset_info.json")})
    found += sorted(
        {"/".join(p.parts[-4:-2]) for p in root.glob("*/*/*/dataset_info.json")} - {*found}
    )
    advice = f"{PACKAGE.replace('_', '-')} prepare NAME --data-dir {root}"
    if not found:
        yield Finding("data", f"no tfds sets in {root} (digits need none)", "absent", advice)
    for name in found:
        builder = sources.find_builder(name, str(root))
        if builder is None:
            continue
        counts = {split: info.num_examples for split, info in builder.info.splits.items()}
        text = f"{builder.info.full_name} in {root}: " + ", ".join(
            f"{split} {count:,}" for split, count in counts.items()
        )
        if sources.is_array_record(builder):
            yield Finding("data", text)
        else:
            stored = builder.info.file_format.value
            yield Finding("data", f"{text}; stored as {stored}", "absent",
                          advice.replace("NAME", name))  # fmt: skip


def _extras(needs: Needs, from_checkout: bool) -> Iterator[Finding]:
    for extra, packages in needs.items():
        if not extra:
            continue
        found = [_package(name, wanted, "") for name, wanted in packages]
        if lacking := [f"{f.topic} ({f.text})" for f in found if f.state != "ok"]:
            text = f"not here: {', '.join(lacking)}"
            what = f"-e '.[{extra}]'" if from_checkout else f"'{PACKAGE}[{extra}]'"
            yield Finding(f"[{extra}]", text, "absent", f"pip install {what}")
        else:
            yield Finding(f"[{extra}]", ", ".join(f"{f.topic} {f.text}" for f in found))


def _size(count: float) -> str:
    power = min(4, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    data_dir: Annotated[str | None, flag("DIR", "$TFDS_DATA_DIR or ~/tensorflow_datasets")] = None
    """Directory of tfds sets to look into."""
    json: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """Print JSON, for a bug report."""


ABOUT = """Says what this machine has: versions, devices, memory, caches, data sets, extras; and for
what is missing the command. A line that begins with ! is wrong, with - is absent and may not be
needed. Ends with status 1 where something is wrong. Nothing is downloaded or written.

Examples:
  flax-resnet doctor
  flax-resnet doctor --data-dir ~/data --json"""


def main(argv: Sequence[str] | None = None) -> None:
    """``flax-resnet doctor``."""
    settings = flags.cli(Settings, argv, ABOUT, "flax-resnet doctor")
    found = []
    for finding in findings(settings.data_dir):
        found.append(finding)
        if not settings.json:
            advice = f"   -> {finding.advice}" if finding.advice else ""
            print(f"{MARKS[finding.state]} {finding.topic:24} {finding.text}{advice}", flush=True)
    if not settings.json:
        print("(! is wrong; - is absent, and not everybody needs it; -> what to do)")
    if settings.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    if wrong := [finding.topic for finding in found if finding.state == "wrong"]:
        error = UserError(
            f"{len(wrong)} wrong: {', '.join(wrong)}; the lines with ! say what to do"
        )
        error.status = 1
        raise error
