"""The interface between a run and what shows its numbers: what either side is given.

A tracker's config is a frozen dataclass, a subclass of Tracking: it is a field of the run's config.
What its ``open`` gives is a Tracker, which is called from one background thread: it may take its
time, and what it raises is tried again. metrics.jsonl has everything whatever becomes of it.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple
from urllib.parse import urlsplit

from flax_resnet.errors import UserError

Status = Literal["FINISHED", "FAILED", "KILLED"]
Place = tuple[int, str]
"""The step and the split of a line."""
REACH_SECONDS = 5.0


class Line(NamedTuple):
    """A line of metrics.jsonl.

    Attributes:
      split: "train" or "eval".
      step: optimizer steps done.
      epoch: epochs done.
      values: by name.
      time: seconds since 1970 when it was read, the same when it is written again.
    """

    split: str
    step: int
    epoch: float
    values: Mapping[str, float]
    time: float

    @property
    def place(self) -> Place:
        """Where it stands among the others."""
        return self.step, self.split

    @property
    def named(self) -> dict[str, float]:
        """The values and the epoch under "train/loss" and the like."""
        return {f"{self.split}/{n}": v for n, v in {**self.values, "epoch": self.epoch}.items()}


def order(place: Place | None) -> tuple[int, bool]:
    """Lines are in this order; None comes before all."""
    return (-1, False) if place is None else (place[0], place[1] != "train")


@dataclasses.dataclass(frozen=True)
class About:
    """The run that a tracker opens for.

    Attributes:
      workdir: the run's.
      name: of the run, "digits" or "digits/seed0".
      group: what the seeds of one config have in common, the directory of their workdirs; None of
        a run by itself.
      params: the config, by dotted names.
      tags: git commit, packages, devices and the like, of this start.
      run_id: what Tracker.run_id was at an earlier start of the run; None at the first.
    """

    workdir: Path
    name: str
    group: str | None
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    run_id: str | None

    def named(self, name: str | None) -> str:
        """A name that the config gives, of a seed with the seed, or else the run's own."""
        if name is None:
            return self.name
        return name if self.group is None else f"{name}/{self.workdir.name}"


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
      status: "FINISHED"; "KILLED", it was stopped and the same command goes on; or "FAILED".
      step: of its last line.
      result: what result.json holds; empty of a run that is not finished.
      files: config.json, and of a finished run result.json and the figures.
    """

    status: Status
    step: int
    result: Mapping[str, Any]
    files: tuple[Path, ...]


class Tracker(abc.ABC):
    """One run, open. All calls come from one thread, one after another.

    Attributes:
      run_id: is kept in the workdir and given to ``open`` when the run is started again.
      sent: the last line that it has, where it can say; None: as it was left in the workdir.
      address: where a person sees the run; "" where there is no such place.
    """

    run_id: str = ""
    sent: Place | None = None
    address: str = ""

    @abc.abstractmethod
    def write(self, lines: Sequence[Line]) -> None:
        """Takes lines, in order, none twice; after an exception the same ones are given again."""

    def rewind(self, step: int) -> None:
        """The run went back to a step (``guard.skips``): the steps after it come again, other ones.

        What the tracker has of them may stay.
        """
        return

    @abc.abstractmethod
    def close(self, end: End) -> None:
        """Nothing comes after it."""


@dataclasses.dataclass(frozen=True)
class Tracking(abc.ABC):
    """Where a run's numbers go besides metrics.jsonl: subclass it for a tracker of your own."""

    events: ClassVar[bool] = True
    """Whether tensorboard/ is written as well."""

    @property
    def where(self) -> str:
        """What messages call it, and what tracking.json keeps its run by; without secrets."""
        return type(self).__name__

    def check(self) -> None:
        """Is called before anything is written or compiled.

        Raises:
          UserError: it cannot be used.
        """
        return

    @abc.abstractmethod
    def open(self, about: About) -> Tracker | None:
        """Begins the run, or goes on with ``about.run_id``; None where there is nothing to do."""


@dataclasses.dataclass(frozen=True)
class TensorBoard(Tracking):
    """Events in WORKDIR/tensorboard, which the other trackers leave as well."""

    def open(self, about: About) -> None:
        """Nothing besides the events."""
        return


@dataclasses.dataclass(frozen=True)
class Off(Tracking):
    """metrics.jsonl alone."""

    events: ClassVar[bool] = False

    def open(self, about: About) -> None:
        """Nothing."""
        return


def check_installed(package: str) -> None:
    """Raises UserError where the package, named as its extra, is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--tracking {package}: {package} is not installed: "
            f"pip install 'flax_resnet[{package}]'"
        )


def masked(text: str) -> str:
    """A text with the user and password of every URL in it replaced."""
    return re.sub(r"://[^/\s]*@", "://***@", text)


def reach(address: str | None) -> None:
    """Raises OSError where nobody listens at the address of a server."""
    parts = urlsplit(address or "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return
    from requests.utils import get_environ_proxies

    if get_environ_proxies(address or ""):
        return
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    socket.create_connection((parts.hostname, port), REACH_SECONDS).close()
