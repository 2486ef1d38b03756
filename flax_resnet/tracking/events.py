"""Scalars in TensorBoard's format.

tensorboardX's SummaryWriter hands events to a thread: on a full disk that thread dies and whoever
writes on waits forever, and a killed run loses what is in the queue. So this uses its EventsWriter.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
    """A file of TensorBoard events, written in the caller's thread."""

    def __init__(self, directory: Path, purge_step: int):
        """Opens a new file; TensorBoard hides events of ``purge_step`` and later in older files."""
        directory.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(directory / "events"))
        self._add(purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def write(self, name: str, value: float, step: int) -> None:
        """Records a value after ``step`` optimizer steps."""
        self._add(step, summary=scalar(name, value, display_name=""))

    def _add(self, step: int, **fields: Any) -> None:
        self._file.write_event(Event(step=step, wall_time=time.time(), **fields))

    def flush(self) -> None:
        """Writes the recorded events to the file."""
        self._file.flush()

    def close(self) -> None:
        """Writes the recorded events, and closes the file."""
        self._file.close()
