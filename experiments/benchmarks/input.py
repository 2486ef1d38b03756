"""Decoded 224-crops a second, of this library, of tf.data and of torch's DataLoader, in one run.

All read the same JPEG photographs from a folder, on the same cores, and hand over batches of uint8
random resized crops (--crop centre: the centre's). Each is a process of its own; they take turns
(A B C A B C ...), so that whatever slows the machine slows all, and each makes its pipeline anew in
its turn and is timed after what it reads ahead. The photographs are scikit-learn's two and, where
it is installed, scikit-image's, multiplied by crops, mirroring and quality.

ours       Data.train_batches: simplejpeg, cykooz-resizer, Grain, put on the device; with a worker
           process for each core, or with --data.num-workers 0 in threads; and the same files in
           threads from a tfds set stored as ArrayRecord
tf.data    decode_and_crop_jpeg with the fast DCT, then a bilinear resize, from files
torch      DataLoader: Pillow decodes, crops and resizes, as torchvision does
decoder    the library's decoder by itself, in one thread

Ours and torch's resize with a triangle filter that antialiases. tf.data's takes the four nearest
pixels by default: less work, and aliasing where a crop shrinks; in another row it antialiases too.
All draw crops of 8 to 100 % of the area at an aspect of 3/4 to 4/3; tf.data's and torch's are drawn
beforehand (tf.data's own op for that draws smaller ones).

There are rows for one core and for all. Processes and their children are held to the same cores.
The ratios are to tf.data's crops/s a core, without and with antialiasing, on as many cores in the
same round: above 1, it is faster. Standard output has one line of JSON a row, standard error the
table.

Claim: none; it measures.

Command: python -m experiments.benchmarks.input
  (python -m experiments.benchmarks.input --cores 1 for one core alone)
  (needs pip install -e '.[prepare,parity]'; what is not installed has a row that says so)

Hardware: any; on a machine that others use too, no way is timed alone.

Published: none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.benchmarks import common, driver, input_worker, workers
from experiments.benchmarks.driver import Columns, Row, timing_cell
from flax_resnet.errors import check_range, check_types
from flax_resnet.xla.backend import usable_cores

REFERENCES = {"ratio_to_tf_data": "tf.data", "ratio_to_tf_data_antialias": "tf.data, antialias"}
"""By the fields that have ratios to them."""
RATE = "crops_per_second_per_core"
COLUMNS: Columns = {
    "way": lambda row: row["way"],
    "cores": lambda row: str(row["cores"]),
    "crops/s": lambda row: f"{row['crops_per_second']:,.0f}",
    "crops/s a core": lambda row: "{median:,.0f} ({least:,.0f}-{most:,.0f})".format(**row[RATE]),
    "x tf.data": timing_cell("ratio_to_tf_data"),
    "x antialias": timing_cell("ratio_to_tf_data_antialias"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed."""

    photographs: int = 300
    """Files that are read, again and again."""
    long_side: int = 500
    """Of a photograph, in pixels; the other is three quarters of it (ImageNet's usual 500x375)."""
    size: int = 224
    """Height and width of the crops."""
    crop: input_worker.Crop = "random"
    """Random crops, as in training, or the centre's, as in evaluation."""
    batch_size: int = 64
    """Crops in a batch."""
    batches: int = 40
    """Batches of a turn, timed together."""
    rounds: int = 5
    """Turns of each, after one that is not counted."""
    cores: int | None = None
    """Of the processor, for each; None: one, and all that this process may use."""
    limit: float = 600.0
    """Seconds that a turn may take."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range("--photographs", self.photographs, 2)
        check_range("--long-side", self.long_side, 16)
        driver.check_least(self, 1, "size", "batch_size", "batches", "rounds", "limit")
        driver.check_cores(self.cores)

    @property
    def core_counts(self) -> list[int]:
        """Each has its rows."""
        return [self.cores] if self.cores else sorted({1, usable_cores()})

    def tasks(self, folder: Path) -> list[input_worker.Task]:
        """What is read, by each way on so many cores; a decoder by itself has one."""
        *ways, alone = input_worker.WAYS
        pairs = [(way, cores) for cores in self.core_counts for way in ways]
        pairs.insert(len(ways), (alone, 1))
        return [self.task(way, folder, cores) for way, cores in pairs]

    def task(self, way: str, folder: Path, cores: int) -> input_worker.Task:
        """What a way is told to read; a decoder by itself reads nothing ahead."""
        ahead = 0 if way == "decoder" else 8 * cores
        return input_worker.Task(
            way, str(folder), self.size, self.crop, self.batch_size, cores, ahead
        )


def measured(settings: Settings) -> Iterator[Row]:
    """Makes the photographs, and times every way to read them."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        folder = Path(directory)
        photographs = input_worker.make_photographs(
            folder, settings.photographs, settings.long_side
        )
        input_worker.make_records(folder)
        tasks = settings.tasks(folder)
        ways = [
            workers.Entrant.start(
                stack, task.way, input_worker.__name__, dataclasses.asdict(task), "cpu",
                task.cores, settings.limit,
            )
            for task in tasks
        ]  # fmt: skip
        most = max(task.cores for task in tasks)
        batches = [max(1, settings.batches * task.cores // most) for task in tasks]
        workers.take_turns(list(zip(ways, batches, strict=True)), settings.rounds, settings.limit)
        facts = {"photographs": photographs, "settings": dataclasses.asdict(settings)}
        cores = [task.cores for task in tasks]
        for row in rows(ways, cores, settings.batch_size):
            yield {**row, **facts}


def rows(ways: Sequence[workers.Entrant], cores: Sequence[int], batch_size: int) -> list[Row]:
    """A row for each way on so many cores: its figures, or why it has none."""
    references = {(way.name, count): way for way, count in zip(ways, cores, strict=True)}
    found = []
    for way, count in zip(ways, cores, strict=True):
        row: Row = {"way": way.name, "cores": count, "error": way.error}
        if way.error is None:
            seconds = way.values("seconds")
            rate = common.Timing.of([batch_size / each / count for each in seconds])
            row |= {
                **way.about,
                "crops_per_second": rate.median * count,
                RATE: dataclasses.asdict(rate),
            }
            for field, name in REFERENCES.items():
                other = references.get((name, count))
                row[field] = None
                if other is not None and other.error is None:
                    row[field] = common.ratio(other.values("seconds"), seconds)
        found.append(row)
    return found


def report(rows: Sequence[Row]) -> str:
    """The table for people."""
    files = ", ".join(f"{name} {value}" for name, value in rows[0]["photographs"].items())
    return f"{files}\nmedian (least-most)\n{driver.table(COLUMNS, rows, keys=2)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures; prints lines of JSON, then the table."""
    driver.run("input", Settings, __doc__ or "", argv, measured, report)


if __name__ == "__main__":
    main()
