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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments import study_figures
from experiments.study_runs import depth_points, find_groups, study_title
from flax_resnet import flags
from flax_resnet.classify import flag
from flax_resnet.errors import POSITIVE, UserError, check_choices, check_range
from flax_resnet.inspection import PARTS, Session, open_run
from flax_resnet.main import one_line_errors

What = Literal[
    "curves", "paper", "depth", "confusion", "reliability", "worst", "filters", "maps",
    "gradcam", "pca", "tsne", "augmented", "lr",
]  # fmt: skip
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
        check_choices(self)
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


def say(line: str) -> None:
    """A line on the standard error."""
    print(line, file=sys.stderr, flush=True)


def draw(settings: Settings, path: Path) -> str:
    """Draws what is asked for; returns a line on how to read it, or nothing."""
    if settings.what in GROUPS:
        groups = find_groups(settings.paths, say)
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
    options: dict[str, Any] = {
        "count": settings.count,
        "seed": settings.seed,
        "lowest": settings.lowest,
        "highest": settings.highest,
        "rate_steps": settings.steps,
    }
    given = {name: value for name, value in options.items() if value is not None}
    run = open_run(settings.paths[0], settings.checkpoint or "best")
    return PARTS[settings.what].draw(Session(run, settings.images, say=say, **given), path)


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
