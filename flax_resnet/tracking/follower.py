"""Calls a run's tracker from a daemon thread, so that no tracker holds up or fails a run.

MLflow's and W&B's own queues retry for minutes and wait when Python ends.
"""

from __future__ import annotations

import collections
import contextlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_resnet.records import run_dir
from flax_resnet.records.configs import flatten
from flax_resnet.records.files import reason, shown
from flax_resnet.tracking.base import About, End, Line, TensorBoard, Tracker, Tracking, masked

FINISHED_SECONDS, STOPPED_SECONDS = 20.0, 8.0
"""How long a run waits for its trackers at its end: a finished run, and a stopped one."""
MAX_LINES = 100
"""Lines in one call of Tracker.write."""
FILES = (run_dir.CONFIG, run_dir.RESULT, "curves.png", "confusion.png")
_opening = threading.Lock()
"""Of several seeds, one makes MLflow's experiment."""


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
        workdir: Follower(tracking, workdir)
        for workdir, tracking in runs.items()
        if not isinstance(tracking, TensorBoard)
    }
    status, seconds = "FAILED", STOPPED_SECONDS
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


class Follower:
    """The thread that sends one run's lines to its tracker."""

    def __init__(self, tracking: Tracking, workdir: Path):
        """Sends nothing before ``follow``."""
        self._tracking, self._workdir = tracking, workdir
        self._tracker: Tracker | None = None
        self._unsent: list[Line] = []
        self._step = 0
        self._end: End | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._is_complete = False

    def follow(self, earlier: Sequence[Mapping[str, Any]], message: Callable[[str], None]) -> None:
        """Starts the thread; a new run of the tracker gets ``earlier`` lines of metrics.jsonl."""
        self._earlier, self._message = [_line(record) for record in earlier], message
        self._step = max((line.step for line in self._earlier), default=0)
        self._wake.set()
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Sends a record of metrics.jsonl; does not wait for it."""
        self._unsent.append(_line(record))
        self._step = record["step"]
        self._wake.set()

    def end(self, status: str) -> None:
        """Sends the end of the run; does not wait for it."""
        if self._thread.ident is None:  # the run ended before its first line
            self.follow((), lambda text: None)
        result = run_dir.finished(self._workdir) or {} if status == "FINISHED" else {}
        files = (self._workdir / name for name in (FILES if result else FILES[:1]))
        self._end = End(status, self._step, result, tuple(filter(Path.exists, files)))
        self._wake.set()

    def wait(self, deadline: float) -> None:
        """Waits until a time.monotonic() for the tracker to have everything, else says so."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._is_complete:
            _say(
                f"{self._tracking.where} did not get the end of the run and {len(self._unsent)} "
                f"lines; {self._workdir} has all of it"
            )

    def _work(self) -> None:
        """Sends what there is whenever it is woken, for the last time with the end."""
        end, has_warned = None, False
        while end is None:
            self._wake.wait()
            self._wake.clear()
            end = self._end
            try:
                self._tracker = self._tracker or self._open()
                while lines := self._unsent[:MAX_LINES]:
                    self._tracker.write(lines)
                    del self._unsent[: len(lines)]
                if end is not None:
                    self._tracker.close(end)
                    self._is_complete = True
            except Exception as error:
                if not has_warned:
                    _say(
                        f"{self._tracking.where} does not take the metrics "
                        f"({type(error).__name__}: {masked(reason(error))}): the run goes on, and "
                        "tries again with the next line"
                    )
                has_warned = True

    def _open(self) -> Tracker:
        where, path = self._tracking.where, self._workdir / "tracking.json"
        known = run_dir.read_json(path) or {}
        about = _about(self._workdir, known.get(where, {}).get("run_id"))
        with _opening:
            tracker = self._tracking.open(about)
        if tracker.run_id != about.run_id:
            self._unsent[:0] = self._earlier
        known[where] = {"run_id": tracker.run_id}
        # A full disk ends the run, not the tracker.
        with contextlib.suppress(OSError):
            run_dir.write_json(path, known)
        self._message(f"tracked by {masked(tracker.address) or where}")
        return tracker


def _about(workdir: Path, run_id: str | None) -> About:
    record = run_dir.read_record(workdir)
    params = flatten(record["config"])
    start, place = record["starts"][-1], workdir.resolve()
    group = place.parent if re.fullmatch(r"seed\d+", place.name) else None
    kinds = collections.Counter(start["devices"]).items()
    tags = {
        "workdir": place,
        "starts": len(record["starts"]),
        "devices": ", ".join(f"{count} x {kind}" for kind, count in kinds),
        **{name: start[name] for name in ("python", "platform", "processes")},
        **{f"git.{name}": value for name, value in (start["git"] or {}).items()},
        **{f"package.{name}": version for name, version in start["packages"].items()},
    }
    return About(
        workdir=workdir,
        name=shown(f"{group.name}/{place.name}" if group else place.name),
        group=shown(group) if group else None,
        params={n: shown(v) if isinstance(v, str) else v for n, v in params.items()},
        tags={name: shown(str(value)) for name, value in tags.items()},
        run_id=run_id,
    )


def _line(record: Mapping[str, Any]) -> Line:
    values = dict(record)
    split, step, epoch = (values.pop(name) for name in ("split", "step", "epoch"))
    return Line(split, step, epoch, values, time.time())


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"tracking: {text}", file=sys.stderr, flush=True)
