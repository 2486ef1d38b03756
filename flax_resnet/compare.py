"""Runs side by side: what their configs differ in, and what came of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_resnet import flags, metrics, tables
from flax_resnet.classify import flag, writing
from flax_resnet.errors import UserError
from flax_resnet.inspection import read_record, variants
from flax_resnet.record import flatten

# (what a line shows, the field of result.json, times, digits)
RESULTS: tuple[tuple[str, str, float, int], ...] = (
    ("evaluation top-1 (%)", "top1", 100, 2),
    ("evaluation loss (nats)", "loss", 1, 4),
    ("training top-1 (%)", "train_top1", 100, 2),
    ("training loss (nats)", "train_loss", 1, 4),
    ("steps", "step", 1, 0),
    ("seconds", "seconds", 1, 1),
)
NOT_COMPARED = ("seed",)
ABSENT = "-"


def compare(paths: Sequence[str | Path]) -> str:
    """Tables in Markdown: the fields that differ, and the results.

    Args:
      paths: each a run's working directory, a variant (seed0, seed1, ...), whose results are
        averaged, or a sweep, which holds variants.

    Raises:
      UserError: a directory holds none of these, or there is one run alone.
    """
    found = [variant for path in paths for variant in variants(path)]
    if len(found) < 2:
        raise UserError(
            f"{' '.join(map(str, paths))}: one run alone; expected two or more working "
            "directories, or a sweep's"
        )
    names = _names([workdirs[0] for _, workdirs in found], [name for name, _ in found])
    records = [[read_record(w)[1] for w in workdirs] for _, workdirs in found]
    flat = [flatten(own[0]["config"]) for own in records]
    fields = [
        name
        for name in dict.fromkeys(name for one in flat for name in one)
        if len({str(one.get(name, ABSENT)) for one in flat}) > 1 and name not in NOT_COMPARED
    ]
    rows = [[f"`{f}`", *(str(one.get(f, ABSENT)) for one in flat)] for f in fields]
    rows = rows or [["no field", *("the same" for _ in flat)]]
    results = [[_result(w) for w in workdirs] for _, workdirs in found]
    shown = [["runs finished", *(_finished(own) for own in results)]]
    for text, field, times, digits in RESULTS:
        values = [[times * r[field] for r in own if r and r.get(field) is not None]
                  for own in results]  # fmt: skip
        if any(values):
            shown.append([text, *(tables.plus_minus(v, digits) for v in values)])
    far = [_latest(workdirs) for (_, workdirs), own in zip(found, results, strict=True)
           if not all(own)]  # fmt: skip
    return "\n".join([
        tables.markdown_table(["config", *names], rows),
        tables.markdown_table(["result", *names], shown),
        *far,
    ])  # fmt: skip


def _names(workdirs: Sequence[Path], names: Sequence[str]) -> list[str]:
    """What tells the columns apart: names, or paths where two have one name."""
    if len(set(names)) == len(names):
        return list(names)
    return [str(workdir) for workdir in workdirs]


def _result(workdir: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads((workdir / "result.json").read_text())
    except (OSError, ValueError):
        return None


def _finished(results: Sequence[Any]) -> str:
    done = sum(result is not None for result in results)
    return str(done) if done == len(results) else f"{done} of {len(results)}"


def _latest(workdirs: Sequence[Path]) -> str:
    """How far runs have come that have no result."""
    lines = []
    for workdir in workdirs:
        if _result(workdir) is None:
            logged = metrics.read_metrics(workdir)
            at = f"at step {logged[-1]['step']}" if logged else "before its first log line"
            lines.append(f"{workdir} is not finished: {at}\n")
    return "".join(lines)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], flag("RUN [RUN ...]")] = ()
    """Working directories of runs, or directories that hold seed0, seed1, ... or variants."""
    output: Annotated[str | None, flag("FILE.md")] = None
    """Write to this file, whole or not at all, instead of the standard output."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no runs are given: expected two or more working directories")


ABOUT = """Sets runs side by side: the fields of the config in which they differ, and their results,
of several seeds mean and deviation.

Examples:
  flax-resnet compare runs/digits runs/adamw
  flax-resnet compare runs/ablations/depth --output depth.md"""


def main(argv: Sequence[str] | None = None) -> None:
    """``flax-resnet compare``."""
    settings = flags.cli(Settings, argv, ABOUT, "flax-resnet compare")
    text = compare(settings.runs)
    with writing(settings.output) as file:
        file.write(text)
