"""Scalars in TensorBoard's format, without the thread of tensorboardX's SummaryWriter: on a full
disk it dies and whoever writes on waits forever, and a killed run loses what is in its queue.
"""

from __future__ import annotations

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events(EventsWriter):
    """A file of TensorBoard events, written in the caller's thread; ``close`` ends it."""

    def __init__(self, directory: Path, purge_step: int):
        """Opens a new file; TensorBoard hides events of ``purge_step`` and later in older files."""
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(str(directory / "events"))
        start = SessionLog(status=SessionLog.START)
        self.write_event(Event(step=purge_step, wall_time=time.time(), session_log=start))
        self.flush()

    def write(self, name: str, value: float, step: int) -> None:
        """Records a value after ``step`` optimizer steps; ``flush`` writes it to the file."""
        summary = scalar(name, value, display_name="")
        self.write_event(Event(step=step, wall_time=time.time(), summary=summary))
