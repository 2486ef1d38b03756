"""Draws runs: curves and studies from what they logged, pictures from their checkpoints.

Claim: every figure of a run or of a sweep comes from its record alone: metrics.jsonl, table.csv,
a checkpoint and the data. Nothing is trained, but for ``lr``.

Of several runs (a working directory; a variant, which holds seedN; a sweep, which holds variants):
  curves         loss and error, training and evaluation; band: standard deviation over seeds
  paper          training error thin, test error bold, against steps (He et al. 2016, figures 1, 6)
  depth          error against depth, from a sweep's table.csv

Of one run's checkpoint:
  confusion, reliability, worst     on the evaluation split
  filters, maps, gradcam            what the network sees, of --images too
  pca, tsne                         the features in the plane
  augmented                         training images as training augments them
  lr                                the learning-rate finder (Smith 2017)

Command: python -m experiments.plots curves runs/digits
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from flax import linen as nn

from experiments import study_figures
from experiments.benchmarks.driver import note
from experiments.study_figures import Group
from flax_resnet import UserError, summarize
from flax_resnet.cli import flags
from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.cli.flags import flag
from flax_resnet.errors import POSITIVE, check_range, check_types, did_you_mean
from flax_resnet.inspection import PARTS, Session, open_run
from flax_resnet.models import network_name
from flax_resnet.records.configs import flatten, varying_fields
from flax_resnet.records.run_dir import CONFIG, read_config, read_metrics, read_record, variants
from flax_resnet.studies import tables

What = Literal[
    "curves", "paper", "depth", "confusion", "reliability", "worst", "filters", "maps",
    "gradcam", "pca", "tsne", "augmented", "lr",
]  # fmt: skip
# What does not set two series apart: seeds are averaged, sizes of stages are the depth.
MOST_NAMED = 4
NO_SERIES = ("seed", "model.stage_sizes", "model")
GROUPS = ("curves", "paper")
# Which pictures a flag is for; the others refuse it.
FLAGS: dict[str, tuple[str, ...]] = {
    "x": GROUPS,
    "by": ("depth",),
    "checkpoint": tuple(PARTS),
    "images": ("maps", "gradcam"),
    "count": ("worst", "gradcam"),
    "seed": ("tsne",),
    "lowest": ("lr",),
    "highest": ("lr",),
    "steps": ("lr",),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is drawn."""

    what: tyro.conf.Positional[What]
    """The picture, one of those above."""
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], flag("DIR [DIR ...]")] = ()
    """Working directories; for curves and paper also variants and sweeps; for depth one sweep."""
    output: Annotated[str | None, flag("FILE.png", "the first DIR/plots/WHAT.png")] = None
    """The file to write."""
    title: Annotated[str | None, flag("TEXT", "what is drawn, of what")] = None
    """Above the curves, paper and depth figures."""
    x: Annotated[Literal["step", "epoch"] | None, flag("{step,epoch}", "paper: step")] = None
    """What curves are placed by."""
    by: Annotated[str | None, flag("FIELD", "the fields that differ")] = None
    """Field of the config with a series for each of its values, such as model.connection."""
    checkpoint: Annotated[Literal["best", "latest"] | None, flag("{best,latest}", "best")] = None
    """Which checkpoint to look into: the best by evaluation top-1, or the latest."""
    images: Annotated[tuple[str, ...], flag("PATH [PATH ...]", "the evaluation split's")] = ()
    """Images, or folders of them, of any size."""
    count: Annotated[int | None, flag("N", "12")] = None
    """Examples in the picture."""
    seed: Annotated[int | None, flag("N", "0")] = None
    """Of t-SNE."""
    lowest: Annotated[float | None, flag("RATE", "1e-5")] = None
    """First learning rate of lr."""
    highest: Annotated[float | None, flag("RATE", "10")] = None
    """Last learning rate of lr."""
    steps: Annotated[int | None, flag("N", "100")] = None
    """Steps of lr at most."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.paths:
            raise UserError(f"{self.what}: no directory is given: expected a run's, such as runs/x")
        if self.what not in GROUPS and len(self.paths) > 1:
            raise UserError(f"{self.what} is of one directory, {len(self.paths)} are given")
        for name, least in {"count": 1, "seed": 0, "steps": 3, "lowest": POSITIVE}.items():
            check_range(f"--{name}", getattr(self, name), least)
        for name, pictures in FLAGS.items():
            if getattr(self, name) not in (None, ()) and self.what not in pictures:
                raise UserError(f"--{name} is for {', '.join(pictures)}, not for {self.what}")
        if self.title is not None and self.what in PARTS:
            raise UserError(f"--title is for curves, paper and depth, not for {self.what}")


def find_groups(
    paths: Sequence[str | Path], say: Callable[[str], None] = lambda line: None
) -> list[Group]:
    """Runs by variant, with what each has logged.

    Several runs can be averaged and compared only where each has training and evaluation lines;
    one that has not yet is left out, and ``say`` is given a line. A run that is alone stays, with
    what it has.

    Raises:
      UserError: a directory holds none of these, or no run that has logged enough.
    """
    found = []
    for path in (Path(p).expanduser() for p in paths):
        groups = variants(path)
        if groups[0][1] == [path] and (seeds := list(path.glob(f"seed*/{CONFIG}"))):
            say(f"{path} is a run itself, and is drawn; the {len(seeds)} seeds in it are not")
        found += groups
    lines = {w: read_metrics(w) for _, workdirs in found for w in workdirs}
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
    configs = [read_config(workdir) for workdir in found]
    networks = list(dict.fromkeys(network_name(config.model) for config in configs))
    data = list(dict.fromkeys(config.data.title for config in configs))
    of = ", ".join(networks) if len(networks) <= MOST_NAMED else f"{len(networks)} networks"
    return f"{of} on {', '.join(data)}, n = {count} {'run' if count == 1 else 'runs'}"


def depth_points(
    directory: str | Path, by: str | None = None
) -> dict[str, list[tuple[int, float, float | None]]]:
    """Final errors of the finished runs in a sweep's table.csv, by series.

    There is a series for each value of the config's field ``by``, by default of the fields that
    differ between the runs, but for the seed and the sizes of the stages.

    Returns:
      {series: [(weighted layers, top-1 error in %, training error in % or None)]}.

    Raises:
      UserError: there is no table, no finished run in it, or no such field.
    """
    directory = Path(directory).expanduser()
    rows = _finished(directory)
    runs = []
    for row in rows:
        workdir = directory / row["workdir"]
        flat = flatten(read_record(workdir)["config"])
        runs.append((row, read_config(workdir).model, flat))
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


def draw(settings: Settings, path: Path) -> str:
    """Draws what is asked for; returns a line on how to read it, or nothing."""
    if settings.what in GROUPS:
        groups = find_groups(settings.paths, note)
        count = sum(len(group.runs) for group in groups)
        title = settings.title or study_title(settings.paths, count)
        if settings.what == "paper":
            study_figures.training_and_test(groups, path, title, settings.x or "step")
        else:
            study_figures.bands(groups, path, title, settings.x or "epoch")
        return ""
    if settings.what == "depth":
        points = depth_points(settings.paths[0], settings.by)
        title = settings.title or study_title(settings.paths, sum(map(len, points.values())))
        study_figures.error_by_depth(points, path, title)
        return ""
    names = {name: name for name in ("count", "seed", "lowest", "highest")}
    options = {to: getattr(settings, name) for name, to in {**names, "steps": "rate_steps"}.items()}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    run = open_run(settings.paths[0], settings.checkpoint or "best")
    return PARTS[settings.what].draw(Session(run, settings.images, say=note, **given), path)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws one picture and says where it is."""
    with one_line_errors():
        settings = flags.cli(Settings, argv, __doc__ or "", "python -m experiments.plots")
        first = Path(settings.paths[0]).expanduser()
        if not first.is_dir():
            raise UserError(f"{first}: no such directory: give a run's, a variant's or a sweep's")
        path = first / "plots" / f"{settings.what}.png"
        if settings.output is not None:
            path = Path(settings.output).expanduser()
        try:
            if settings.output is None:
                path.parent.mkdir(exist_ok=True)
            text = draw(settings, path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error
        print(*([text] if text else []), f"figure: {path}", sep="\n")


if __name__ == "__main__":
    main()
