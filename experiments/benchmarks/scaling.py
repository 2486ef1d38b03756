"""Weak scaling: images/s of the training step on 1, 2, 4, ... devices, and what collectives cost.

Each device has the same number of images however many devices there are. What is timed is the step
that a run compiles (its state donated, laid out by --sharding), on one batch of noise that lies on
the devices: no data pipeline. Efficiency is images/s a device against that of the fewest devices.

The share of time in collectives is 1 - t'/t. t is the time of the step; t' that of the same step on
as many devices at the same time, each by itself: its own whole state, its own norms, nothing sent.
So it is the time that collectives add: one that runs beside computation counts only as far as it
is waited for. With zero and fsdp, t' has the optimizer's whole update in place of a device's part,
and the share is that much too low. Rounds of the two take turns. On one device the share ought to
be zero: what is printed there is the error of the comparison.

The number of collectives of a step is read from the compiled program, those in a loop
(--accum-steps on an accelerator) once.

Virtual devices share one processor: there the figures are no claim of speed, and the table says
so.

Claim: none; it measures. (Goyal et al. 2017: 90 % from 8 to 256 GPUs, ResNet-50.)

Command: python -m experiments.benchmarks.scaling --model resnet50 --image-size 224 --dtype bfloat16
  (on a CPU: JAX_NUM_CPU_DEVICES=8 python -m experiments.benchmarks.scaling --image-size 8)

Hardware: several accelerators, not run here.

Published: none for this library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from experiments.benchmarks import common, driver
from experiments.benchmarks.driver import Columns, Row, timing_cell
from experiments.benchmarks.steps import noise_run, round_seconds
from flax_resnet import TrainConfig, UserError, models
from flax_resnet.distributed import sharding
from flax_resnet.distributed.sharding import StateSharding
from flax_resnet.errors import check_range
from flax_resnet.inspection.step_cost import collectives
from flax_resnet.models.arguments import check_bn_group
from flax_resnet.training import run
from flax_resnet.training.step import Batch

COLUMNS: Columns = {
    "devices": lambda row: str(row["number"]),
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "efficiency %": lambda row: f"{100 * row['efficiency']:.0f}",
    "step s": timing_cell("step_seconds"),
    "alone s": timing_cell("alone_step_seconds"),
    "in collectives %": lambda row: f"{100 * row['collectives_share']:.0f}",
    "collectives": lambda row: (
        ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items()) or "none"
    ),
    "state MB a device": lambda row: f"{row['state_bytes_a_device'] / 1e6:.3g}",
}
SHARED_CORES = (
    "These devices are virtual and share this machine's {cores} cores: no claim of speed, nor of "
    "scaling. The collectives are those of a CPU's program."
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed."""

    devices: tuple[int, ...] = ()
    """Numbers of devices; by default 1, 2, 4, ... and all of this process's."""
    model: str = "resnet20"
    """A name that `python -m flax_resnet names` lists."""
    image_size: int = 32
    """Height and width of the images."""
    images_per_device: int = 32
    """Images in a step, for each device."""
    sharding: StateSharding = "replicated"
    """What devices split of the state."""
    bn_group: int | None = None
    """Images normalised together; None: the whole batch, over all devices."""
    accum_steps: int = 1
    """Parts of a batch."""
    dtype: str = "float32"
    """What the network computes in."""
    steps: int = 10
    """Steps of a round, dispatched one after another and timed together."""
    rounds: int = 5
    """Rounds timed, after one that is not."""

    def __post_init__(self) -> None:
        sizes = ("image_size", "images_per_device", "accum_steps")
        driver.check_least(self, 1, *sizes, "steps", "rounds")
        if self.images_per_device % self.accum_steps:
            raise UserError(
                f"--images-per-device {self.images_per_device} does not divide into "
                f"--accum-steps {self.accum_steps} equal parts: change one"
            )
        check_bn_group(self.bn_group, self.images_per_device, self.accum_steps)

    def numbers(self) -> list[int]:
        """Numbers of devices, fewest first; UserError where there are not so many."""
        most = jax.local_device_count()
        for number in self.devices:
            check_range("--devices", number, 1)
            if number > most:
                raise UserError(
                    f"--devices {number}: there are {most}; on a CPU, JAX_NUM_CPU_DEVICES={number} "
                    "in the environment makes virtual ones"
                )
        powers = [2**n for n in range(most.bit_length()) if 2**n <= most]
        return sorted({*(self.devices or (*powers, most))})

    def network(self) -> nn.Module:
        """The model; UserError where it has no norms of parts of a batch."""
        fields: dict[str, Any] = {"dtype": self.dtype}
        if self.bn_group is not None:
            if not isinstance(models.create(self.model), models.ResNet):
                raise UserError(f"--bn-group with --model {self.model}: it is no ResNet")
            fields["bn_group"] = self.bn_group
        return models.create(self.model, **fields)


