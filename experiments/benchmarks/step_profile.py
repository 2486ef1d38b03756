"""Where a training step's time goes on a CPU: seconds of each kind of operation, by its threads.

A network's step, as a run compiles it, is traced for some steps with the profiler of jax. What a
thread spends in an operation, without what it spends there in others, is added up by kind and
divided by the steps: seconds of processor time, of all threads. The rest of the step is what the
threads wait, for each other or for memory that the trace does not name.

Kinds: convolutions forward, their gradients by the input and by the kernel, matrix products,
transposes and copies (XLA turns activations around for the gradient of a kernel), sums (of norms
and biases), and what is done value by value. "floor" is what the multiply-adds alone would take at
the machine's measured peak.

Standard output has one line of JSON for each network, standard error the table.

Claim: none; it measures.

Command: python -m experiments.benchmarks.step_profile --models mini
Hardware: a CPU.
Published: none.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import common, steps, workers
from flax_resnet import flags
from flax_resnet.errors import UserError
from flax_resnet.main import one_line_errors

KINDS = (
    "convolution",
    "gradient by input",
    "gradient by kernel",
    "product",
    "transposes",
    "sums",
    "values",
)
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\S+) ([\w\-]+)\((.*)")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")
WINDOW = re.compile(r"window={size=(\d+)")
RESULT = re.compile(r"dim_labels=\w+->(\w+)")
Row = dict[str, Any]


def kind_of(name: str, shape: str, opcode: str, rest: str) -> str:
    """One of KINDS, of an instruction of a compiled program.

    Args:
      name: of the instruction; XLA names a fusion by what is in it.
      shape: of its result.
      opcode: "convolution", "dot", "fusion", ...
      rest: of its line, with its metadata.
    """
    if opcode == "convolution":
        # A kernel's gradient is small, and its window a whole map.
        sizes, window, labels = SHAPE.match(shape), WINDOW.search(rest), RESULT.search(rest)
        if sizes and window and labels:
            height = sizes[1].split(",")[labels[1].index("0")]
            if int(window[1]) > int(height):
                return "gradient by kernel"
        return "gradient by input" if "transpose(jvp" in rest else "convolution"
    if opcode == "dot" or "dot" in name:
        return "product"
    if opcode in ("transpose", "copy") or "transpose" in name or name.startswith("copy"):
        return "transposes"
    if opcode.startswith("reduce") or "reduce" in name:
        return "sums"
    return "values"


def kinds(program: str) -> dict[str, str]:
    """{instruction: its kind} of a compiled program's text."""
    found = (INSTRUCTION.match(line) for line in program.splitlines())
    return {m[1]: kind_of(m[1], m[2], m[3], m[4]) for m in found if m}


def own_seconds(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """{name: seconds of it alone} of one thread's events: (start, seconds, name), nested."""
    own: dict[str, float] = collections.defaultdict(float)
    open_: list[tuple[float, str]] = []
    for start, seconds, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_ and open_[-1][0] <= start:
            open_.pop()
        if open_:
            own[open_[-1][1]] -= seconds
        own[name] += seconds
        open_.append((start + seconds, name))
    return own


def threads(trace: Path) -> Iterator[list[tuple[float, float, str]]]:
    """The events of each thread of a trace's directory."""
    for path in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                yield [(e.start_ns / 1e9, e.duration_ns / 1e9, e.name) for e in line.events]


def by_kind(
    each: Iterable[Iterable[tuple[float, float, str]]], of: Mapping[str, str], count: int
) -> dict[str, float]:
    """{kind: seconds a step} of all threads' events that are instructions of the program."""
    total = dict.fromkeys(KINDS, 0.0)
    for events in each:
        for name, seconds in own_seconds(events).items():
            if name in of:
                total[of[name]] += seconds / count
    return total


def measure(name: str, settings: steps.Settings, floor: float) -> Row:
    """Compiles, times and traces the training step of a network."""
    config = settings.config(name)
    ready, batch = steps.noise_run(config, steps.one_device(), settings.side(config))
    compiled, turn = steps.training(ready, batch)
    turn(1)
    seconds = common.Timing.of([turn(settings.steps) for _ in range(settings.rounds)])
    with tempfile.TemporaryDirectory(prefix="flax_resnet_") as directory:
        with jax.profiler.trace(directory):
            turn(settings.steps)
        found = by_kind(threads(Path(directory)), kinds(compiled.as_text() or ""), settings.steps)
    return {
        "model": name,
        "image_size": settings.side(config),
        "batch_size": config.batch_size,
        "dtype": settings.dtype,
        "step_seconds": dataclasses.asdict(seconds),
        "thread_seconds": found,
        "floor_seconds": floor,
    }


def report(rows: Sequence[Row]) -> str:
    """The table for people: milliseconds."""
    lines = [
        [
            row["model"],
            str(common.Timing(**{**row["step_seconds"]})),
            f"{1e3 * row['floor_seconds']:.0f}",
            *(f"{1e3 * row['thread_seconds'][kind]:.0f}" for kind in KINDS),
        ]
        for row in rows
    ]
    return common.table(["network", "step s", "floor ms", *(f"{k} ms" for k in KINDS)], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Profiles every network; prints lines of JSON, then the table."""
    with one_line_errors():
        prog = "python -m experiments.benchmarks.step_profile"
        settings = flags.cli(steps.Settings, argv, __doc__ or "", prog)
        if jax.default_backend() != "cpu":
            raise UserError("the kinds are those of a CPU's program: set JAX_PLATFORMS=cpu")
        work = {name: settings.gflop(name, "train") for name in settings.models}
        best = steps.machine_peak("cpu", settings.dtype, workers.usable_cores(), settings.peak_size)
        rows, hardware = [], common.hardware()
        for name in settings.models:
            rows.append(measure(name, settings, work[name] / best.gflops))
            facts = {"peak": dataclasses.asdict(best), "hardware": hardware}
            common.print_json({"benchmark": "step_profile", **rows[-1], **facts})
        print(f"{steps.show_peak(best)}\n{report(rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
