"""Starts one run as several processes of this machine, for trials and for machines of many GPUs.

python -m experiments.launch.local --processes 2 --devices 4 -- -m experiments.digits --num-steps 20

What follows -- is a command; one that begins with a flag is Python's. Each process gets its number
and the coordinator's address in its environment (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
JAX_PROCESS_ID), which flax_resnet.distributed.hosts finds. With --devices each has so many virtual
CPU devices; without, NVIDIA GPUs that are there are split evenly among
them. Lines of output begin with [i].

SIGTERM and SIGINT go to all. When a process fails the others get a while to end by themselves, as
they do, and are ended then. The exit status is 0 when all have 0, else the first failing one's, 128
and its number for a signal. --restart R starts all anew, at most R times, after a status of 75
(preempted) or 1, or a signal; the same command goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from flax_resnet import UserError
from flax_resnet.cli import flags
from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.distributed.hosts import OURS, visible_gpus
from flax_resnet.distributed.preemption import EXIT_PREEMPTED
from flax_resnet.errors import POSITIVE, check_range

POLL_SECONDS = 0.05
AGAIN = (1, EXIT_PREEMPTED)
"""Exit statuses that a restart may help; a signal too."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many processes, of what."""

    processes: int = 2
    """How many."""
    devices: int | None = None
    """Virtual CPU devices of each. By default GPUs are split evenly, or each has the CPU."""
    restart: int = 0
    """Start all anew so many times at most."""
    grace: float = 30.0
    """Seconds that the others have to end by themselves, and again after SIGTERM."""

    def __post_init__(self) -> None:
        check_range("--processes", self.processes, 1)
        check_range("--devices", self.devices, 1)
        check_range("--restart", self.restart, 0)
        check_range("--grace", self.grace, POSITIVE)


def environments(settings: Settings, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each process; UserError where the GPUs cannot be split evenly."""
    count, found = settings.processes, []
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("", 0))
        address = f"localhost:{free.getsockname()[1]}"
    gpus = visible_gpus(environ) if settings.devices is None else []
    if environ.get("JAX_PLATFORMS") == "cpu":
        gpus = []
    if len(gpus) % count:
        raise UserError(
            f"--processes {count}: {len(gpus)} GPUs cannot be split evenly among them; "
            "--devices N gives each N virtual CPU devices instead"
        )
    for i in range(count):
        own = {**environ, "PYTHONUNBUFFERED": "1"}
        own |= dict(zip(OURS, (address, str(count), str(i)), strict=True))
        if settings.devices is not None:
            own |= {"JAX_NUM_CPU_DEVICES": str(settings.devices), "JAX_PLATFORMS": "cpu"}
        elif gpus:
            each = len(gpus) // count
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i * each : (i + 1) * each])
        found.append(own)
    return found


def launch(
    command: Sequence[str],
    settings: Settings,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Runs a command as several processes; the exit status of all.

    Raises:
      UserError: the command cannot be started.
    """
    for left in range(settings.restart, -1, -1):
        stopping: list[int] = []
        with _signals_to(stopping):
            status = _once(command, settings, environ, stopping)
        if status == 0 or stopping or not left or not (status in AGAIN or status > 128):
            break
        print(f"ended with status {status}: starts again ({left} times left)", flush=True)
    return status


def _once(
    command: Sequence[str],
    settings: Settings,
    environ: Mapping[str, str],
    stopping: list[int],
) -> int:
    children: list[subprocess.Popen[bytes]] = []
    readers = []
    try:
        for i, own in enumerate(environments(settings, environ)):
            # A session of its own: a terminal's Ctrl-C comes by way of this process, once.
            child = subprocess.Popen(
                command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
            children.append(child)
            for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                thread = threading.Thread(target=_copy, args=[i, source, sink], daemon=True)
                thread.start()
                readers.append(thread)
        return _wait(children, settings.grace, stopping)
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from None
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for thread in readers:
            thread.join(5)  # longer, a grandchild has the pipe


def _copy(number: int, source: IO[bytes] | None, sink: Any) -> None:
    assert source is not None
    with source:
        for line in source:
            text = line.decode(errors="replace").rstrip("\n")
            with contextlib.suppress(OSError, ValueError):
                sink.write(f"[{number}] {text}\n")
                sink.flush()


def _wait(children: list[subprocess.Popen[bytes]], grace: float, stopping: list[int]) -> int:
    """Waits until all have ended; the first failing one's status."""
    first = 0
    sent = 0  # of the signals that came
    ends: list[tuple[float, int]] = []  # what the rest get, and when
    while any(alive := [child.poll() is None for child in children]):
        for number in stopping[sent:]:
            _send(children, number)
        sent = len(stopping)
        failed = [child.returncode for child in children if child.returncode]
        if failed and not first:
            first, now = failed[0], time.monotonic()
            ends = [(now + grace, signal.SIGTERM), (now + 2 * grace, signal.SIGKILL)]
        if ends and time.monotonic() > ends[0][0]:
            left = [str(i) for i, one in enumerate(alive) if one]
            number = signal.Signals(ends.pop(0)[1])
            print(f"processes {', '.join(left)} still run: {number.name}", flush=True)
            _send(children, number)
        time.sleep(POLL_SECONDS)
    first = first or next((child.returncode for child in children if child.returncode), 0)
    return 128 - first if first < 0 else first


def _send(children: list[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


@contextlib.contextmanager
def _signals_to(stopping: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT are put into a list."""
    before = {
        number: signal.signal(number, lambda number, _: stopping.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: flags, --, a command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    at = argv.index("--") if "--" in argv else len(argv)
    with one_line_errors():
        about, prog = __doc__ or "", "python -m experiments.launch.local"
        settings = flags.cli(Settings, argv[:at], about, prog)
        command = argv[at + 1 :]
        if not command:
            raise UserError("no command: give one after --, such as -- -m experiments.digits")
        if command[0].startswith("-"):
            command = [sys.executable, *command]
        elif command[0] == "python":
            command = [sys.executable, *command[1:]]
        status = launch(command, settings)
    sys.exit(status)


if __name__ == "__main__":
    main()
