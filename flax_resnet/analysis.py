"""What a run's two steps cost and hold, read from the compiled programs; nothing is trained."""

from __future__ import annotations

import collections
import dataclasses
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flax_resnet import distributed, tables, views
from flax_resnet.config import TrainConfig
from flax_resnet.errors import UserError
from flax_resnet.setup import check_batch, prepare
from flax_resnet.summary import FLOPS_A_MAC, summarize

UNKNOWN = "not known"
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
MEMORY = {
    "arguments": "argument_size_in_bytes",
    "outputs": "output_size_in_bytes",
    "outputs in donated arguments' place": "alias_size_in_bytes",
    "temporaries": "temp_size_in_bytes",
    "code": "generated_code_size_in_bytes",
}
"""Row of the table: field of jax's ``memory_analysis``."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One compiled step, as one device runs it.

    Attributes:
      name: "train" or "eval".
      images: images of the batch on this device.
      counted: FLOP of convolutions and dense layers, from the network's multiply-adds: two each,
        and in training two more for the inputs' and two for the weights' gradients.
      compiled: the program; ``memory_analysis()`` and ``cost_analysis()`` are jax's.
      seconds: time of tracing and compiling.
    """

    name: str
    images: int
    counted: float
    compiled: jax.stages.Compiled
    seconds: float

    def cells(self) -> dict[str, str]:
        """The rows of a table: {what: its value}."""
        cost: Any = self.compiled.cost_analysis() or {}
        memory = self.compiled.memory_analysis()
        flops, moved = cost.get("flops"), cost.get("bytes accessed")
        kinds = collectives(self.compiled).items()
        return {
            "images": f"{self.images:,}",
            "GFLOP, by XLA": _scaled(flops, 1e9),
            "GFLOP, by the network's multiply-adds": _scaled(self.counted, 1e9),
            "MB accessed": _scaled(moved, 1e6),
            "arithmetic intensity, FLOP a byte": _scaled(flops, moved),
            **{
                f"MB of {what}": _scaled(getattr(memory, field, None), 1e6)
                for what, field in MEMORY.items()
            },
            "collectives": ", ".join(f"{count} {kind}" for kind, count in kinds) or "none",
            "seconds to compile": f"{self.seconds:.1f}",
        }


def _scaled(value: float | None, unit: float | None) -> str:
    return UNKNOWN if value is None or not unit else f"{value / unit:,.4g}"


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """{kind: number of operations between devices in a program's text}; a loop's body once."""
    return dict(collections.Counter(COLLECTIVE.findall(compiled.as_text() or "")))


def analyze(config: TrainConfig, mesh: Mesh | None = None) -> list[Analysis]:
    """Compiles a run's training and evaluation step, and reads what they cost.

    The data is opened, since the programs have its shapes. The working directory is not touched.

    Args:
      config: the run.
      mesh: devices to compile for; by default all.

    Raises:
      UserError: bad input, as of ``train_and_evaluate``.
    """
    if config.cache_features:
        raise UserError(
            "--analyze with cache_features: the step would be that of the top alone, on features "
            "that have to be computed first; leave one out"
        )
    mesh = distributed.data_mesh() if mesh is None else mesh
    check_batch(config, mesh)
    with tempfile.TemporaryDirectory(prefix="flax_resnet_") as nowhere:
        run = prepare(config, Path(nowhere), mesh)

    data, eval_views = run.data, views.NUMBER[config.tta]
    steps: tuple[tuple[str, int, tuple[int, ...], int, Callable[[], Any]], ...] = (
        ("train", config.batch_size, data.batch_shape, 1, run.compile_step),
        ("eval", config.eval_batch_size, data.eval_shape, eval_views, run.compile_evaluation),
    )
    analyses = []
    for name, batch, shape, per_image, make in steps:
        macs = summarize(config.model, (shape[0], shape[1], shape[2])).macs
        images = batch // mesh.size
        counted = float(FLOPS_A_MAC[name] * per_image * macs * images)
        began = time.perf_counter()
        analyses.append(Analysis(name, images, counted, make(), time.perf_counter() - began))
    return analyses


def show(config: TrainConfig) -> None:
    """Prints ``analyze`` as a table, in process 0 alone."""
    mesh = distributed.data_mesh()
    analyses = analyze(config, mesh)
    if not distributed.is_lead():
        return
    kind = mesh.devices.flat[0].device_kind
    each = f"each of {mesh.size} x {kind}" if mesh.size > 1 else f"one {kind}"
    columns = [one.cells() for one in analyses]
    rows = [[what, *(cells[what] for cells in columns)] for what in columns[0]]
    title = f"a step of {type(config.model).__name__} on {each}"
    tables.show(title, rows, ["", *(one.name for one in analyses)], numbers=len(analyses))
    print(
        "XLA counts what it has made of the program, a loop's body once; the network's multiply-"
        "adds are those of convolutions and dense layers, two FLOP each, thrice in training."
    )
