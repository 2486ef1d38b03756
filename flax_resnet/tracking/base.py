"""The interface between a run and a tracker, for which TensorBoard, MLflow and W&B are examples.

A subclass of Tracking is a frozen dataclass, which is a field of the run's config. Its ``open``
returns a Tracker. Both are called from one background thread, so they may take their time.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from flax_resnet.errors import import_extra


class Line(NamedTuple):
    """A line of metrics.jsonl.

    Attributes:
      split: "train" or "eval".
      step: optimizer steps done.
      epoch: epochs done.
      values: metrics by name.
      time: when the line was written, in seconds since 1970.
    """

    split: str
    step: int
    epoch: float
    values: Mapping[str, float]
    time: float

    @property
    def named(self) -> dict[str, float]:
        """The values and the epoch under "train/loss" and the like."""
        return {f"{self.split}/{n}": v for n, v in {**self.values, "epoch": self.epoch}.items()}


@dataclasses.dataclass(frozen=True)
class About:
    """The run that a tracker opens for.

    Attributes:
      workdir: the run's working directory.
      name: name of the run, "digits" or "digits/seed0".
      group: directory that holds the workdirs of all seeds of one config; None for a single run.
      params: the config, by dotted field names.
      tags: git commit, package versions, devices and the like of this start.
      run_id: Tracker.run_id of an earlier start of the run; None at the first start.
    """

    workdir: Path
    name: str
    group: str | None
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    run_id: str | None

    def named(self, name: str | None) -> str:
        """The name that the config gives, with the seed where there are several; else ``name``."""
        if name is None:
            return self.name
        return name if self.group is None else f"{name}/{self.workdir.name}"


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
      status: "FINISHED", "FAILED", or "KILLED" (stopped: the same command resumes the run).
      step: step of the last line.
      result: contents of result.json; empty unless the run is finished.
      files: config.json, and of a finished run also result.json and the figures.
    """

    status: str
    step: int
    result: Mapping[str, Any]
    files: tuple[Path, ...]


class Tracker(abc.ABC):
    """An open run of a tracker. One thread makes all calls, one after another.

    Attributes:
      run_id: is kept in the workdir and given to ``open`` when the run is started again.
      address: URL where a person sees the run; "" if there is none.
    """

    run_id: str = ""
    address: str = ""

    @abc.abstractmethod
    def write(self, lines: Sequence[Line]) -> None:
        """Takes new lines, in order; after an exception the same lines are given again."""

    @abc.abstractmethod
    def close(self, end: End) -> None:
        """Ends the tracker's run; no call follows."""


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Where a run's numbers go besides metrics.jsonl: subclass it for a tracker of your own."""

    events: ClassVar[bool] = True
    """Whether tensorboard/ is written as well."""
    package: ClassVar[str] = ""
    """A package that it needs, which the extra of the same name brings."""

    @property
    def where(self) -> str:
        """Name of the tracker in messages and in tracking.json, without secrets."""
        return type(self).__name__

    def check(self) -> None:
        """Raises UserError if it cannot be used, before anything is compiled or written."""
        if self.package:
            import_extra(self.package, self.package)

    def open(self, about: About) -> Tracker:
        """Begins the run, or resumes ``about.run_id``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TensorBoard(Tracking):
    """Events in WORKDIR/tensorboard, which MLflow and W&B leave as well; the run writes them."""


@dataclasses.dataclass(frozen=True)
class Off(TensorBoard):
    """metrics.jsonl alone."""

    events: ClassVar[bool] = False


def masked(text: str) -> str:
    """A text with the user and password of every URL in it replaced."""
    return re.sub(r"://[^/\s]*@", "://***@", text)
