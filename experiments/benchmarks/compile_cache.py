"""Seconds that compiling a training step takes, with an empty cache of programs and a full one.

Each start is a process of its own that imports, draws the state of a network, and compiles its
training step (SGD with momentum) for a batch of noise, as a run does. The cold start has an empty
directory for compiled programs (flax_resnet.compilation), the warm one what the cold one before it
has left there: what is left of "compile" is tracing, lowering, and reading the program. No step is
taken.

Standard output has one line of JSON a row, standard error the table. Whatever else runs on the
machine is in the numbers: compare the smallest.

Claim: none; it measures.

Command: python -m experiments.benchmarks.compile_cache
Hardware: any.
Published: none for this library.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import common, startup, steps, workers
from flax_resnet import flags, models
from flax_resnet.compilation import use_cache
from flax_resnet.config import TrainConfig
from flax_resnet.errors import UserError, check_range
from flax_resnet.main import one_line_errors

PHASES = ("import", "set-up", "compile")
START = (
    "import sys; from experiments.benchmarks import compile_cache; "
    "compile_cache.start(*sys.argv[1:])"
)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled."""

    models: tuple[str, ...] = ("resnet50", "resnet152", "resnet1202")
    """Names that `python -m flax_resnet names` lists."""
    scanned: tuple[str, ...] = ("resnet1202",)
    """Those of them whose equal blocks are compiled once and looped over (scan_blocks)."""
    batch_size: int = 8
    """Images in a step."""
    dtype: str = "float32"
    """What the networks compute in."""
    repeats: int = 3
    """Cold starts of each, with a warm one after it."""

    def __post_init__(self) -> None:
        check_range("--repeats", self.repeats, 1)
        check_range("--batch-size", self.batch_size, 1)
        for name in self.models:
            self.config(name)  # what is wrong is said before anything is measured
        for name in self.scanned:
            if name not in self.models:
                raise UserError(f"--scanned {name}: it is none of --models {self.models}")

    def config(self, name: str) -> TrainConfig:
        """What a network is trained with.

        Raises:
          UserError: there is no such network, or its blocks cannot be scanned.
        """
        scan = {"scan_blocks": True} if name in self.scanned else {}
        return TrainConfig(
            model=models.create(name, dtype=self.dtype, **scan),
            batch_size=self.batch_size,
            optimizer=steps.optimizer("sgd", 1e-3),
        )


def start(began: str, name: str, settings: str) -> None:
    """What a process does that is measured: prints a line of JSON.

    Args:
      began: when its command was given, in seconds since the epoch.
      name: of the network.
      settings: as JSON.
    """
    given: Any = {
        k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(settings).items()
    }
    common.print_json(phases(name, Settings(**given), float(began)))


def phases(name: str, settings: Settings, began: float) -> Row:
    """{phase: seconds} of a network to its compiled training step, and "peak_rss_bytes"."""
    times = [began, time.time()]
    use_cache()
    config = settings.config(name)
    side = models.default_shape(config.model)[0]
    ready, _ = steps.noise_run(config, steps.one_device(), side)
    times.append(time.time())
    ready.compile_step()
    times.append(time.time())
    taken = (after - before for before, after in itertools.pairwise(times))
    return {**dict(zip(PHASES, taken, strict=True)), "peak_rss_bytes": workers.peak_rss()}


def measure(name: str, settings: Settings, directory: Path) -> list[Row]:
    """Rows of a network: its cold starts, and its warm ones."""
    given = json.dumps(dataclasses.asdict(settings))
    found: dict[str, list[Row]] = {"cold": [], "warm": []}
    for i in range(settings.repeats):
        environment = startup.with_cache(directory / f"{name}{i}")
        for starts in found.values():
            said = startup.run_python(["-c", START, repr(time.time()), name, given], environment)
            starts.append(json.loads(said.splitlines()[-1]))
    return [
        {
            "model": name,
            "scanned": name in settings.scanned,
            "start": kind,
            "peak_rss_bytes": max(one.pop("peak_rss_bytes") or 0 for one in starts),
            **startup.summed(starts),
        }
        for kind, starts in found.items()
    ]


def report(rows: Sequence[Row]) -> str:
    """The table for people, in seconds."""
    names = (*PHASES, "total")
    lines = [
        [
            row["model"] + (", scanned" if row["scanned"] else ""),
            row["start"],
            *(str(common.Timing(**row[name])) for name in names),
            steps.megabytes(row["peak_rss_bytes"]),
        ]
        for row in rows
    ]
    return common.table(["network", "start", *names, "process MB"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every network, prints lines of JSON, then the table."""
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="flax_resnet_") as directory:
        prog = "python -m experiments.benchmarks.compile_cache"
        settings = flags.cli(Settings, argv, __doc__ or "", prog)
        rows: list[Row] = []
        facts = {"settings": dataclasses.asdict(settings), "hardware": common.hardware()}
        for name in settings.models:
            for row in measure(name, settings, Path(directory)):
                common.print_json({"benchmark": "compile_cache", **row, **facts})
                rows.append(row)
        print(f"seconds: median (least-most), n = {settings.repeats}", file=sys.stderr)
        print(report(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
