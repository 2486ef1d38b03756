"""Transfer learning with the features of a frozen trunk cached, against the ordinary way.

The MNIST tutorial's recipe (experiments.mnist_transfer), whole: opening the data, computing and
caching the features (or not), compiling, training the head, evaluating after every epoch,
checkpoints. In one run, one after the other: cached with an empty cache, cached again, ordinary.

Claim: over 40 epochs the cached way is at least 20 times faster, and reaches the same accuracy to
0.1 %. It does a fortieth of the forward passes; what it cannot save is start-up.

Standard output has one line of JSON a run, standard error the table. Without --weights the trunk
is random: times are the same, accuracies are not those of ImageNet's weights.

Command: python -m experiments.benchmarks.transfer --data-dir DIR
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import mnist_transfer
from experiments.benchmarks import common
from flax_resnet import flags, models
from flax_resnet.config import TrainConfig
from flax_resnet.errors import UserError, check_range
from flax_resnet.main import one_line_errors
from flax_resnet.models import ResNet
from flax_resnet.train import train_and_evaluate

HEADER = ("way", "epochs", "seconds", "ratio", "top-1 %", "loss")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    data_dir: str | None = None
    """Directory that holds mnist/VERSION; default: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    name: str = "mnist"
    """The set; --pad makes its images large enough for the network."""
    pad: int = 2
    """Pixels of zero on every side."""
    model: str = "ResNet152"
    """The trunk: a name that `python -m flax_resnet names` lists."""
    weights: str | None = None
    """Of the trunk: a weight file or a run's directory; None: random."""
    train_images: int = 2000
    """First images of the training split that are used."""
    eval_images: int = 500
    """First images of the test split that are used, each epoch."""
    epochs: int = 40
    """Epochs of training."""
    ordinary_epochs: int | None = None
    """Train the ordinary way for fewer, and scale its time up; None: all of them."""

    def __post_init__(self) -> None:
        for name in ("train_images", "eval_images", "epochs", "ordinary_epochs"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), 1)

    def config(self, cached: bool) -> TrainConfig:
        """The tutorial's recipe with this trunk and these images."""
        base = mnist_transfer.get_config()
        model = models.create(self.model, num_classes=10, hidden_units=(256,))
        if not isinstance(model, ResNet):
            raise UserError(f"--model {self.model}: it is no ResNet, and has no trunk to freeze")
        data = dataclasses.replace(
            base.data,
            name=self.name,
            data_dir=self.data_dir,
            pad=self.pad,
            train_split=f"train[:{self.train_images}]",
            eval_split=f"test[:{self.eval_images}]",
        )
        return dataclasses.replace(
            base,
            model=model.clone(frozen_stages=len(model.stage_sizes)),
            weights=self.weights,
            normalization="imagenet" if self.weights is None else "weights",
            data=data,
            num_epochs=self.epochs if cached else self.ordinary_epochs or self.epochs,
            cache_features=cached,
        )


def measure(settings: Settings) -> list[Row]:
    """Rows: cached with an empty cache, cached again, ordinary."""
    rows = []
    with tempfile.TemporaryDirectory() as directory, _own_cache(Path(directory) / "cache"):
        for way in ("cached", "cached again", "ordinary"):
            config = settings.config(cached=way != "ordinary")
            start = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for the rows
                result = train_and_evaluate(config, Path(directory) / way.replace(" ", "-"))
            seconds = time.perf_counter() - start
            # Start-up does not grow with the epochs: only the loop's time is scaled.
            missing = settings.epochs / config.num_epochs - 1
            rows.append(
                {
                    "way": way,
                    "epochs": config.num_epochs,
                    "seconds": seconds,
                    "seconds_scaled": seconds + result["seconds"] * missing,
                    "top1": result["top1"],
                    "loss": result["loss"],
                }
            )
    return rows


@contextlib.contextmanager
def _own_cache(directory: Path) -> Iterator[None]:
    """Within it features are cached in ``directory``."""
    kept = os.environ.get("FLAX_RESNET_CACHE")
    os.environ["FLAX_RESNET_CACHE"] = str(directory)
    try:
        yield
    finally:
        del os.environ["FLAX_RESNET_CACHE"]
        if kept is not None:
            os.environ["FLAX_RESNET_CACHE"] = kept


def report(rows: Sequence[Row]) -> str:
    """The table for people."""
    ordinary = rows[-1]["seconds_scaled"]

    def seconds(row: Row) -> str:
        scaled = (
            "" if row["epochs"] == rows[0]["epochs"] else f", scaled {row['seconds_scaled']:.1f}"
        )
        return f"{row['seconds']:.1f}{scaled}"

    lines = [
        (
            row["way"],
            f"{row['epochs']:g}",
            seconds(row),
            f"{ordinary / row['seconds_scaled']:.1f}",
            f"{100 * row['top1']:.2f}",
            f"{row['loss']:.4f}",
        )
        for row in rows
    ]
    return common.table(HEADER, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the three ways; prints lines of JSON, then the table."""
    with one_line_errors(), common.no_compilation_cache():
        prog = "python -m experiments.benchmarks.transfer"
        settings = flags.cli(Settings, argv, __doc__ or "", prog)
        hardware = common.hardware()
        rows = measure(settings)
        for row in rows:
            common.print_json(
                {
                    "benchmark": "transfer",
                    **row,
                    "ratio": rows[-1]["seconds_scaled"] / row["seconds_scaled"],
                    "settings": dataclasses.asdict(settings),
                    "hardware": hardware,
                }
            )
        print(", ".join(f"{name} {value}" for name, value in hardware.items()), file=sys.stderr)
        print(report(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
