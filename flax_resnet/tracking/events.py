"""Scalars in TensorBoard's format."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any


class Events:
    """Scalars in TensorBoard's format, written at once.

    tensorboardX's SummaryWriter has a thread and an exit handler: on a full disk they print
    tracebacks, and whoever writes on waits for ever.
    """

    def __init__(self, directory: Path, purge_step: int):
        """Events of ``purge_step`` and later, in the files of earlier starts, are not shown."""
        board = _tensorboardx()
        self._event, self._scalar = board.proto.event_pb2.Event, board.summary.scalar
        directory.mkdir(parents=True, exist_ok=True)
        self._file = board.event_file_writer.EventsWriter(str(directory / "events"))
        session = board.proto.event_pb2.SessionLog
        self._add(purge_step, session_log=session(status=session.START))
        self.flush()

    def write(self, name: str, value: float, step: int) -> None:
        """Records a value after ``step`` optimizer steps."""
        self._add(step, summary=self._scalar(name, value, display_name=""))

    def _add(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(step=step, wall_time=time.time(), **what))

    def flush(self) -> None:
        """Writes what has been recorded."""
        self._file.flush()

    def close(self) -> None:
        """Writes what has been recorded, and closes the file."""
        self._file.close()


def _tensorboardx() -> Any:
    """tensorboardX, imported without torch.

    It imports torch wherever that is installed, for tensors that it never sees here: seconds of
    start-up, and a framework in the process that nobody asked for.
    """
    hides = "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX.event_file_writer
        import tensorboardX.proto.event_pb2
        import tensorboardX.summary
    finally:
        if hides:
            del sys.modules["torch"]
    return tensorboardX
