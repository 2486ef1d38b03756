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
decoder    the library's decoder by itself, in one thread; and as it is with Pillow alone

Ours and torch's resize with a triangle filter that antialiases. tf.data's takes the four nearest
pixels by default: less work, and aliasing where a crop shrinks; in another row it antialiases too.
All draw crops of 8 to 100 % of the area at an aspect of 3/4 to 4/3, tf.data's beforehand (its own
op for that draws smaller ones).

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
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import common, input_worker, workers
from experiments.benchmarks.input_files import make_photographs, make_records
from flax_resnet import flags
from flax_resnet.errors import UserError, check_choices, check_range
from flax_resnet.main import one_line_errors

NEEDS = {
    "tf.data": ("tensorflow", "prepare"),
    "tf.data, antialias": ("tensorflow", "prepare"),
    "torch": ("torch", "parity"),
}
"""A module and the extra that installs it."""
REFERENCES = {"ratio_to_tf_data": "tf.data", "ratio_to_tf_data_antialias": "tf.data, antialias"}
"""By the fields that have ratios to them."""
HEADER = ("way", "cores", "crops/s", "crops/s a core", "x tf.data", "x antialias")
Row = dict[str, Any]


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
        check_choices(self)
        for name, least in {
            "photographs": 2,
            "long_side": 16,
            "size": 1,
            "batch_size": 1,
            "batches": 1,
            "rounds": 1,
            "cores": 1,
            "limit": 1,
        }.items():
            check_range("--" + name.replace("_", "-"), getattr(self, name), least)
        if self.cores is not None and self.cores > workers.usable_cores():
            raise UserError(f"--cores {self.cores}: there are {workers.usable_cores()}")

    @property
    def core_counts(self) -> list[int]:
        """Each has its rows."""
        return [self.cores] if self.cores else sorted({1, workers.usable_cores()})

    def tasks(self, folder: Path) -> list[input_worker.Task]:
        """What is read, by each way on so many cores; a decoder by itself has one."""
        return [
            self.task(way, folder, 1 if _alone(way) else cores)
            for cores in self.core_counts
            for way in input_worker.WAYS
            if not (_alone(way) and cores != self.core_counts[0])
        ]

    def task(self, way: str, folder: Path, cores: int) -> input_worker.Task:
        """What a way is told to read; a decoder by itself reads nothing ahead."""
        return input_worker.Task(
            way,
            str(folder),
            self.size,
            self.crop,
            self.batch_size,
            cores,
            0 if _alone(way) else 8 * cores,
        )


def _alone(way: str) -> bool:
    """True of a decoder without a pipeline."""
    return way.startswith("decoder")


@dataclasses.dataclass
class Way:
    """What has come of one way to read."""

    name: str
    cores: int
    worker: workers.Worker | None = None
    error: str | None = None
    """Why it is not measured."""
    rates: list[float] = dataclasses.field(default_factory=list)
    """Crops a second and core, of each round."""


def started(settings: Settings, folder: Path, stack: contextlib.ExitStack) -> list[Way]:
    """All ways, ready to take turns; those that cannot say why."""
    found = []
    for task in settings.tasks(folder):
        way = Way(task.way, task.cores)
        found.append(way)
        module, extra = NEEDS.get(task.way, ("numpy", ""))
        if importlib.util.find_spec(module) is None:
            way.error = f"{module} is not installed: pip install -e '.[{extra}]'"
            continue
        try:
            way.worker = workers.Worker(
                input_worker.__name__, dataclasses.asdict(task), "cpu", task.cores, settings.limit
            )
        except workers.WorkerError as error:
            way.error = str(error)
            continue
        stack.callback(way.worker.close)
    return found


def take_turns(ways: Sequence[Way], settings: Settings) -> None:
    """Times all, one after another in each round; the first round is not counted."""
    for number in range(1 + settings.rounds):
        for way in ways:
            if way.worker is None or way.error is not None:
                continue
            batches = max(1, settings.batches * way.cores // max(each.cores for each in ways))
            try:
                seconds = way.worker.ask(batches, settings.limit)["seconds"]
            except workers.WorkerError as error:
                way.error = str(error)
                continue
            if number:
                way.rates.append(settings.batch_size / seconds / way.cores)


def rows(ways: Sequence[Way]) -> list[Row]:
    """A row for each: its figures, or why it has none."""
    references = {(way.name, way.cores): way for way in ways}
    found = []
    for way in ways:
        row: Row = {"way": way.name, "cores": way.cores, "error": way.error}
        if way.worker is not None and way.error is None:
            rate = common.Timing.of(way.rates)
            row |= {
                **way.worker.about,
                "crops_per_second": rate.median * way.cores,
                "crops_per_second_per_core": dataclasses.asdict(rate),
                **{
                    field: _ratio(way, references.get((name, way.cores)))
                    for field, name in REFERENCES.items()
                },
            }
        found.append(row)
    return found


def _ratio(way: Way, reference: Way | None) -> dict[str, Any] | None:
    if reference is None or reference.error:
        return None
    each = [own / theirs for own, theirs in zip(way.rates, reference.rates, strict=True)]
    return dataclasses.asdict(common.Timing.of(each))


def report(found: Sequence[Row]) -> str:
    """The table for people."""
    lines = []
    for row in found:
        cells = ["not run", "", "", ""]
        if row["error"] is None:
            ratios = [row[field] for field in REFERENCES]
            cells = [
                f"{row['crops_per_second']:,.0f}",
                "{median:,.0f} ({least:,.0f}-{most:,.0f})".format(
                    **row["crops_per_second_per_core"]
                ),
                *(str(common.Timing(**ratio)) if ratio else "" for ratio in ratios),
            ]
        lines.append([row["way"], str(row["cores"]), *cells])
    failed = [f"{row['way']}: {row['error']}" for row in found if row["error"]]
    return "\n".join([common.table(HEADER, lines), *failed])


def measure(settings: Settings) -> tuple[dict[str, int], list[Row]]:
    """Makes the photographs, and times every way to read them."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        folder = Path(directory)
        photographs = make_photographs(folder, settings.photographs, settings.long_side)
        make_records(folder)
        ways = started(settings, folder, stack)
        take_turns(ways, settings)
        return photographs, rows(ways)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures; prints lines of JSON, then the table."""
    with one_line_errors():
        prog = "python -m experiments.benchmarks.input"
        settings = flags.cli(Settings, argv, __doc__ or "", prog)
        hardware = common.hardware()
        photographs, found = measure(settings)
        facts = {
            "photographs": photographs,
            "settings": dataclasses.asdict(settings),
            "hardware": hardware,
        }
        for row in found:
            common.print_json({"benchmark": "input", **row, **facts})
        said = [
            f"{name} {value}" for part in (photographs, hardware) for name, value in part.items()
        ]
        print(", ".join(said), file=sys.stderr)
        print(f"median (least-most)\n{report(found)}", file=sys.stderr)


if __name__ == "__main__":
    main()
