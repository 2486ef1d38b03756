"""Seconds from a command to its first training step, by phase, with an empty cache and a full one.

Each start is a process of its own that does what ``python -m experiments.digits`` does up to the
end of its first training step, on a set that is prepared: it imports, sets up (opens the data,
draws the state), compiles both steps, and takes one, for which the working directory, the log and
the checkpoints are opened too. The cold start has an empty directory for compiled programs
(flax_resnet.compilation), the warm one what the cold one before it has left there. The commands
that compute nothing are timed as wholes.

Standard output has one line of JSON a row, standard error the table. Whatever else runs on the
machine is in the numbers: compare the smallest.

Claim: none; it measures. (A warm start compiles no program that took a tenth of a second.)

Command: python -m experiments.benchmarks.startup
Hardware: a 2-core CPU.
Published: none for this library.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import digits
from experiments.benchmarks import common
from flax_resnet import distributed, flags, hosts, metrics
from flax_resnet.compilation import use_cache
from flax_resnet.config import TrainConfig, claimed
from flax_resnet.datasets.prepare import prepare
from flax_resnet.errors import UserError, check_range
from flax_resnet.grids import replaced
from flax_resnet.main import one_line_errors
from flax_resnet.preemption import Preempted
from flax_resnet.setup import set_up
from flax_resnet.train import go

PHASES = ("import", "set-up", "compile", "first step")
COMMANDS = {
    "names": ("-m", "flax_resnet", "names"),
    "help": ("-m", "experiments.digits", "--help"),
    "import": ("-c", "import flax_resnet"),
}
START = "import sys; from experiments.benchmarks import startup; startup.start(*sys.argv[1:])"
MOST_SECONDS = 600
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    repeats: int = 5
    """Cold starts, each with a warm one after it; and runs of each other command."""

    def __post_init__(self) -> None:
        check_range("--repeats", self.repeats, 1)


def start(began: str, data_dir: str, workdir: str) -> None:
    """What a process does that is measured: prints a line of JSON, {phase: seconds}.

    Args:
      began: when its command was given, in seconds since the epoch.
      data_dir: has the digits prepared.
      workdir: of the run.
    """
    config = replaced(digits.get_config(), "data.data_dir", data_dir)
    common.print_json(phases(config, Path(workdir), float(began)))


def phases(config: TrainConfig, workdir: Path, began: float) -> dict[str, float]:
    """{phase: seconds} of a run to the end of its first step, as a command would take them."""
    times = [began, time.time()]
    use_cache()
    run = set_up(config, workdir, distributed.data_mesh())
    times.append(time.time())
    steps = run.compile()
    times.append(time.time())

    def stop() -> bool:
        jax.block_until_ready(run.state)
        times.append(time.time())
        return True

    try:
        with hosts.watching() as watch, claimed(workdir, config):
            log = metrics.RunLog(workdir, run.step, run.num_steps, quiet=True)
            go(run, *steps, log, watch, stop)
    except Preempted:
        pass
    taken = (after - before for before, after in itertools.pairwise(times))
    return dict(zip(PHASES, taken, strict=False))


def measure(settings: Settings, directory: Path) -> list[Row]:
    """Rows: the cold starts, the warm ones, and each other command."""
    data = str(directory / "data")
    prepare("sklearn_digits", data)
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for i in range(settings.repeats):
        environment = with_cache(directory / f"cache{i}")
        for kind, starts in found.items():
            where = (data, str(directory / f"{kind}{i}"))
            said = run_python(["-c", START, repr(time.time()), *where], environment)
            starts.append(json.loads(said.splitlines()[-1]))
    rows = [{"start": kind, **summed(starts)} for kind, starts in found.items()]
    for name, command in COMMANDS.items():
        seconds = []
        for _ in range(settings.repeats):
            before = time.time()
            run_python(command, with_cache(directory / "cache"))
            seconds.append({"total": time.time() - before})
        rows.append({"start": name, **summed(seconds)})
    return rows


def with_cache(cache: Path) -> dict[str, str]:
    """This process's, with compiled programs kept in a directory of their own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    return kept | {"FLAX_RESNET_CACHE": str(cache)}


def run_python(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a Python process writes to standard output.

    Raises:
      UserError: it failed.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"{' '.join(arguments)[:80]} failed: {done.stderr[-300:]}")
    return done.stdout


def summed(starts: Sequence[Mapping[str, float]]) -> Row:
    """{phase: its timing} of several starts, and of their totals."""
    columns = {name: [one[name] for one in starts] for name in starts[0]}
    columns["total"] = [sum(one.values()) for one in starts]
    return {name: dataclasses.asdict(common.Timing.of(own)) for name, own in columns.items()}


def report(rows: Sequence[Row]) -> str:
    """The table for people, in seconds."""
    names = (*PHASES, "total")
    cells = [[str(common.Timing(**row[n])) if n in row else "" for n in names] for row in rows]
    lines = [[row["start"], *own] for row, own in zip(rows, cells, strict=True)]
    return common.table(["start", *names], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints lines of JSON, then the table."""
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="flax_resnet_") as directory:
        prog = "python -m experiments.benchmarks.startup"
        settings = flags.cli(Settings, argv, __doc__ or "", prog)
        rows, hardware = measure(settings, Path(directory)), common.hardware()
        for row in rows:
            common.print_json({"benchmark": "startup", **row, "hardware": hardware})
        print(", ".join(f"{name} {value}" for name, value in hardware.items()), file=sys.stderr)
        print(f"seconds: median (least-most), n = {settings.repeats}", file=sys.stderr)
        print(report(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
