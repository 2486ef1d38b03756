"""Sends a run's lines to its tracker from a thread of its own, without holding the run up.

metrics.jsonl is the queue: the thread reads it from where the tracker has come to, so that a server
that is away for a day costs no memory, and what it missed it gets when it is back, or when the run
is started again. How far it has come is kept in tracking.json.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flax_resnet.errors import UserError
from flax_resnet.files import replacing
from flax_resnet.tracking.base import End, Line, Place, Status, Tracker, masked, order

Found = TypeVar("Found")
MOST_LINES = 100
"""Lines that are sent at once."""
OPEN_SECONDS = 60.0
"""In which a tracker has to be there when a run begins."""
SLOW_SECONDS = 30.0
"""A call that takes longer is warned of, as one that fails is."""
FINISHED_SECONDS, STOPPED_SECONDS = 30.0, 8.0
"""That the end may take, of a run that is done, and of one that is stopped: whoever stops it
kills it before long."""
RETRY_SECONDS = (1.0, 60.0)
"""Between two tries: the first time, and at most."""
FILES = ("config.json", "result.json", "curves.png", "confusion.png")


class Follower:
    """A tracker and how far it has come.

    Attributes:
      opening_line: says where the run is to be seen.
    """

    def __init__(self, tracker: Tracker, where: str, workdir: Path):
        """Nothing is sent before ``follow``.

        Args:
          tracker: open.
          where: as of Tracking.
          workdir: has metrics.jsonl, and tracking.json, which is written.
        """
        self.opening_line = f"tracked by {masked(tracker.address) or where}"
        self._tracker, self._where, self._workdir = tracker, where, workdir
        kept = remembered(workdir, where)
        own = kept.get("sent") if kept.get("run_id") == tracker.run_id else None
        self._sent: Place | None = tracker.sent or (None if own is None else (own[0], own[1]))
        self._pending: list[Line] = []
        self._file: Any = None
        self._offset = 0
        self._lock = threading.Lock()
        self._rewound: int | None = None
        self._wake, self._ending, self._done = (threading.Event() for _ in range(3))
        self._end: End | None = None
        self._closed = False
        self._busy_since: float | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"to {where}", daemon=True)
        self._keep()

    def follow(self) -> None:
        """Begins to send, now that metrics.jsonl holds what the run starts from."""
        self._thread.start()
        self._wake.set()

    def poke(self) -> None:
        """There are new lines. Costs next to nothing."""
        self._wake.set()
        began = self._busy_since
        if began is not None and time.monotonic() - began > SLOW_SECONDS:
            self._warn(f"no answer for {time.monotonic() - began:.0f} s")

    def rewind(self, step: int) -> None:
        """The lines after a step have been dropped from metrics.jsonl."""
        with self._lock:
            self._rewound = step if self._rewound is None else min(step, self._rewound)
        self._wake.set()

    def end(self, status: Status) -> None:
        """The run has ended; the thread sends the rest, and this does not wait for it."""
        result = self._workdir / "result.json"
        done = status == "FINISHED" and result.exists()
        files = [self._workdir / name for name in (FILES if done else FILES[:1])]
        lines = _lines(self._workdir)
        self._end = End(
            status=status,
            step=lines[-1].step if lines else 0,
            result=json.loads(result.read_text()) if done else {},
            files=tuple(path for path in files if path.exists()),
        )
        if not self._thread.is_alive():
            self._thread.start()  # the run ended before its first line
        self._ending.set()
        self._wake.set()

    def wait(self, deadline: float) -> None:
        """Waits for the end to be sent, until a time.monotonic(); says what was not."""
        self._done.wait(max(0.0, deadline - time.monotonic()))
        if self._closed:
            return
        lines = _lines(self._workdir)
        missing = sum(order(line.place) > order(self._sent) for line in lines)
        left = f"the last {missing} of {len(lines)} lines and " if missing else ""
        _say(f"{self._where} did not get {left}the end of the run; {self._workdir} has all of it")

    def _work(self) -> None:
        pause, most = RETRY_SECONDS
        while True:
            self._wake.wait()
            self._wake.clear()
            end = self._end
            try:
                self._send(end)
                pause, self._warned = RETRY_SECONDS[0], False
            except Exception as error:
                self._warn(_line_of(error))
                if end is None:
                    self._ending.wait(pause)
                    pause = min(2 * pause, most)
                    self._wake.set()
            finally:
                self._busy_since = None
            if end is not None:
                break
        self._close_file()
        self._done.set()

    def _send(self, end: End | None) -> None:
        """Sends all lines that there are, and after them the end, where it has come."""
        while True:
            with self._lock:
                step, self._rewound = self._rewound, None
            self._busy_since = time.monotonic()
            if step is not None:
                self._go_back(step)
            self._pending = self._pending or self._read()
            if not self._pending:
                break
            self._tracker.write(self._pending)
            self._sent, self._pending = self._pending[-1].place, []
            self._keep()
        if end is not None:
            self._tracker.close(end)
            self._closed = True

    def _go_back(self, step: int) -> None:
        try:
            self._tracker.rewind(step)
        except Exception:
            self.rewind(step)
            raise
        self._sent = min(self._sent, (step, "eval"), key=order) if self._sent else None
        self._pending, self._offset = [], 0
        self._close_file()  # it has been replaced
        self._keep()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> list[Line]:
        """The next lines that the tracker does not have."""
        if self._file is None:
            if not (self._workdir / "metrics.jsonl").exists():
                return []
            self._file = (self._workdir / "metrics.jsonl").open("rb")
        self._file.seek(self._offset)
        found: list[Line] = []
        for raw in self._file:
            if not raw.endswith(b"\n"):  # it is being written
                break
            self._offset += len(raw)
            line = _parsed(raw)
            if order(line.place) > order(self._sent):
                found.append(line)
            if len(found) == MOST_LINES:
                break
        return found

    def _keep(self) -> None:
        sent = None if self._sent is None else list(self._sent)
        with contextlib.suppress(OSError):  # a disk that is full ends the run, not this
            remember(self._workdir, self._where, {"run_id": self._tracker.run_id, "sent": sent})

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            _say(
                f"{self._where} does not take the metrics ({reason}): the run goes on and tries "
                "again; metrics.jsonl has them"
            )


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        print(f"tracking: {text}", file=sys.stderr, flush=True)


def _line_of(error: BaseException) -> str:
    text = " ".join(masked(str(error)).split())[:200]
    return f"{type(error).__name__}: {text}"


def _parsed(raw: bytes | str) -> Line:
    record = json.loads(raw)
    split, step, epoch = (record.pop(name) for name in ("split", "step", "epoch"))
    return Line(split, step, epoch, record, time.time())


def _lines(workdir: Path) -> list[Line]:
    path, found = workdir / "metrics.jsonl", []
    with contextlib.suppress(OSError, ValueError):  # a last line that was cut off is left out
        for raw in path.read_text().splitlines():
            found.append(_parsed(raw))
    return found


def remembered(workdir: Path, where: str) -> dict[str, Any]:
    """What tracking.json says of a tracker: "run_id" and "sent"; empty where it says nothing."""
    try:
        found = json.loads((workdir / "tracking.json").read_text())[where]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


_remembering = threading.Lock()


def remember(workdir: Path, where: str, what: dict[str, Any]) -> None:
    """Puts it there, beside what is said of others."""
    path = workdir / "tracking.json"
    with _remembering:
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        with replacing(path) as partial:
            partial.write_text(json.dumps({**known, where: what}, indent=2) + "\n")


def within(seconds: float, call: Callable[[], Found], where: str) -> Found:
    """Calls a tracker, and waits for at most so many seconds.

    Raises:
      UserError: it failed, or did not answer; the call may go on in its thread.
    """
    advice = (
        "is it there, and do the address and the credentials fit? Mend it, or leave --tracking out"
    )
    answers: list[Found] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"opens {where}", daemon=True)
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    if not errors:
        raise UserError(f"tracking: {where} does not answer for {seconds:.0f} s: {advice}")
    if isinstance(errors[0], UserError):
        raise errors[0]
    line = f"tracking: {where} cannot be used ({_line_of(errors[0])}): {advice}"
    raise UserError(line) from None  # what it says may hold a password


@contextlib.contextmanager
def ended_with(followers: Mapping[Path, Follower]) -> Iterator[None]:
    """Tells trackers how the block ended, and waits for them together, a limited time."""
    status: Status = "FAILED"
    seconds = STOPPED_SECONDS
    try:
        yield
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
