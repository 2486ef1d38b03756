"""Experiment tracking: a run's config, metrics, figures and end, for TensorBoard or a server.

``TrainConfig.tracking`` is TensorBoard(), MLflow(), Wandb() or Off(), or a Tracking of your own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_resnet.record import flatten
from flax_resnet.tracking.base import About as About
from flax_resnet.tracking.base import End as End
from flax_resnet.tracking.base import Line as Line
from flax_resnet.tracking.base import Off as Off
from flax_resnet.tracking.base import TensorBoard as TensorBoard
from flax_resnet.tracking.base import Tracker as Tracker
from flax_resnet.tracking.base import Tracking as Tracking
from flax_resnet.tracking.events import Events as Events
from flax_resnet.tracking.follower import OPEN_SECONDS, ended_with, remembered, within
from flax_resnet.tracking.follower import Follower as Follower
from flax_resnet.tracking.to_mlflow import MLflow as MLflow
from flax_resnet.tracking.to_wandb import Wandb as Wandb

AnyTracking = TensorBoard | MLflow | Wandb | Off | Tracking
"""The classes that a flag can choose, and those that are not known here."""
FILES_ALONE = (TensorBoard, Off)


def check(chosen: Tracking) -> None:
    """Makes sure that a run can be tracked, before anything is compiled or written.

    Raises:
      UserError: it cannot.
    """
    if type(chosen) not in FILES_ALONE:
        within(OPEN_SECONDS, chosen.check, chosen.where)


@contextlib.contextmanager
def following(runs: Mapping[Path, Tracking]) -> Iterator[dict[Path, Follower]]:
    """Opens the trackers of runs; when the block ends they are told how, and closed.

    Nothing that a tracker does later raises or takes long: where it is behind at the end, a line
    on stderr says so.

    Args:
      runs: workdir, with its config.json, to what tracks the run.

    Yields:
      {workdir: what sends its lines} of those that have a tracker.

    Raises:
      UserError: one cannot be opened.
    """
    followers: dict[Path, Follower] = {}
    with ended_with(followers):
        for workdir, chosen in runs.items():
            if type(chosen) in FILES_ALONE:
                continue
            where = chosen.where
            about = _about(workdir, remembered(workdir, where).get("run_id"))
            opened = within(OPEN_SECONDS, functools.partial(chosen.open, about), where)
            if opened is not None:
                followers[workdir] = Follower(opened, where, workdir)
        yield followers


def _about(workdir: Path, run_id: str | None) -> About:
    record = json.loads((workdir / "config.json").read_text())
    place = workdir.resolve()
    seed = re.fullmatch(r"seed\d+", place.name) is not None
    return About(
        workdir=workdir,
        name=f"{place.parent.name}/{place.name}" if seed else place.name,
        group=str(place.parent) if seed else None,
        params=flatten(record["config"]),
        tags=_tags(place, record["starts"]),
        run_id=run_id,
    )


def _tags(workdir: Path, starts: list[dict[str, Any]]) -> dict[str, str]:
    """What the record says of the newest start, by dotted names."""
    start = starts[-1]
    git = start["git"] or {}
    kinds = start["devices"]
    found = {
        "workdir": str(workdir),
        "starts": len(starts),
        "python": start["python"],
        "platform": start["platform"],
        "processes": start["processes"],
        "devices": ", ".join(f"{kinds.count(k)} x {k}" for k in dict.fromkeys(kinds)),
        **({"git.commit": git["commit"], "git.changed": git["changed"]} if git else {}),
        **{f"package.{name}": version for name, version in start["packages"].items()},
    }
    return {name: str(value) for name, value in found.items()}
