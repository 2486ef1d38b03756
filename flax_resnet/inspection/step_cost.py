"""What a run's two steps cost and hold, read from the compiled programs; nothing is trained."""

from __future__ import annotations

import collections
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flax_resnet.data import tta
from flax_resnet.distributed import sharding
from flax_resnet.errors import UserError
from flax_resnet.models.summary import FLOPS_A_MAC, summarize
from flax_resnet.records import text_tables
from flax_resnet.training.checks import check_batch
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.setup import prepare

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


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """{kind: number of operations between devices in a program's text}; a loop's body once."""
    return dict(collections.Counter(COLLECTIVE.findall(compiled.as_text() or "")))


def analyze(config: TrainConfig, mesh: Mesh | None = None) -> dict[str, dict[str, Any]]:
    """Compiles a run's training and evaluation step, and reads what they cost on one device.

    The data is opened, since the programs have its shapes. The working directory is not touched.
    The network's multiply-adds are those of convolutions and dense layers, two FLOP each; in
    training there are two more for the inputs' and two for the weights' gradients.

    Returns {"train", "eval": {what: a number, NaN where the backend does not say, or text}}. The
    ``mesh`` has the devices to compile for, by default all.
    """
    if config.cache_features:
        raise UserError(
            "--analyze with cache_features: the step would be that of the top alone, on features "
            "that have to be computed first; leave one out"
        )
    mesh = sharding.data_mesh() if mesh is None else mesh
    check_batch(config, mesh)
    with tempfile.TemporaryDirectory(prefix="flax_resnet_") as nowhere:
        run = prepare(config, Path(nowhere), mesh)

    def costs(batch: int, shape: tuple[int, ...], flops_a_mac: int, make: Any) -> dict[str, Any]:
        began = time.perf_counter()
        compiled = make()
        seconds = time.perf_counter() - began
        cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        flops, moved = cost.get("flops", math.nan), cost.get("bytes accessed", math.nan)
        images = batch // mesh.size
        macs = summarize(config.model, (shape[0], shape[1], shape[2])).macs
        kinds = collectives(compiled).items()
        return {
            "images": images,
            "GFLOP, by XLA": flops / 1e9,
            "GFLOP, by the network's multiply-adds": flops_a_mac * macs * images / 1e9,
            "MB accessed": moved / 1e6,
            "arithmetic intensity, FLOP a byte": flops / (moved or math.nan),
            **{f"MB of {what}": getattr(memory, field) / 1e6 for what, field in MEMORY.items()},
            "collectives": ", ".join(f"{count} {kind}" for kind, count in kinds) or "none",
            "seconds to compile": seconds,
        }

    seen, data = tta.VIEWS_PER_IMAGE[config.tta], run.data
    sizes, shapes = (config.batch_size, config.eval_batch_size), (data.batch_shape, data.eval_shape)
    return {
        "train": costs(sizes[0], shapes[0], FLOPS_A_MAC["train"], run.programs.compile_step),
        "eval": costs(
            sizes[1], shapes[1], FLOPS_A_MAC["eval"] * seen, run.programs.compile_evaluation
        ),
    }


def show(config: TrainConfig) -> None:
    """Prints ``analyze`` as a table, in process 0 alone."""
    mesh = sharding.data_mesh()
    analyses = analyze(config, mesh)
    if not sharding.is_lead():
        return
    kind = mesh.devices.flat[0].device_kind
    each = f"each of {mesh.size} x {kind}" if mesh.size > 1 else f"one {kind}"
    columns = list(analyses.values())
    rows = [
        [what, *(x if isinstance(x, str) else f"{x:,.4g}" for x in (c[what] for c in columns))]
        for what in columns[0]
    ]
    title = f"a step of {type(config.model).__name__} on {each}"
    text_tables.show(title, rows, ["", *analyses], numbers=2)
    print(
        "XLA counts what it has made of the program, a loop's body once; the network's multiply-"
        "adds are those of convolutions and dense layers, two FLOP each, thrice in training."
    )
