"""Where a training step's time goes on a CPU: seconds of each kind of operation.

A network's step, as a run compiles it, is traced for some steps with the profiler of jax. The time
in which an operation was under way goes to its kind; where several were, they have equal shares.
The rest of a step is between operations.

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
Event = tuple[float, float, str]
"""Start, seconds, name."""


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


def spans(events: Iterable[Event]) -> Iterator[tuple[float, float, str]]:
    """(start, end, name) of each operation that was done.

    Most are handed to the threads: their own event is the handing over, and one that is called
    "end: NAME" is when they were done.
    """
    starts: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for start, seconds, name in sorted(events):
        starts[name].append((start, start + seconds))
    for name, own in starts.items():
        ends = starts.get(f"end: {name}", own)
        for (start, end), (done, _) in zip(
            own, ends if len(ends) == len(own) else own, strict=True
        ):
            yield start, max(end, done), name


def shared(
    each: Iterable[tuple[float, float, str]], of: Mapping[str, str], count: int
) -> dict[str, float]:
    """{kind: seconds a step} in which an instruction of it was under way.

    Where several instructions were, each has an equal share.
    """
    changes: list[tuple[float, int, str]] = []
    for start, end, name in each:
        if name in of:
            changes += [(start, 1, of[name]), (end, -1, of[name])]
    total, active, before = dict.fromkeys(KINDS, 0.0), collections.Counter[str](), 0.0
    for at, change, kind in sorted(changes):
        if busy := sum(active.values()):
            for each_kind, number in active.items():
                total[each_kind] += (at - before) * number / busy / count
        active[kind] += change
        before = at
    return total


def events_of(trace: Path) -> Iterator[Event]:
    """The events of all threads in a trace's directory."""
    for path in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    yield event.start_ns / 1e9, event.duration_ns / 1e9, event.name


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
        done = spans(events_of(Path(directory)))
        found = shared(done, kinds(compiled.as_text() or ""), settings.steps)
    return {
        "model": name,
        "image_size": settings.side(config),
        "batch_size": config.batch_size,
        "dtype": settings.dtype,
        "step_seconds": dataclasses.asdict(seconds),
        "kind_seconds": found,
        "floor_seconds": floor,
    }


def report(rows: Sequence[Row]) -> str:
    """The table for people: milliseconds."""
    lines = [
        [
            row["model"],
            str(common.Timing(**{**row["step_seconds"]})),
            f"{1e3 * row['floor_seconds']:.0f}",
            *(f"{1e3 * row['kind_seconds'][kind]:.0f}" for kind in KINDS),
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
