"""Being stopped from outside: SIGTERM and SIGINT as a question that the loop asks.

A run that is stopped saves a checkpoint at the step where it is, the same one in every process,
and its command ends with EXIT_PREEMPTED; the same command goes on from there, bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h, "try again later": launchers restart on it."""
# jax's agreement between processes wants a number that rises.
_asked = itertools.count(1)


class Preempted(KeyboardInterrupt):
    """A run was stopped from outside and saved what it has; the same command goes on."""


@contextlib.contextmanager
def restartable() -> Iterator[None]:
    """Ends a command that is stopped with EXIT_PREEMPTED, also by a SIGTERM before or after the
    training loop, when Python next looks: in a compilation that is when it is done."""

    def end(*_: Any) -> None:
        # No exception: one that leaves the middle of JAX's tracing takes the process down with it.
        os.write(2, b"SIGTERM outside of the training loop: stops, and nothing is lost\n")
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            sys.stdout.flush()
        os._exit(EXIT_PREEMPTED)

    before = signal.getsignal(signal.SIGTERM)
    if not jax.distributed.is_initialized():
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    except Preempted:
        sys.exit(EXIT_PREEMPTED)
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, before)


class Signals:
    """While it is entered, SIGTERM and SIGINT (Ctrl-C) ask the run to stop after its step.

    A second SIGINT ends the program at once. In another than the main thread nothing is taken.
    With several processes jax's preemption service takes SIGTERM, which stops all at one step.
    """

    def __init__(self, stop: Callable[[], bool] | None = None):
        """``stop`` is asked too."""
        self._stop = stop or (lambda: False)
        self._told = self._sent = False
        self._came: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            kinds = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._before = {kind: signal.signal(kind, self._take) for kind in kinds}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._came is not None and not self._told and error is None:
            signal.raise_signal(self._came)  # too late for this run; not for what comes after it

    def _take(self, number: int, _: Any) -> None:
        again, self._came = self._came is not None, signal.Signals(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Not print: a signal may come while the same stream is being written.
        line = f"{self._came.name}: stops after this step, and saves (Ctrl-C again: at once)\n"
        os.write(2, line.encode())

    def __call__(self) -> bool:
        """Whether to stop here; once it is so it stays so.

        With several processes each has to ask equally often, and all hear the same.
        """
        if not self._told:
            asks = self._came is not None or self._stop()
            if jax.process_count() > 1:
                if asks and not self._sent:
                    self._sent = True
                    os.kill(os.getpid(), signal.SIGTERM)  # jax's service passes it on
                asks = bool(multihost_utils.reached_preemption_sync_point(next(_asked)))
            self._told = asks
        return self._told
