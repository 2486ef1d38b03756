"""CIFAR-10 by the published speed run, as its author's package trains it, on this machine's GPU.

pip's `airbench` (Keller Jordan, MIT licence; it needs torch and torchvision) is what
experiments.cifar10_speedrun is held against. It downloads CIFAR-10 unless it finds its own files in
the working directory, so these are written first, from the copy that the library reads. Every run
is a training from whitening to the evaluation with test-time augmentation, until the GPU is done;
one before is not counted. Opening the data is no part of it, whitening and making the network are.

Standard output has one line of JSON for the runs.

Claim: none; it measures.

Command: python -m experiments.benchmarks.airbench --data-dir DIR
Hardware: an NVIDIA GPU.
Published: 94 % in 3.29 s, 95 % in 10.4 s, 96 % in 46.3 s on an A100 (Jordan 2024, table 2).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import common, driver
from experiments.benchmarks.driver import Row
from flax_resnet import DataConfig, UserError
from flax_resnet.data.order import decode_chunks
from flax_resnet.data.sources import open_tfds
from flax_resnet.errors import check_range

TARGETS = (93, 94, 95, 96)
TTA_LEVEL = 2
CHUNK = 10_000


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    data_dir: str | None = None
    """Directory that holds cifar10; default: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    target: int = 94
    """Per cent: which of the package's ways, 93 to 96."""
    runs: int = 5
    """Trainings that are timed."""

    def __post_init__(self) -> None:
        check_range("--runs", self.runs, 1)
        if self.target not in TARGETS:
            raise UserError(f"--target {self.target}: expected one of {TARGETS}")


def write_sets(data_dir: str | None, directory: Path, torch: Any) -> None:
    """Writes CIFAR-10 as the package keeps it: images (N, 32, 32, 3), labels (N,), classes.

    Raises:
      UserError: there is no such set.
    """
    directory.mkdir()
    decoder = DataConfig(name="cifar10").decoder(channels=3)
    names = ("train", "test")
    for source, name in zip(open_tfds("cifar10", data_dir, names), names, strict=True):
        chunks = decode_chunks(source, decoder, np.arange(len(source)), CHUNK)
        images, labels = map(np.concatenate, zip(*chunks, strict=True))
        arrays = (torch.from_numpy(x) for x in (images, labels.astype(np.int64)))
        fields = dict(zip(("images", "labels"), arrays, strict=True))
        torch.save({**fields, "classes": list(source.class_names)}, directory / f"{name}.pt")


def measure(settings: Settings, directory: Path) -> Row:
    """Trains as often as it is told to; must be called with ``directory`` current."""
    try:
        torch, airbench = map(importlib.import_module, ("torch", "airbench"))
    except ModuleNotFoundError as error:
        advice = "pip install airbench torch torchvision"
        raise UserError(f"{error.name} is not installed: {advice}") from None
    if not torch.cuda.is_available():
        raise UserError("there is no GPU that torch knows: the published speed run needs one")
    write_sets(settings.data_dir, directory / "cifar10", torch)
    library = importlib.import_module(f"airbench.lib_airbench{settings.target}")
    hyp = library.hyp
    trains = getattr(library, f"train{settings.target}")
    seconds, top1 = [], []
    evaluated = airbench.CifarLoader("cifar10", train=False, batch_size=2000)
    utils: Any = importlib.import_module("airbench.utils")
    opens = airbench.CifarLoader
    # Each training opens the test set, and needs it only where it prints.
    utils.CifarLoader = lambda *_, **__: evaluated
    for _ in range(1 + settings.runs):
        loader = opens(
            "cifar10", train=True, batch_size=hyp["opt"]["batch_size"], aug=hyp["aug"], altflip=True
        )
        torch.cuda.synchronize()
        began = time.perf_counter()
        net = trains(train_loader=loader, verbose=False)
        top1.append(airbench.evaluate(net, evaluated, tta_level=TTA_LEVEL))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    del seconds[0], top1[0]  # the one that also looks for the quickest convolutions
    times = dataclasses.asdict(common.Timing.of(seconds))
    deviation = statistics.stdev(top1) if len(top1) > 1 else None
    return {
        "target": settings.target,
        "seconds": {**times, "mean": statistics.mean(seconds)},
        "top1": {"mean": statistics.mean(top1), "sd": deviation, "n": len(top1)},
        "device_kind": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__},
    }


def measured(settings: Settings) -> Iterator[Row]:
    """Trains in a directory of its own, which holds the package's files."""
    if settings.data_dir is not None:
        place = str(Path(settings.data_dir).resolve())
        settings = dataclasses.replace(settings, data_dir=place)
    with tempfile.TemporaryDirectory(prefix="flax_resnet_") as directory:
        with contextlib.chdir(directory), contextlib.redirect_stdout(sys.stderr):
            row = measure(settings, Path(directory))
        yield {**row, "hardware": common.machine()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures; prints a line of JSON."""
    driver.run("airbench", Settings, __doc__ or "", argv, measured)


if __name__ == "__main__":
    main()
