"""Whether a device computes what the CPU does: a network's outputs and its gradient beside them.

For each network one process on the CPU and one on the device start from the same seeds, on the same
batch of noise. Both evaluate it, and take one training step. Compared are the logits, the mean
loss, the gradient (the trace of SGD with momentum after one step is the gradient) and the new
running statistics: the length of the difference over the length of the CPU's, all parameters
together. The CPU computes in float32; the device in float32 with the highest precision of products,
and in bfloat16 as well, where the CPU's own bfloat16 says how far from float32 that is.

Standard output has one line of JSON for each network and dtype, standard error the table; the exit
status is 1 where one is beyond its bound.

Claim: in float32 the device's numbers are the CPU's to rounding; in bfloat16 to that dtype's.

Command: python -m experiments.benchmarks.numbers --device gpu
Hardware: a GPU; with --device cpu the CPU beside itself.
Published: none.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import common, numbers_worker, workers
from experiments.benchmarks.peer_nets.specs import NETWORKS
from flax_resnet import flags
from flax_resnet.errors import UserError, check_choices, check_range, did_you_mean
from flax_resnet.main import one_line_errors

BOUNDS: Mapping[str, float] = {
    "logits": 1e-4,
    "loss": 1e-5,
    "gradient": 2e-3,
    "batch_stats": 1e-4,
}
"""Of the relative differences of each part in float32. BatchNorm over a few images of noise
amplifies what rounding leaves of a gradient."""
PARTS = tuple(BOUNDS)
DTYPES = ("float32", "bfloat16")
SLACK = 2.0
"""In another dtype a part may be so many times as far from float32 as the CPU's own is."""
LIMIT = 600.0
"""Seconds for one process."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared."""

    device: workers.Device = "gpu"
    """What is held against the CPU."""
    models: tuple[str, ...] = tuple(NETWORKS)
    """Any of mini, resnet20, resnet50, dropblock_resnet."""
    dtypes: tuple[str, ...] = DTYPES
    """What the device computes in."""
    image_size: int = 64
    """Height and width of the images; of networks for CIFAR's, 32 at most."""
    batch_size: int = 16
    """Images."""
    strict: bool = True
    """End with status 1 where one is beyond its bound."""

    def __post_init__(self) -> None:
        check_choices(self)
        for flag, words, known in (
            ("--models", self.models, NETWORKS),
            ("--dtypes", self.dtypes, DTYPES),
        ):
            if not words:
                raise UserError(f"{flag}: expected one or more of {', '.join(known)}")
            for word in words:
                if word not in known:
                    near = did_you_mean(word, known)
                    raise UserError(f"{flag} {word!r}: expected some of {', '.join(known)}{near}")
        for name in ("image_size", "batch_size"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), 2)

    def task(self, network: str, dtype: str, path: Path) -> dict[str, Any]:
        """What a process is told to compute, and where its arrays go."""
        side = min(self.image_size, NETWORKS[network].image_size)
        return {
            "network": network,
            "dtype": dtype,
            "image_size": side,
            "batch_size": self.batch_size,
            "path": str(path),
        }


def computed(
    settings: Settings, network: str, dtype: str, device: workers.Device, path: Path
) -> tuple[dict[str, np.ndarray], str]:
    """(arrays of a network, the device that computed them), in a process of their own.

    Raises:
      UserError: it could not.
    """
    task, cores = settings.task(network, dtype, path), workers.usable_cores()
    try:
        worker = workers.Worker(numbers_worker.__name__, task, device, cores, LIMIT)
    except workers.WorkerError as error:
        raise UserError(f"{network} cannot be computed on the {device}: {error}") from None
    worker.close()
    with np.load(path) as stored:
        return dict(stored), worker.about["device_kind"]


def differences(
    found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """{part: length of the difference over the reference's length}.

    Raises:
      AssertionError: they are not of the same names and shapes.
    """
    shapes = [{k: v.shape for k, v in one.items()} for one in (found, reference)]
    if shapes[0] != shapes[1]:
        raise AssertionError("the device's arrays are not of the CPU's names and shapes")
    each = {}
    for part in PARTS:
        names = [name for name in reference if name.partition("[")[0].partition(".")[0] == part]
        ours, theirs = (
            np.concatenate([np.float64(one[name]).ravel() for name in names])
            for one in (found, reference)
        )
        each[part] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return each


def measure(settings: Settings, network: str, directory: Path) -> list[Row]:
    """A row for each dtype of a network."""
    reference, _ = computed(settings, network, "float32", "cpu", directory / "cpu.npz")
    rows = []
    for dtype in settings.dtypes:
        path = directory / f"{dtype}.npz"
        found, kind = computed(settings, network, dtype, settings.device, path)
        apart, bounds = differences(found, reference), dict(BOUNDS)
        if dtype != "float32":
            own, _ = computed(settings, network, dtype, "cpu", directory / "own.npz")
            bounds = {
                part: max(BOUNDS[part], SLACK * each)
                for part, each in differences(own, reference).items()
            }
        rows.append(
            {
                "network": network,
                "dtype": dtype,
                "device_kind": kind,
                "differences": apart,
                "bound": bounds,
                # What is not a number is beyond every bound.
                "within": all(apart[part] <= bounds[part] for part in PARTS),
            }
        )
    return rows


def report(rows: Sequence[Row]) -> str:
    """The table for people: differences, with their bounds."""
    lines = [
        [
            row["network"],
            row["dtype"],
            *(f"{row['differences'][part]:.1e} ({row['bound'][part]:.0e})" for part in PARTS),
            "yes" if row["within"] else "NO",
        ]
        for row in rows
    ]
    return common.table(["network", "dtype", *PARTS, "within"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Compares every network; exits with 1 where one is beyond its bound."""
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="flax_resnet_") as directory:
        prog = "python -m experiments.benchmarks.numbers"
        settings = flags.cli(Settings, argv, __doc__ or "", prog)
        rows = []
        for network in settings.models:
            for row in measure(settings, network, Path(directory)):
                common.print_json({"benchmark": "numbers", **row})
                rows.append(row)
        print(report(rows), file=sys.stderr)
    if settings.strict and not all(row["within"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
