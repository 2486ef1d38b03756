"""Runs of a study: found below directories, and their final errors by depth."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import linen as nn

from experiments.study_figures import Group
from flax_resnet import metrics, tables
from flax_resnet.errors import UserError, did_you_mean
from flax_resnet.inspection import read_record, variants
from flax_resnet.models import network_name
from flax_resnet.record import flatten, varying_fields
from flax_resnet.summary import summarize

# What does not set two series apart: seeds are averaged, sizes of stages are the depth.
MOST_NAMED = 4
NO_SERIES = ("seed", "model.stage_sizes", "model")


def find_groups(
    paths: Sequence[str | Path], say: Callable[[str], None] = lambda line: None
) -> list[Group]:
    """Runs by variant, with what each has logged.

    Several runs can be averaged and compared only where each has training and evaluation lines;
    one that has not yet is left out. A run that is alone stays, with what it has.

    Args:
      paths: each a run's working directory; a variant, which holds seed0, seed1, ...; or a sweep,
        which holds variants.
      say: is given a line for each run that is left out.

    Raises:
      UserError: a directory holds none of these, or no run that has logged enough.
    """
    found = []
    for path in (Path(p).expanduser() for p in paths):
        groups = variants(path)
        if groups[0][1] == [path] and (seeds := list(path.glob("seed*/config.json"))):
            say(f"{path} is a run itself, and is drawn; the {len(seeds)} seeds in it are not")
        found += groups
    lines = {w: metrics.read_metrics(w) for _, workdirs in found for w in workdirs}
    alone = sum(map(bool, lines.values())) == 1
    for workdir, own in lines.items():
        lacks = _lacks(own)
        if lacks and not (own and alone):
            lines[workdir] = []
            say(f"left out {workdir}: it has {lacks} yet")
    drawn = [Group(name, tuple(lines[w] for w in dirs if lines[w])) for name, dirs in found]
    if not any(group.runs for group in drawn):
        raise UserError(f"{' '.join(map(str, paths))}: no run has been evaluated yet: wait for it")
    return [group for group in drawn if group.runs]


def _lacks(lines: Sequence[Mapping[str, Any]]) -> str:
    """What a run has not logged of what is averaged, for a message; "" where it has all."""
    splits = {line["split"] for line in lines}
    if not splits:
        return "logged nothing"
    kinds = {"train": "no training line", "eval": "no evaluation line"}
    return " and ".join(text for split, text in kinds.items() if split not in splits)


def study_title(paths: Sequence[str | Path], count: int) -> str:
    """The networks and the data of all runs below paths, and n, how many of them are drawn."""
    found = [w for p in paths for _, dirs in variants(p) for w in dirs]
    configs = [read_record(workdir)[0] for workdir in found]
    networks = list(dict.fromkeys(network_name(config.model) for config in configs))
    data = list(dict.fromkeys(config.data.title for config in configs))
    many = f"{len(networks)} networks"
    of = ", ".join(networks) if len(networks) <= MOST_NAMED else many
    return f"{of} on {', '.join(data)}, n = {count} {'run' if count == 1 else 'runs'}"


def depth_points(
    directory: str | Path, by: str | None = None
) -> dict[str, list[tuple[int, float, float | None]]]:
    """Final errors of a sweep's finished runs, by series.

    Args:
      directory: holds table.csv, with a row for each run: its "workdir" below the directory,
        "state", "top1" and "train_top1".
      by: a field of the config, "model.connection": a series for each of its values. By default
        the fields that differ between the runs, but for the seed and the sizes of the stages.

    Returns:
      {series: [(weighted layers, top-1 error in %, training error in % or None)]}.

    Raises:
      UserError: there is no table, no finished run in it, or no such field.
    """
    directory = Path(directory).expanduser()
    rows = _finished(directory)
    runs = []
    for row in rows:
        config, record = read_record(directory / row["workdir"])
        runs.append((row, config.model, flatten(record["config"])))
    fields = _series_fields([flat for *_, flat in runs], by)
    points: dict[str, list[tuple[int, float, float | None]]] = {}
    for row, model, flat in runs:
        name = ", ".join(_label(field, flat.get(field)) for field in fields) or "all runs"
        train = row.get("train_top1")
        errors = (100 * (1 - float(row["top1"])), 100 * (1 - float(train)) if train else None)
        points.setdefault(name, []).append((depth(model), *errors))
    return points


@functools.cache
def depth(module: nn.Module) -> int:
    """Weighted layers on the main path, as He et al. 2016 count them.

    Shortcuts, the gates of highway networks and of squeeze-and-excitation are left out.
    """
    rows = summarize(module, (64, 64, 3)).rows
    beside = re.compile(r"(shortcut(_conv)?|gate)$|\bse\b")
    return sum(row.macs > 0 and not beside.search(row.name) for row in rows)


def _finished(directory: Path) -> list[dict[str, str]]:
    path = directory / "table.csv"
    try:
        rows = tables.read(directory)
    except OSError as error:
        raise UserError(
            f"{directory} holds no table.csv of a sweep ({error.strerror}): give a sweep's"
        ) from error
    if missing := {"state", "top1", "workdir"} - set(rows[0] if rows else ()):
        raise UserError(f"{path} has no column {min(missing)!r}, or no rows: give a sweep's table")
    finished = [row for row in rows if row["state"] == tables.FINISHED]
    if not finished:
        raise UserError(f"{path}: none of {len(rows)} runs is finished: wait for them")
    return finished


def _series_fields(flats: Sequence[Mapping[str, Any]], by: str | None) -> list[str]:
    if by is not None:
        known = {name for flat in flats for name in flat}
        if by not in known:
            raise UserError(
                f"--by {by}: no such field of the runs' configs{did_you_mean(by, known)}"
            )
        return [by]
    differ = set(varying_fields(flats))
    if "model" in differ:  # networks of several classes have few fields in common
        return ["model", *sorted(n for n in differ if not n.startswith(("model", "seed")))]
    return sorted(differ - set(NO_SERIES))


def _label(field: str, value: Any) -> str:
    return f"{value}" if isinstance(value, str) else f"{field.rpartition('.')[2]} {value}"
