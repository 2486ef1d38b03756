"""Calls a run's tracker from a daemon thread, so that no tracker holds up or fails a run.

MLflow's and W&B's own queues retry for minutes and wait when Python ends, and a user's tracker may
have no queue. So one thread makes all calls, and the run waits for it once, at its end.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_resnet.files import replacing
from flax_resnet.tracking.base import About, End, Line, Status, Tracker, Tracking, masked

FINISHED_SECONDS, STOPPED_SECONDS = 20.0, 8.0
"""How long a run waits for its trackers at its end: a finished run, and a stopped one."""
MAX_LINES = 100
"""Lines in one call of Tracker.write."""
END_TRIES = 3
FILES = ("config.json", "result.json", "curves.png", "confusion.png")
_opening = threading.Lock()
"""Of several seeds, one makes MLflow's experiment."""


class Follower:
    """The thread that sends one run's lines to its tracker."""

    def __init__(self, tracking: Tracking, about: About):
        """Sends nothing before ``follow``."""
        self._tracking, self._about = tracking, about
        self._tracker: Tracker | None = None
        self._unsent: list[Line] = []
        self._step = 0
        self._end: End | None = None
        self._wake, self._done = threading.Event(), threading.Event()
        self._is_complete = self._has_warned = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def follow(self, earlier: Sequence[Mapping[str, Any]], message: Callable[[str], None]) -> None:
        """Starts the thread.

        Args:
          earlier: records of metrics.jsonl, which a new run of the tracker gets first.
          message: prints a line for the user.
        """
        self._earlier, self._message = [_line(record) for record in earlier], message
        self._step = max((line.step for line in self._earlier), default=0)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Sends a record of metrics.jsonl; does not wait for it."""
        self._unsent.append(_line(record))
        self._step = record["step"]
        self._wake.set()

    def end(self, status: Status) -> None:
        """Sends the end of the run; does not wait for it."""
        if self._thread.ident is None:  # the run ended before its first line
            self.follow((), lambda text: None)
        workdir = self._about.workdir
        is_finished = status == "FINISHED" and (workdir / "result.json").exists()
        paths = [workdir / name for name in (FILES if is_finished else FILES[:1])]
        result = json.loads((workdir / "result.json").read_text()) if is_finished else {}
        self._end = End(status, self._step, result, tuple(p for p in paths if p.exists()))
        self._wake.set()

    def wait(self, deadline: float) -> None:
        """Waits until a time.monotonic() for the tracker to have everything, else says so."""
        self._done.wait(max(0.0, deadline - time.monotonic()))
        if not self._is_complete:
            _say(
                f"{self._tracking.where} did not get the end of the run and {len(self._unsent)} "
                f"lines; {self._about.workdir} has all of it"
            )

    def _work(self) -> None:
        tries = 0
        while True:
            end = self._end
            try:
                self._send(end)
            except Exception as error:
                self._warn(error)
            tries += end is not None
            if self._is_complete or tries == END_TRIES:
                break
            self._wake.wait(1.0 if tries else None)
            self._wake.clear()
        self._done.set()

    def _send(self, end: End | None) -> None:
        """Opens the tracker if it is not open, and sends what it does not have."""
        if self._tracker is None:
            with _opening:
                self._tracker = self._tracking.open(self._about)
            if self._tracker is None:
                self._is_complete = True
                return
            self._opened(self._tracker)
        while lines := self._unsent[:MAX_LINES]:
            self._tracker.write(lines)
            del self._unsent[: len(lines)]
        if end is not None:
            self._tracker.close(end)
            self._is_complete = True

    def _opened(self, tracker: Tracker) -> None:
        workdir, where = self._about.workdir, self._tracking.where
        if tracker.run_id != self._about.run_id:
            self._unsent[:0] = self._earlier
        known = remembered(workdir) | {where: {"run_id": tracker.run_id}}
        # A full disk ends the run, not the tracker.
        with contextlib.suppress(OSError), replacing(workdir / "tracking.json") as partial:
            partial.write_text(json.dumps(known, indent=2) + "\n")
        self._message(f"tracked by {masked(tracker.address) or where}")

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            reason = " ".join(masked(str(error)).split())[:200]
            _say(
                f"{self._tracking.where} does not take the metrics ({type(error).__name__}: "
                f"{reason}): the run goes on, and tries again with the next line"
            )


def remembered(workdir: Path) -> dict[str, Any]:
    """What tracking.json holds: {Tracking.where: {"run_id": of the tracker's run}}."""
    try:
        found = json.loads((workdir / "tracking.json").read_text())
        return {where: entry for where, entry in found.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _line(record: Mapping[str, Any]) -> Line:
    values = dict(record)
    split, step, epoch = (values.pop(name) for name in ("split", "step", "epoch"))
    return Line(split, step, epoch, values, time.time())


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"tracking: {text}", file=sys.stderr, flush=True)
