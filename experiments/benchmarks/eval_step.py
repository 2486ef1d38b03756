"""Seconds of our evaluation step, the share of the machine's peak that it reaches, and its memory.

What is timed is the step that a run compiles, in the loop that a run evaluates with, on a batch of
uint8 noise that lies on the device: normalisation, forward pass, the sums of metrics and the
confusion counts; no data pipeline. Operations, peak and memory are counted as in train_step, one
forward pass a step.

With --export it is the network's export to StableHLO instead, beside the jitted network that the
export is compared with: --steps calls of the one, then of the other, each round; the images come
from and the logits go to numpy arrays.

Standard output has one line of JSON a network, standard error the table.

Claim: none; it measures.

Command: python -m experiments.benchmarks.eval_step
  (on a GPU: --dtype bfloat16 --models resnet50 --batch-size 512; exports: --export --batch-size 1)

Hardware: any.

Published: none.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import common, driver, steps
from flax_resnet import Preprocessing, export, load
from flax_resnet.exporting import loader
from flax_resnet.exporting.exports import in_float32
from flax_resnet.inference.classifier import Classifier
from flax_resnet.weights import Pretrained


@dataclasses.dataclass(frozen=True)
class Settings(steps.Settings):
    """What is timed."""

    export: bool = False
    """Time the networks' exports beside the jitted networks, in float32."""


def exported(settings: Settings, name: str) -> driver.Row:
    """Seconds of a call of a network and of its export, fresh variables, on uint8 noise."""
    config = settings.config(name)
    side = settings.side(config)
    module, variables = load(name, input_shape=(side, side, steps.CHANNELS))
    source = in_float32(Pretrained(module, variables, Preprocessing(size=side, resize=None)))
    with tempfile.TemporaryDirectory() as directory:
        difference = export(source, Path(directory) / "net").difference
        net = loader.load(Path(directory) / "net")
    shape = (config.batch_size, side, side, steps.CHANNELS)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def seconds(run: Callable[[Any], Any]) -> float:
        calls = range(settings.steps)
        return common.timed(lambda: [np.asarray(run(images)) for _ in calls])[1] / settings.steps

    of = Classifier(source)
    pair = (lambda images: of.outputs(images)[0]), net
    for run in pair:
        run(images)
    rounds = np.array([[seconds(run) for run in pair] for _ in range(settings.rounds)])
    jitted, apart = rounds.T.tolist()
    return {
        "model": name,
        "image_size": side,
        "batch_size": config.batch_size,
        "jitted_seconds": dataclasses.asdict(common.Timing.of(jitted)),
        "export_seconds": dataclasses.asdict(common.Timing.of(apart)),
        "export_over_jitted": common.ratio(apart, jitted),
        "largest_relative_difference": difference,
    }


COLUMNS: driver.Columns = {
    "network": lambda row: row["model"],
    "image": lambda row: str(row["image_size"]),
    "batch": lambda row: str(row["batch_size"]),
    "jitted s": driver.timing_cell("jitted_seconds"),
    "export s": driver.timing_cell("export_seconds"),
    "export over jitted": driver.timing_cell("export_over_jitted"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every network; prints lines of JSON, then the table."""

    def rows(settings: Settings) -> Iterator[driver.Row]:
        if settings.export:
            return (exported(settings, name) for name in settings.models)
        return steps.rows("eval", settings)

    def report(rows: Sequence[driver.Row]) -> str:
        return steps.report(rows) if "peak" in rows[0] else driver.table(COLUMNS, rows)

    driver.run("eval_step", Settings, __doc__ or "", argv, rows, report)


if __name__ == "__main__":
    main()
