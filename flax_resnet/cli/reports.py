"""The commands report and compare: runs in one HTML file, and side by side."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from flax_resnet.cli.flags import Positional, Switch, flag, writing
from flax_resnet.errors import UserError
from flax_resnet.inspection.comparison import compare
from flax_resnet.inspection.html_report import report
from flax_resnet.inspection.run import Which
from flax_resnet.records.run_dir import read_config


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a run's data are now, if they have moved."""

    folder: Annotated[str | None, flag("DIR", "as recorded")] = None
    """The folder of images that the run was trained on."""
    data_dir: Annotated[str | None, flag("DIR", "as recorded")] = None
    """Directory that holds NAME/VERSION of a tfds set."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Writes one HTML file with a run's result, config and environment, its curves, confusion
    matrix and reliability diagram, its worst-classified examples, filters, feature maps,
    Grad-CAM, an embedding of its features, and augmented training images. It needs no network
    to open.

    Examples:
      flax-resnet report runs/digits
      flax-resnet report runs/digits --images PHOTOS --lr-finder --output digits.html
    """

    workdir: Annotated[Positional[str], flag("WORKDIR")]
    """A run's working directory."""
    output: Annotated[str | None, flag("FILE.html", "WORKDIR/report.html")] = None
    """The file to write, whole or not at all."""
    checkpoint: Which = "best"
    """Look at the best checkpoint by evaluation top-1, or at the latest."""
    images: Annotated[tuple[str, ...], flag("PATH [PATH ...]", "the evaluation split's")] = ()
    """Images, or folders of them, of any size, for feature maps and Grad-CAM."""
    lr_finder: Switch = False
    """Run the learning-rate finder too, which trains for up to 100 steps."""
    seed: int = 0
    """Of t-SNE."""
    data: Places = Places()


def write_report(settings: Report) -> None:
    """``flax-resnet report``."""
    read_config(settings.workdir)  # before the output is opened
    options = dataclasses.asdict(settings)
    workdir, output = options.pop("workdir"), options.pop("output")
    options |= options.pop("data")
    output = output or str(Path(workdir) / "report.html")
    with writing(output) as file:
        file.write(report(workdir, say=lambda line: print(line, file=sys.stderr), **options))
    print(f"report: {output}")


@dataclasses.dataclass(frozen=True)
class Compare:
    """Sets runs side by side: the fields of the config in which they differ, and their results,
    of several seeds mean and deviation.

    Examples:
      flax-resnet compare runs/digits runs/adamw
      flax-resnet compare runs/ablations/depth --output depth.md
    """

    runs: Annotated[Positional[tuple[str, ...]], flag("RUN [RUN ...]")] = ()
    """Working directories of runs, or directories that hold seed0, seed1, ... or variants."""
    output: Annotated[str | None, flag("FILE.md")] = None
    """Write to this file, whole or not at all, instead of the standard output."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no runs are given: expected two or more working directories")


def write_comparison(settings: Compare) -> None:
    """``flax-resnet compare``."""
    text = compare(settings.runs)
    with writing(settings.output) as file:
        file.write(text)
