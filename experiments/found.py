"""The runs that are in a directory: the finished ones, and those that are not."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.flags import SweepInvocation

FINISHED, UNFINISHED, FAILED, ABSENT = "finished", "not finished", "failed", "not begun"


@dataclasses.dataclass(frozen=True)
class FoundRun:
    """A run.

    Attributes:
      variant: its path below the directory, less a last "seedN".
      seed: of the run.
      path: its working directory.
      state: one of those above.
      config: as its config.json has it.
      starts: of config.json, the first first.
      result: what its result.json holds.
    """

    variant: str
    seed: int
    path: Path
    state: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    starts: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def find_runs(workdir: Path) -> list[FoundRun]:
    """All runs below a directory, and those of a sweep that failed before they began.

    Raises:
      UserError: none of them is finished, or a record cannot be read.
    """
    found = []
    for path in sorted(path.parent for path in workdir.rglob("config.json")):
        parts = path.relative_to(workdir).parts
        seeded = bool(parts) and re.fullmatch(r"seed\d+", parts[-1]) is not None
        found.append(_read("/".join(parts[:-1] if seeded else parts), path))
    begun = {run.path for run in found}
    for failure in sorted(workdir.rglob("failures/*-seed*.txt")):
        sweep = failure.parent.parent
        variant, _, seed = failure.stem.rpartition("-seed")
        path = sweep / variant / f"seed{seed}"
        if seed.isdecimal() and path not in begun:
            name = (sweep / variant).relative_to(workdir).as_posix()
            found.append(FoundRun(name, int(seed), path, FAILED))
    if not any(run.state == FINISHED for run in found):
        raise UserError(
            f"{workdir}: no finished run is in it (result.json beside config.json): name the "
            "workdir of a run, of its seeds or of a sweep"
        )
    return found


def _read(variant: str, path: Path) -> FoundRun:
    failure = path.parent.parent / "failures" / f"{path.parent.name}-{path.name}.txt"
    done = (path / "result.json").exists()
    state = FINISHED if done else FAILED if failure.exists() else UNFINISHED
    try:
        record = json.loads((path / "config.json").read_text())
        config, starts = record["config"], record["starts"]
        result = json.loads((path / "result.json").read_text()) if done else {}
        starts[-1]["argv"][0]
        return FoundRun(variant, config["seed"], path, state, config, starts, result)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not a run's record ({error!r}): leave it out") from error


def unfinished(runs: Iterable[FoundRun]) -> list[str]:
    """A line for the seeds of each variant that are not finished, by how far they are.

    What was not begun is told by the commands of the finished runs: how many seeds they ask for.
    """
    runs = list(runs)
    states = {(run.variant, run.seed): run.state for run in runs if run.state != FINISHED}
    done = [run for run in runs if run.state == FINISHED]
    for run in done:
        for start in run.starts:
            for seed in _asked_for(start["argv"]):
                states.setdefault((run.variant, seed), ABSENT)
    finished = {(run.variant, run.seed) for run in done}
    seeds: dict[tuple[str, str], list[int]] = {}
    for (variant, seed), state in sorted(states.items()):
        if (variant, seed) not in finished:
            seeds.setdefault((variant, state), []).append(seed)
    lines = []
    for (variant, state), numbers in seeds.items():
        *most, last = map(str, numbers)
        which = f"seeds {', '.join(most)} and {last}" if most else f"seed {last}"
        lines.append(f"{which}{f' of {variant}' if variant else ''} {state}")
    return lines


def _asked_for(argv: Sequence[str]) -> range:
    """Seeds that a command trains one variant from, where it says how many."""
    given = dict(pairs(argv[1:]))
    if Path(argv[0]).parent.name == "ablations":
        return range(int(given.get("--seeds") or SweepInvocation.seeds))
    first = int(given.get("--seed") or 0)
    return range(first, first + int(given.get("--num-seeds") or 0))


def pairs(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """(flag, value or None) of each flag, values joined by blanks."""
    found: list[tuple[str, str | None]] = []
    for word in argv:
        if re.match(r"--[a-zA-Z]", word):
            flag, equals, value = word.partition("=")
            found.append((flag.replace("_", "-"), value if equals else None))
        elif found:
            flag, old = found[-1]
            found[-1] = (flag, word if old is None else f"{old} {word}")
    return found
