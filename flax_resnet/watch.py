"""A watchdog: says where a run has stopped, and ends a process that others would wait for.

Heartbeats come from threads of their own, so a process whose main thread is stuck looks alive to
the others. The loop says here what it does next; when that has taken too long, a line and the
stack of the main thread say where, and the process ends. The last resort is faulthandler's timer,
which needs no Python: it ends a process whose main thread keeps the interpreter to itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from flax_resnet.errors import POSITIVE, check_range

SETTING_UP = "setting up"
COMPILING = "compiling"
WAITING = "waiting for data"
STEP = "in a training step"
EVALUATING = "evaluating"
SAVING = "saving a checkpoint"
RECORDING = "writing the record"
FIRST = (WAITING, COMPILING, RECORDING)
"""Phases that no other process can hold up: the process that is in one is the cause."""
LATER = 1.1
"""The others, who wait for that one, are given so many times as long: it says the line."""
SO_FAR = "{2} takes {0:.0f} s so far"
"""The report of phases that may take long: set-up, compilation, the record."""
STALLED = {
    WAITING: "no batch for {0:.0f} s: the input pipeline is stalled (step {1}); a slow disk, too "
    "few workers, or a blocked reader",
    STEP: "a training step takes {0:.0f} s so far (step {1}): the device is stuck, or another "
    "process keeps it waiting",
    EVALUATING: "no evaluation batch for {0:.0f} s (step {1}): stalled",
    SAVING: "saving a checkpoint takes {0:.0f} s so far (step {1}): the storage is stalled",
}
STDERR = 2


def print_report(text: str) -> None:
    """Prints a report on stderr."""
    print(text, file=sys.stderr, flush=True)


class Watch:
    """Watches the main loop's progress from a thread; a context manager.

    Reports each stall once. With a limit it ends the process when the limit is exceeded.
    """

    def __init__(
        self,
        limit: float | None,
        say: Callable[[str], None] = print_report,
        report_after: float = 60,
        *,
        who: str | None = None,
        end: Callable[[str, int], Any] | None = None,
    ):
        """Nothing is watched before the block is entered.

        Args:
          limit: seconds without progress after which the process ends; None only reports.
          say: prints a report; whatever it raises is passed over.
          report_after: seconds without progress after which it is reported.
          who: the process, where there are several: "process 1 of 2".
          end: gets that line and the exit status, and does not return; by default prints the
            line and calls os._exit.

        Raises:
          UserError: a time is not more than 0.
        """
        check_range("step_timeout", limit, POSITIVE)
        check_range("report_after", report_after, POSITIVE)
        self.limit = limit
        self.report_after = report_after
        self.who = who
        self._say = say
        self._end = end or end_now
        self._at: tuple[str, int] = ("starting", 0)  # a new tuple is a step onwards
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def at(self, phase: str, step: int) -> None:
        """Progress: the loop begins ``phase``, after ``step`` steps. Costs next to nothing."""
        self._at = (phase, step)

    def __enter__(self) -> Watch:
        self._main = threading.get_ident()
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
            after = LATER * self.limit + max(1.0, min(30.0, self.limit / 4))
            faulthandler.dump_traceback_later(after, exit=True, file=STDERR)

    def _run(self) -> None:
        shortest = min(self.report_after, self.limit or self.report_after)
        every = min(1.0, shortest / 10)
        seen, since, said = self._at, time.monotonic(), False
        while not self._closed.wait(every):
            now = self._at
            if now is not seen:
                seen, since, said = now, time.monotonic(), False
                self._arm()
                continue
            stalled = time.monotonic() - since
            phase, step = seen
            if self.limit is not None and stalled > self.limit * (1 if phase in FIRST else LATER):
                self._stop(phase, step, stalled)
            elif stalled > self.report_after and not said:
                said = True
                text = STALLED.get(phase, SO_FAR).format(stalled, step, phase)
                with contextlib.suppress(Exception):  # the terminal may be gone; the watch stays
                    self._say(f"{self.who}: {text}" if self.who else text)

    def _stop(self, phase: str, step: int, stalled: float) -> None:
        who = self.who or "the process"
        line = (
            f"{who}: stuck for {stalled:.0f} s {phase} after step {step}: ends, so that the "
            "others do too"
        )
        stack = sys._current_frames().get(self._main)
        if stack is not None:  # the main thread's alone; a report of all threads hides it
            said = "".join(traceback.format_stack(stack))
            os.write(STDERR, f"Where {who} is (most recent call last):\n{said}".encode())
        self._end(line, 1)


def end_now(line: str, status: int) -> None:
    """Prints a line on stderr and ends the process at once, without what Python does at exit."""
    os.write(STDERR, (line + "\n").encode())  # first: JAX may be about to abort the process
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(status)