def set_up(settings: Settings, mesh: Mesh) -> tuple[run.Run, Batch]:
    """(a run at step 0 on the devices of a mesh, a batch of noise there)."""
    config = TrainConfig(
        model=settings.network(),
        batch_size=settings.images_per_device * mesh.size,
        accum_steps=settings.accum_steps,
        sharding=settings.sharding,
    )
    return noise_run(config, mesh, settings.image_size)


def compile_alone(ready: run.Run, state: Any, batch: Batch) -> jax.stages.Compiled:
    """The same step on the same devices, each with the whole state and its images: none is sent."""
    config = dataclasses.replace(ready.config, sharding="replicated")
    step, _ = dataclasses.replace(ready, config=config).programs.steps()
    whole, split = PartitionSpec(), PartitionSpec(sharding.DATA_AXIS)
    # The devices' states part, and are said to be equal: nothing looks.
    alone = jax.shard_map(
        step, mesh=ready.mesh, in_specs=(whole, split), out_specs=whole, check_vma=False
    )
    return jax.jit(alone, donate_argnums=0).lower(state, batch).compile()


def measure(settings: Settings, number: int) -> Row:
    """Times both steps on the first ``number`` devices."""
    mesh = sharding.data_mesh(jax.local_devices()[:number])
    ready, batch = set_up(settings, mesh)
    leaves = jax.tree.leaves(ready.state)
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in leaves]
    state_bytes = sum(math.prod(shape) * size for shape, size in shapes)
    compiled = cast(jax.stages.Compiled, ready.programs.compile_step())
    state, own = ready.state, sharding.put_replicated(mesh, jax.device_get(ready.state))
    alone = compile_alone(ready, own, batch)
    if sent := collectives(alone):
        raise AssertionError(f"the step of devices by themselves sends {sent}")
    together_seconds, alone_seconds = [], []
    for _ in range(1 + settings.rounds):
        state, seconds = round_seconds(compiled, state, batch, settings.steps)
        together_seconds.append(seconds)
        own, seconds = round_seconds(alone, own, batch, settings.steps)
        alone_seconds.append(seconds)
    together, by_itself = (common.Timing.of(each[1:]) for each in (together_seconds, alone_seconds))
    return {
        "number": number,
        **{k: v for k, v in dataclasses.asdict(settings).items() if k != "devices"},
        "step_seconds": dataclasses.asdict(together),
        "alone_step_seconds": dataclasses.asdict(by_itself),
        "images_per_second": number * settings.images_per_device / together.median,
        "collectives_share": 1 - by_itself.median / together.median,
        "collectives": collectives(compiled),
        "state_bytes_a_device": state_bytes,
        "virtual": mesh.devices.flat[0].platform == "cpu",
    }


def measured(settings: Settings) -> Iterator[Row]:
    """Measures every number of devices; efficiency is images/s a device over that of the first."""
    first = None
    for number in settings.numbers():
        row = measure(settings, number)
        each = row["images_per_second"] / number
        first = first or each
        yield {**row, "efficiency": each / first}


def report(rows: Sequence[Row]) -> str:
    """The table for people, in Markdown, and what it does not say."""
    shared = SHARED_CORES.format(cores=common.hardware()["cores"])
    return driver.table(COLUMNS, rows) + shared * rows[0]["virtual"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every number of devices; prints lines of JSON, then the table."""
    driver.run("scaling", Settings, __doc__ or "", argv, measured, report)


if __name__ == "__main__":
    main()
