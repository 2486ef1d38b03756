"""A watchdog: says where a run has stopped, and ends a process that others would wait for.

JAX's heartbeats come from its own threads, so a stuck process looks alive to the others. Here a
thread reports the stall, and faulthandler's timer, which needs no Python, ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
import time
from typing import Any

SETTING_UP = "setting up"
COMPILING = "compiling"
WAITING = "waiting for data"
STEP = "in a training step"
EVALUATING = "evaluating"
SAVING = "saving a checkpoint"
RECORDING = "writing the record"


def print_report(text: str) -> None:
    """Prints a report on stderr."""
    print(text, file=sys.stderr, flush=True)


class Watch:
    """While it is entered, watches the main loop's progress, and reports each stall once.

    Args:
      limit: seconds without progress after which the process ends with status 1; None: never.
      report_after: seconds without progress after which stderr says so.
      who: the process, where there are several: "process 1 of 2".
    """

    def __init__(self, limit: float | None, report_after: float = 60, who: str = ""):
        self.limit, self.report_after, self.who = limit, report_after, who
        self._at = ("starting", 0)  # a new tuple is progress
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def at(self, phase: str, step: int) -> None:
        """Progress: the loop begins ``phase``, after ``step`` steps. Costs next to nothing."""
        self._at = (phase, step)

    def __enter__(self) -> Watch:
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self._thread.join(1)
        if self.limit is not None:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        if self.limit is not None:
            faulthandler.dump_traceback_later(self.limit, exit=True, file=2)

    def _run(self) -> None:
        every = min(1.0, min(self.report_after, self.limit or self.report_after) / 10)
        seen, since, is_reported = self._at, time.monotonic(), False
        while not self._closed.wait(every):
            if self._at is not seen:
                seen, since, is_reported = self._at, time.monotonic(), False
                self._arm()
            elif not is_reported and (seconds := time.monotonic() - since) > self.report_after:
                is_reported = True
                phase, step = seen
                who = self.who and f"{self.who}: "
                with contextlib.suppress(OSError):  # the terminal may be gone; the watch stays
                    print_report(f"{who}{phase} for {seconds:.0f} s (step {step})")
