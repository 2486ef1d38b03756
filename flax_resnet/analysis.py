"""What a run's two steps cost and hold, read from the compiled programs; nothing is trained."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from flax_resnet import distributed, programs, views
from flax_resnet.config import TrainConfig
from flax_resnet.errors import UserError
from flax_resnet.setup import check_batch, prepare
from flax_resnet.summary import FLOPS_A_MAC, count_layers

UNKNOWN = "not known"


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One step on one device.

    Attributes:
      name: "train" or "eval".
      images: of the batch, on this device.
      counted: operations of convolutions and dense layers, from the network's multiply-adds:
        two each, and in training two more for the inputs' and two for the weights' gradients.
      cost: as XLA counts it; None where the backend does not say.
      memory: likewise.
      collectives: {kind: (how many, their bytes)}, one in a loop once.
      seconds: that compiling took, tracing included.
    """

    name: str
    images: int
    counted: float
    cost: programs.Cost | None
    memory: programs.Memory | None
    collectives: dict[str, tuple[int, int]]
    seconds: float


def analyze(config: TrainConfig, mesh: Mesh | None = None) -> list[Analysis]:
    """Compiles a run's training and evaluation step, and reads what they cost.

    The data is opened, since its shapes are those of the programs. No workdir is looked at.

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
    data = run.data
    macs = [_macs(config, shape) for shape in (data.batch_shape, data.eval_shape)]
    images = [size // mesh.size for size in (config.batch_size, config.eval_batch_size)]
    return [
        _analysis("train", images[0], macs[0], run.compile_step),
        _analysis("eval", images[1], views.NUMBER[config.tta] * macs[1], run.compile_evaluation),
    ]


def _macs(config: TrainConfig, shape: tuple[int, ...]) -> int:
    rows, _ = count_layers(config.model, (shape[0], shape[1], shape[2]))
    return sum(row.macs for row in rows)


def _analysis(name: str, images: int, macs: int, compiling: Callable[[], Any]) -> Analysis:
    began = time.perf_counter()
    compiled: jax.stages.Compiled = compiling()
    seconds = time.perf_counter() - began
    return Analysis(
        name=name,
        images=images,
        counted=float(FLOPS_A_MAC[name] * macs * images),
        cost=programs.cost(compiled),
        memory=programs.memory(compiled),
        collectives=programs.totals(programs.collectives(compiled)),
        seconds=seconds,
    )


def table(analyses: list[Analysis]) -> list[tuple[str, ...]]:
    """(what, a cell for each step) in lines."""
    lines: list[tuple[str, Callable[[Analysis], str]]] = [
        ("images", lambda a: f"{a.images:,}"),
        ("GFLOP, by XLA", lambda a: UNKNOWN if a.cost is None else f"{a.cost.flops / 1e9:,.4g}"),
        ("GFLOP, by the network's multiply-adds", lambda a: f"{a.counted / 1e9:,.4g}"),
        ("MB accessed", lambda a: UNKNOWN if a.cost is None else _megabytes(a.cost.bytes)),
        ("arithmetic intensity, FLOP a byte", _intensity),
        *(
            (f"MB of {label}", lambda a, field=field: _held(a, field))
            for label, field in (
                ("arguments", "arguments"),
                ("outputs", "outputs"),
                ("outputs in donated arguments' place", "aliased"),
                ("temporaries", "temporaries"),
                ("code", "code"),
            )
        ),
        ("collectives", _sent),
        ("seconds to compile", lambda a: f"{a.seconds:.1f}"),
    ]
    return [(what, *(cell(a) for a in analyses)) for what, cell in lines]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.4g}"


def _intensity(one: Analysis) -> str:
    return UNKNOWN if one.cost is None else f"{one.cost.flops / max(one.cost.bytes, 1):.3g}"


def _held(one: Analysis, field: str) -> str:
    return UNKNOWN if one.memory is None else _megabytes(getattr(one.memory, field))


def _sent(one: Analysis) -> str:
    kinds = one.collectives.items()
    return ", ".join(f"{n} {kind}, {_megabytes(size)} MB" for kind, (n, size) in kinds) or "none"


def show(config: TrainConfig) -> None:
    """Prints ``analyze`` as a table, in the lead alone."""
    mesh = distributed.data_mesh()
    analyses = analyze(config, mesh)
    if not distributed.is_lead():
        return
    kind = mesh.devices.flat[0].device_kind
    each = f"each of {mesh.size} x {kind}" if mesh.size > 1 else f"one {kind}"
    drawn = Table(title=f"a step of {type(config.model).__name__} on {each}", title_justify="left")
    drawn.add_column("")
    for one in analyses:
        drawn.add_column(one.name, justify="right")
    for line in table(analyses):
        drawn.add_row(*line)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(drawn)
    console.print(
        "XLA counts what it has made of the program, a loop's body once; the network's multiply-"
        "adds are those of convolutions and dense layers, two FLOP each, thrice in training.",
        soft_wrap=True,
    )
