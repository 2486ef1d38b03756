"""Where a run's metrics are written: metrics.jsonl, TensorBoard, a tracker and the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.records.files import replacing
from flax_resnet.records.run_dir import METRICS, read_metrics
from flax_resnet.records.text_tables import say
from flax_resnet.tracking.follower import Follower


class RunLog:
    """Writes one run's metrics: lines of JSON, TensorBoard events, a tracker and the terminal.

    Args:
      workdir: gets metrics.jsonl and tensorboard/.
      start_step: lines after it, of a run that was stopped, are dropped.
      num_steps: optimizer steps of the whole run.
      lead: False, in every process but process 0, writes nothing.
      quiet: True writes nothing to the terminal.
      events: False leaves out tensorboard/.
      follower: sends the lines to a tracker; whoever made it ends it.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        num_steps: int,
        *,
        lead: bool = True,
        quiet: bool = False,
        events: bool = True,
        follower: Follower | None = None,
    ):
        self._lead, self._quiet, self._num_steps = lead, quiet, num_steps
        self._follower, self._events = follower, None
        if not lead:
            return
        if events:
            from flax_resnet.tracking.events import Events  # imports torch if it is installed

            self._events = Events(workdir / "tensorboard", start_step + 1)
        kept = [record for record in read_metrics(workdir) if record["step"] <= start_step]
        path = workdir / METRICS
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        if follower is not None:
            follower.follow(kept, self.message)

    def write(self, split: str, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes one line: the metrics of a split at a step, ``epoch`` epochs into the run."""
        if not self._lead:
            return
        record = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.write(f"{split}/{name}", value, step)
            self._events.flush()  # or a killed run would lose its last two minutes for good
        if self._follower is not None:
            self._follower.write(record)
        self.message(f"step {step}/{self._num_steps} epoch {epoch:.2f} {split}: {_text(values)}")

    def message(self, text: str) -> None:
        """Prints a line."""
        if self._lead and not self._quiet:
            say(text)

    def close(self) -> None:
        """Closes the files."""
        if not self._lead:
            return
        self._file.close()
        if self._events is not None:
            self._events.close()


class RunLogs:
    """The logs of runs that train together: element i of every value goes to log i."""

    def __init__(self, logs: Sequence[RunLog], num_steps: int):
        self._logs, self._num_steps = logs, num_steps

    def write(self, split: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """As RunLog.write, of values that are arrays (S,) or the same for all; prints one line."""
        for i, log in enumerate(self._logs):
            own = {name: float(v[i]) if np.ndim(v) else v for name, v in values.items()}
            if "images_per_second" in own:
                own["images_per_second"] /= len(self._logs)  # its share
            log.write(split, step, epoch, own)
        self.message(f"step {step}/{self._num_steps} epoch {epoch:.2f} {split}: {_text(values)}")

    def message(self, text: str) -> None:
        """Prints a line."""
        say(text)

    def close(self) -> None:
        """Closes every log."""
        for log in self._logs:
            log.close()


def _text(values: Mapping[str, Any]) -> str:
    """Each name and its value; of several networks' values the mean, the least and the largest."""
    parts = []
    for name, v in values.items():
        digits = ".0f" if name == "images_per_second" else ".4g"
        spread = f" ({np.min(v):.4g}-{np.max(v):.4g})" if np.ndim(v) else ""
        parts.append(f"{name} {np.mean(v):{digits}}{spread}")
    return " ".join(parts)


class Timer:
    """Images a second and the share of time spent waiting for data, of an interval.

    Its user counts the interval's ``images``.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new interval."""
        self._start, self._waited, self.images = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Passes batches on, counting the time until each is there."""
        before = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    def summary(self) -> dict[str, float]:
        """ "images_per_second" and "data_wait" (share of the time) since the last reset."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        wait = min(self._waited / seconds, 1.0)
        return {"images_per_second": self.images / seconds, "data_wait": wait}
