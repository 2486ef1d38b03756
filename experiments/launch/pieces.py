"""What launchers share that do a long list of commands in pieces, each ended before a limit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_resnet import UserError
from flax_resnet.errors import POSITIVE, check_range

EXIT_AGAIN = 75
LEAST_SECONDS = 20
GRACE_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all of them are told."""

    data_dir: str | None = None
    """Directory that holds cifar10."""
    minutes: float = 9.0
    """End after this many."""
    trial: bool = False
    """Small networks, a few steps, and the bundled digits, on the CPU."""

    def __post_init__(self) -> None:
        check_range("--minutes", self.minutes, POSITIVE)
        if self.data_dir is None and not self.trial:
            raise UserError("--data-dir: name the directory that holds cifar10 (or --trial)")


def run(
    command: Sequence[str],
    log: Path,
    end: float,
    environment: Mapping[str, str],
    *,
    output: Path | None = None,
    least: float = LEAST_SECONDS,
) -> bool:
    """Runs a command until it ends, True, or until ``end`` (of time.monotonic), False.

    What it prints is added to ``log``; ``output`` is written anew with its standard output. With
    less than ``least`` seconds left it is not started. Raises UserError where it fails.
    """
    if end - time.monotonic() < least:
        return False
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(log.open("a"))
        out = stack.enter_context(output.open("w")) if output else errors
        child = subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
        try:
            status = child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
    if status:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{shlex.join(command)} ended with status {status}: {last}; see {log}")
    return True


def _end(child: subprocess.Popen) -> None:
    """Ends a command and what it started, if it still runs."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that a child in its own session is ended too."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(done: bool) -> None:
    """Ends this process: with 0 where all is done, with 75 where the time was up."""
    if not done:
        print("the time is up: start the same command again", flush=True)
    sys.exit(0 if done else EXIT_AGAIN)
