"""Compile time, step time and memory against depth, of unrolled and of scanned networks.

One training step (SGD with momentum, its state donated) of the pre-activated CIFAR bottleneck
networks (He et al. 2016b), depth 9n + 2, on a batch of noise, without any compilation cache.
Unrolled, each block is compiled by itself; with ``scan_blocks`` the n - 1 equal blocks of a
stage are compiled once and looped over; with ``remat`` as well, the loop keeps only their inputs.

Claim: compiling a scanned network hardly takes longer with depth. From 56 to 2000 layers the
compiled program has the same number of instructions, and took 6 to 10 CPU seconds (16x16 images,
batches of 8, two shared CPU cores); at 20 layers a stage has one equal block, and no loop is left.
Unrolled, instructions grow in proportion to depth. Compiling 164 layers took as long either way.
A step took 2 to 8 times as long scanned: a CPU is slow at convolutions in a loop.

Standard output has one line of JSON a row, standard error the table. On a busy machine compare CPU
seconds and instructions rather than seconds.

Command: python -m experiments.benchmarks.compile
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import common
from flax_resnet import flags
from flax_resnet.errors import UserError, check_range
from flax_resnet.main import one_line_errors
from flax_resnet.models import PreActBottleneckBlock, cifar_preact, unstack_blocks
from flax_resnet.optim import SGD
from flax_resnet.step import Batch, TrainState, create_state, train_step

MODES: dict[str, dict[str, Any]] = {
    "unrolled": {"scan_blocks": False},
    "scanned": {"scan_blocks": True},
    "scanned+remat": {"scan_blocks": True, "remat": True},
}
CHANNELS = 3
Row = dict[str, Any]
COMPARED: dict[str, Callable[[Row], float]] = {
    "trace+lower": lambda row: row["trace_lower_seconds"]["median"],
    "compile": lambda row: row["compile_seconds"]["median"],
    "compile CPU": lambda row: row["compile_cpu_seconds"]["median"],
    "instructions": lambda row: row["instructions"],
    "step": lambda row: row["step_seconds"]["median"],
    "memory": lambda row: row["temp_megabytes"] or math.nan,
}
HEADER = (
    "depth",
    "mode",
    "trace+lower s",
    "compile s",
    "compile CPU s",
    "step s",
    "instructions",
    "temp MB",
    "parameters",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    depths: tuple[int, ...] = (20, 56, 110, 164, 1001, 2000)
    """Depths of the networks, each 9n + 2."""
    max_unrolled_depth: int = 164
    """Deeper networks are not run unrolled."""
    image_size: int = 16
    """Height and width of the images."""
    batch_size: int = 8
    """Images in the batch."""
    compile_repeats: int = 3
    """How many times each step is traced, lowered and compiled."""
    steps: int = 5
    """Steps timed, after one that is not."""
    remat: bool = False
    """Measure scanned blocks with rematerialisation too."""

    def __post_init__(self) -> None:
        for depth in self.depths:
            if depth < 11 or (depth - 2) % 9:
                near = max(1, round((depth - 2) / 9)) * 9 + 2
                raise UserError(f"--depths {depth}: expected 9n + 2; the nearest is {near}")
        if not self.depths:
            raise UserError("--depths: expected one or more")
        for name in ("image_size", "batch_size", "compile_repeats", "steps"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), 1)

    def modes(self, depth: int) -> list[str]:
        """The modes that a depth is measured in."""
        unrolled = ["unrolled"] if depth <= self.max_unrolled_depth else []
        return [*unrolled, "scanned", *(["scanned+remat"] if self.remat else [])]


def measure(depth: int, settings: Settings) -> list[Row]:
    """Rows of one depth, a mode each; every mode starts from the same state and batch."""
    scanned = cifar_preact(depth, block_cls=PreActBottleneckBlock, scan_blocks=True)
    shape = (settings.image_size, settings.image_size, CHANNELS)
    stats = {"mean": np.full(CHANNELS, 0.5), "std": np.full(CHANNELS, 0.25)}
    transformation, _ = SGD().build(num_steps=settings.steps + 1, steps_per_epoch=1)
    # Starting an unrolled network takes a compilation too; unstacking what a scanned one
    # started with takes none.
    state = create_state(scanned, transformation, 0, shape, stats)
    arrays = jax.device_get(state.arrays())
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (settings.batch_size, *shape), np.uint8)),
        "label": jnp.asarray(rng.integers(0, scanned.num_classes, settings.batch_size, np.int32)),
    }
    rows = []
    for mode in settings.modes(depth):
        module = scanned.clone(**MODES[mode])
        own = arrays if module.scan_blocks else unstack_blocks(scanned, arrays)
        state = state.replace(apply_fn=module.apply, **jax.tree.map(jnp.array, own))
        rows.append({"depth": depth, "mode": mode, **_measure_step(state, batch, settings)})
    return rows


def _measure_step(state: TrainState, batch: Batch, settings: Settings) -> Row:
    """Compiles and runs a training step; ``state`` is gone afterwards."""
    lower_seconds, compile_seconds, cpu_seconds, step_seconds = [], [], [], []
    for _ in range(settings.compile_repeats):
        # A new function each time: jax keeps the traces of those that it has seen.
        step = jax.jit(functools.partial(train_step), donate_argnums=0)
        lowered, seconds = common.timed(step.lower, state, batch)
        lower_seconds.append(seconds)
        cpu_start = time.process_time()
        compiled, seconds = common.timed(lowered.compile)
        cpu_seconds.append(time.process_time() - cpu_start)
        compile_seconds.append(seconds)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    memory = compiled.memory_analysis()
    (state, first), _ = common.timed(compiled, state, batch)
    for _ in range(settings.steps):
        (state, _), seconds = common.timed(compiled, state, batch)
        step_seconds.append(seconds)
    return {
        "image_size": settings.image_size,
        "batch_size": settings.batch_size,
        "parameters": parameters,
        "trace_lower_seconds": dataclasses.asdict(common.Timing.of(lower_seconds)),
        "compile_seconds": dataclasses.asdict(common.Timing.of(compile_seconds)),
        "compile_cpu_seconds": dataclasses.asdict(common.Timing.of(cpu_seconds)),
        "instructions": sum(" = " in line for line in (compiled.as_text() or "").splitlines()),
        "step_seconds": dataclasses.asdict(common.Timing.of(step_seconds)),
        "temp_megabytes": memory and memory.temp_size_in_bytes / 1e6,
        "first_loss": float(first["loss"] / first["count"]),
    }


def ratios(rows: Sequence[Row]) -> list[str]:
    """Lines that compare the deepest network with the others, and unrolled with scanned."""
    found = {(row["mode"], row["depth"]): row for row in rows}
    lines = []
    for mode in MODES:
        depths = sorted(depth for m, depth in found if m == mode)
        for depth in depths[:-1]:
            compared = _compare(found[mode, depths[-1]], found[mode, depth])
            lines.append(f"{mode}, depth {depths[-1]} / depth {depth}: {compared}")
    for depth in sorted(depth for mode, depth in found if mode == "unrolled"):
        compared = _compare(found["unrolled", depth], found["scanned", depth])
        lines.append(f"unrolled / scanned, depth {depth}: {compared}")
    return lines


def _compare(above: Row, below: Row) -> str:
    return ", ".join(f"{name} {get(above) / get(below):.2f}" for name, get in COMPARED.items())


def report(rows: Sequence[Row], settings: Settings) -> str:
    """The table for people; depths that were not run unrolled say so."""
    found = {(row["depth"], row["mode"]): row for row in rows}
    lines = []
    for depth in settings.depths:
        for mode in dict.fromkeys(["unrolled", *settings.modes(depth)]):
            row = found.get((depth, mode))
            cells = _cells(row) if row else ["not run"]
            lines.append([str(depth), mode, *cells, *[""] * (len(HEADER) - 2 - len(cells))])
    return "\n".join([common.table(HEADER, lines), *ratios(rows)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    names = ("trace_lower_seconds", "compile_seconds", "compile_cpu_seconds", "step_seconds")
    megabytes = row["temp_megabytes"]
    return [
        *(str(common.Timing(**row[name])) for name in names),
        f"{row['instructions']:,}",
        "not known" if megabytes is None else f"{megabytes:.1f}",
        f"{row['parameters']:,}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every depth; prints lines of JSON, then the table."""
    with one_line_errors(), common.no_compilation_cache():
        prog = "python -m experiments.benchmarks.compile"
        settings = flags.cli(Settings, argv, __doc__ or "", prog)
        # The first compilation of a process also starts the compiler: that is no row's time.
        measure(11, dataclasses.replace(settings, compile_repeats=1, steps=1, remat=False))
        hardware, rows = common.hardware(), []
        for depth in settings.depths:
            for row in measure(depth, settings):
                common.print_json({"benchmark": "compile", **row, "hardware": hardware})
                rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in hardware.items()), file=sys.stderr)
        print(f"median (least-most)\n{report(rows, settings)}", file=sys.stderr)


if __name__ == "__main__":
    main()
