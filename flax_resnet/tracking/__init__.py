"""Experiment tracking: a run's config, metrics, figures and end, for TensorBoard or a server.

``TrainConfig.tracking`` is TensorBoard(), MLflow(), Wandb() or Off(), or a Tracking of your own.
"""

from __future__ import annotations

import collections
import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flax_resnet.record import flatten
from flax_resnet.tracking.base import About as About
from flax_resnet.tracking.base import End as End
from flax_resnet.tracking.base import Line as Line
from flax_resnet.tracking.base import Off as Off
from flax_resnet.tracking.base import Status as Status
from flax_resnet.tracking.base import TensorBoard as TensorBoard
from flax_resnet.tracking.base import Tracker as Tracker
from flax_resnet.tracking.base import Tracking as Tracking
from flax_resnet.tracking.follower import FINISHED_SECONDS, STOPPED_SECONDS, remembered
from flax_resnet.tracking.follower import Follower as Follower
from flax_resnet.tracking.to_mlflow import MLflow as MLflow
from flax_resnet.tracking.to_wandb import Wandb as Wandb

AnyTracking = TensorBoard | MLflow | Wandb | Off | Tracking
"""The classes that a flag can choose, and a user's own."""


@contextlib.contextmanager
def following(runs: Mapping[Path, Tracking]) -> Iterator[dict[Path, Follower]]:
    """Has trackers follow runs; when the block ends, tells them how and waits a limited time.

    Nothing that a tracker does raises here: a line on stderr says what it could not do.

    Args:
      runs: the tracker of each workdir, which holds config.json.

    Yields:
      {workdir: the thread that sends its lines} of the runs that have a tracker.
    """
    followers = {
        workdir: Follower(chosen, _about(workdir, chosen.where))
        for workdir, chosen in runs.items()
        if not isinstance(chosen, TensorBoard)
    }
    status: Status = "FAILED"
    seconds = STOPPED_SECONDS
    try:
        yield followers
        status, seconds = "FINISHED", FINISHED_SECONDS
    except KeyboardInterrupt:  # Preempted is one
        status = "KILLED"
        raise
    finally:
        for follower in followers.values():
            follower.end(status)
        deadline = time.monotonic() + seconds
        for follower in followers.values():
            follower.wait(deadline)


def _about(workdir: Path, where: str) -> About:
    record = json.loads((workdir / "config.json").read_text())
    place = workdir.resolve()
    is_seed = re.fullmatch(r"seed\d+", place.name) is not None
    start = record["starts"][-1]
    devices = collections.Counter(start["devices"])
    tags = {
        "workdir": place,
        "starts": len(record["starts"]),
        **{name: start[name] for name in ("python", "platform", "processes")},
        "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
        **{f"git.{name}": value for name, value in (start["git"] or {}).items()},
        **{f"package.{name}": version for name, version in start["packages"].items()},
    }
    return About(
        workdir=workdir,
        name=f"{place.parent.name}/{place.name}" if is_seed else place.name,
        group=str(place.parent) if is_seed else None,
        params=flatten(record["config"]),
        tags={name: str(value) for name, value in tags.items()},
        run_id=remembered(workdir).get(where, {}).get("run_id"),
    )
