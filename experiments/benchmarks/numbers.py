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
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import flax_resnet
from experiments.benchmarks import common, driver, steps, workers
from experiments.benchmarks.driver import Columns, Row
from experiments.benchmarks.peers.specs import NETWORKS
from flax_resnet import UserError
from flax_resnet.data.normalization import normalize
from flax_resnet.errors import check_types
from flax_resnet.xla.backend import usable_cores

BOUNDS: Mapping[str, float] = {
    "logits": 1e-4,
    "loss": 1e-5,
    "gradient": 2e-3,
    "batch_stats": 1e-4,
}
"""Of the relative differences of each part in float32. BatchNorm over a few images of noise
amplifies what rounding leaves of a gradient."""
PARTS = tuple(BOUNDS)
NAME = "experiments.benchmarks.numbers"
DTYPES = ("float32", "bfloat16")
SLACK = 2.0
"""In another dtype a part may be so many times as far from float32 as the CPU's own is."""
LIMIT = 600.0
"""Seconds for one process."""


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
        check_types(self)
        driver.check_names("--models", self.models, NETWORKS)
        driver.check_names("--dtypes", self.dtypes, DTYPES)
        driver.check_least(self, 2, "image_size", "batch_size")


def computed(
    settings: Settings, network: str, dtype: str, device: workers.Device, path: Path
) -> tuple[dict[str, np.ndarray], str]:
    """(arrays of a network, the device that computed them), in a process of their own."""
    task = {
        "network": network,
        "dtype": dtype,
        "image_size": min(settings.image_size, NETWORKS[network].image_size),
        "batch_size": settings.batch_size,
        "path": str(path),
    }
    built = workers.Entrant.built(network, NAME, task, device, usable_cores(), LIMIT)
    if built.error:
        raise UserError(f"{network} cannot be computed on the {device}: {built.error}")
    with np.load(path) as stored:
        return dict(stored), built.about["device_kind"]


def differences(
    found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """{part: length of the difference over the reference's length}."""
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
        # What is not a number is beyond every bound.
        within = all(apart[part] <= bounds[part] for part in PARTS)
        about = {"network": network, "dtype": dtype, "device_kind": kind, "within": within}
        rows.append({**about, "differences": apart, "bound": bounds})
    return rows


def outputs(task: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{part/name: array} of a network on this process's first device."""
    config = flax_resnet.TrainConfig(
        model=flax_resnet.create(task["network"], dtype=task["dtype"]),
        batch_size=task["batch_size"],
        optimizer=steps.optimizer("sgd", 1e-3),
    )
    ready, batch = steps.noise_run(config, steps.one_device(), task["image_size"])
    state = ready.state

    @jax.jit
    def logits(state: Any, images: Any) -> Any:
        return state.apply_fn(state.variables(), normalize(images, state.normalization))

    found = {"logits": np.asarray(logits(state, batch["image"]), np.float32)}
    after, sums = jax.jit(functools.partial(ready.programs.steps()[0]))(state, batch)
    found["loss"] = np.asarray(sums["loss"] / sums["count"])
    trees = {
        "gradient": optax.tree.get(after.opt_state, "trace"),
        "batch_stats": after.batch_stats,
    }
    for part, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[part + jax.tree_util.keystr(path)] = np.asarray(leaf, np.float32)
    return found


def build(task: Mapping[str, Any]) -> workers.Built:
    """In a worker: computes, and leaves the arrays at the task's path."""
    jax.config.update("jax_default_matmul_precision", "highest")
    arrays: Any = outputs(task)
    np.savez(task["path"], **arrays)
    return workers.Built({"device_kind": jax.devices()[0].device_kind}, lambda steps: 0.0)


def measured(settings: Settings) -> Iterator[Row]:
    """Compares every network."""
    with tempfile.TemporaryDirectory(prefix="flax_resnet_") as directory:
        for network in settings.models:
            for row in measure(settings, network, Path(directory)):
                yield {**row, "strict": settings.strict, "hardware": common.machine()}


def _part(part: str) -> Callable[[Row], str]:
    """The cell of a part: its difference, with the bound."""
    return lambda row: f"{row['differences'][part]:.1e} ({row['bound'][part]:.0e})"


COLUMNS: Columns = {
    "network": lambda row: row["network"],
    "dtype": lambda row: row["dtype"],
    **{part: _part(part) for part in PARTS},
    "within": lambda row: "yes" if row["within"] else "NO",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compares every network; exits with 1 where one is beyond its bound."""
    report = functools.partial(driver.table, COLUMNS)
    rows = driver.run("numbers", Settings, __doc__ or "", argv, measured, report)
    if any(row["strict"] and not row["within"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
