"""Processes that are built once and then asked in turn, by lines of JSON over their pipes.

Both ends are here: ``Worker`` in the process that asks, ``serve`` in the one that answers. It
imports no framework, so that a worker has only its own.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Device = Literal["cpu", "gpu"]
ROOT = Path(__file__).parents[2]
PROGRAM = "from experiments.benchmarks.workers import serve; from {} import build; serve(build)"
LONGEST = 240
"""Characters of a reason; compilers say more."""
GRACE = 10.0
"""Seconds that a worker has to end by itself."""
PAUSE = 0.1
"""Seconds before a turn: the threads of the one before may still spin."""
MEMORY = ("peak_rss_bytes", "device_peak_bytes")
"""What a worker says of its memory with every answer."""
EXTRAS = {"tensorflow": "prepare"}
"""Extras that install a framework, where it is not [parity]."""
NOT_INHERITED = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
"""Each worker has its framework's own: importing this library may have set what is for it alone."""


class WorkerError(RuntimeError):
    """A worker that cannot answer; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What answers in a worker: ``turn`` does so many steps and returns the seconds a step.

    ``about`` has JSON values; ``device_peak`` is the most bytes of an accelerator so far.
    """

    about: Mapping[str, Any]
    turn: Callable[[int], float]
    device_peak: Callable[[], int | None] = lambda: None


class Worker:
    """A process that serves what a module's ``build`` makes.

    ``about`` is what it said of itself then, with "build_seconds", its first step included.
    """

    def __init__(
        self,
        module: str,
        task: Mapping[str, Any],
        device: Device,
        cores: int,
        limit: float,
    ):
        """Starts it, and waits ``limit`` seconds at most until it is built.

        The module's ``build`` takes the task, JSON values, and returns a Built.

        Raises:
          WorkerError: it failed, or took longer.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(module), str(cores), json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment(os.environ, device, cores),
        )
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._listener = threading.Thread(
            target=self._said.extend, args=[self._process.stderr], daemon=True
        )
        self._listener.start()
        try:
            self.about = self._answer(limit)
        except BaseException:
            self.close()
            raise

    def ask(self, steps: int, limit: float) -> dict[str, Any]:
        """Has it do some steps: "seconds" and "cpu_seconds" a step, and its most memory so far.

        Raises:
          WorkerError: it failed, or took longer than ``limit`` seconds.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            print(json.dumps({"steps": steps}), file=self._process.stdin, flush=True)
        return self._answer(limit)

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(f"took more than {limit:g} s" if expired.is_set() else self._end())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _end(self) -> str:
        """How the process ended, and its last words."""
        status = self._process.wait()
        self._listener.join(GRACE)
        last = next((line for line in reversed(self._said) if line.strip()), "")
        how = f"died of signal {-status}" if status < 0 else f"ended with status {status}"
        return one_line(f"{how}: {last}" if last else how)

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(GRACE)  # a grandchild may still hold the pipe
        if self._process.stderr is not None and not self._listener.is_alive():
            self._process.stderr.close()


@dataclasses.dataclass
class Entrant:
    """A worker that takes turns with others, or why it does not."""

    name: str
    worker: Worker | None = None
    error: str | None = None
    """Why it is not measured."""
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What it answered in each round that counts."""

    @classmethod
    def start(cls, stack: contextlib.ExitStack, name: str, *worker: Any) -> Entrant:
        """Starts a worker with these arguments; the stack closes it."""
        entrant = cls(name)
        try:
            entrant.worker = Worker(*worker)
            stack.callback(entrant.worker.close)
        except WorkerError as error:
            entrant.error = str(error)
        return entrant

    @classmethod
    def built(cls, name: str, *worker: Any) -> Entrant:
        """One that has said all it has to say once it is built; its process has ended."""
        with contextlib.ExitStack() as stack:
            return cls.start(stack, name, *worker)

    @property
    def about(self) -> Mapping[str, Any]:
        """What the worker said when it was built."""
        return self.worker.about if self.worker else {}

    def values(self, field: str) -> list[float]:
        """A figure of the answers, round by round."""
        return [answer[field] for answer in self.answers]


def take_turns(steps: Sequence[tuple[Entrant, int]], rounds: int, limit: float) -> None:
    """Has each do its steps in each round, one after another; the first round is not counted."""
    for number in range(1 + rounds):
        for entrant, count in steps:
            if entrant.worker is None or entrant.error is not None:
                continue
            time.sleep(PAUSE)
            try:
                answer = entrant.worker.ask(count, limit)
            except WorkerError as error:
                entrant.error = str(error)
                continue
            entrant.answers += [answer] if number else []


def environment(own: Mapping[str, str], device: Device, cores: int) -> dict[str, str]:
    """A worker's environment, from this process's."""
    kept = {name: value for name, value in own.items() if name not in NOT_INHERITED}
    path = [str(ROOT), *filter(None, [own.get("PYTHONPATH")])]
    return {
        **kept,
        "JAX_PLATFORMS": "cuda" if device == "gpu" else "cpu",
        "KERAS_BACKEND": "jax",
        "OMP_NUM_THREADS": str(cores),
        "PYTHONPATH": os.pathsep.join(path),
        # Several of them share a GPU's memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def serve(build: Callable[[Mapping[str, Any]], Built]) -> None:
    """A worker's whole life: builds what it is told to, then answers until its input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints is no answer

    def tell(answer: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=channel, flush=True)

    cores, task = int(sys.argv[1]), json.loads(sys.argv[2])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    try:
        start = time.perf_counter()
        built = build(task)
        built.turn(1)
        tell({**built.about, "build_seconds": time.perf_counter() - start})
        for line in sys.stdin:
            steps = json.loads(line)["steps"]
            built.turn(1)  # while the others had their turns, the system has taken what lay idle
            cpu_start = time.process_time()
            seconds = built.turn(steps)
            cpu_seconds = (time.process_time() - cpu_start) / steps
            held = dict(zip(MEMORY, (peak_rss(), built.device_peak()), strict=True))
            tell({"seconds": seconds, "cpu_seconds": cpu_seconds, **held})
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name), "parity")
        tell({"error": f"{error.name} is not installed: pip install -e '.[{extra}]'"})
    except Exception as error:
        tell({"error": one_line(f"{type(error).__name__}: {error}")})


def one_line(text: str) -> str:
    """The beginning of a text, in one line."""
    return textwrap.shorten(text, LONGEST, placeholder="...")


def peak_rss() -> int | None:
    """Most bytes of main memory that this process has held; None where there is no /proc.

    Not getrusage: on Linux that begins with what the process held that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
