"""A network's steps on noise, timed, and the machine's peak: what train_step and eval_step share.

The peak is the best large matrix product of jax and of torch, where that is installed, one after
the other, each in a process of its own. Benchmarks give shares of it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from experiments.benchmarks import common, workers
from experiments.benchmarks.driver import Columns, Row, check_least, table, timing_cell
from experiments.benchmarks.peers.specs import NETWORKS
from flax_resnet import Data, TrainConfig, UserError, create_state, models, summarize
from flax_resnet.distributed import sharding
from flax_resnet.errors import POSITIVE, check_range, check_types
from flax_resnet.models.summary import FLOPS_A_MAC
from flax_resnet.optim import optimizers
from flax_resnet.training import run
from flax_resnet.training.step import Batch
from flax_resnet.training.step_programs import state_sharding
from flax_resnet.xla.backend import usable_cores

Kind = Literal["train", "eval"]
OptimizerName = Literal["sgd", "adam"]
Turn = Callable[[int], float]
"""Does so many steps; seconds a step."""
CHANNELS = 3
BATCH_SIZE = 32
"""Of networks that have no own in NETWORKS."""
PEAK_SIZES: Mapping[workers.Device, int] = {"cpu": 4096, "gpu": 16384}
"""Rows of the matrices of the peak."""
PEAK_TRIES = 7
PEAK_LIMIT = 300.0
"""Seconds that one framework may take for its peak."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed."""

    models: tuple[str, ...] = tuple(NETWORKS)
    """Names that `python -m flax_resnet names` lists."""
    image_size: int | None = None
    """Height and width of the images; None: what the network was made for."""
    batch_size: int | None = None
    """Images in a step; None: 128 for CIFAR's, 8 for resnet50, else 32."""
    dtype: str = "float32"
    """What the networks compute in."""
    optimizer: OptimizerName = "sgd"
    """Of the training step: SGD with a momentum of 0.9, or Adam."""
    steps: int = 5
    """Steps of a round, dispatched one after another and timed together."""
    steps_per_dispatch: int = 1
    """Training steps in one call of the compiled program; a round has whole ones."""
    rounds: int = 5
    """Rounds timed, after one that is not."""
    peak_size: int | None = None
    """Rows of the matrices that the machine's peak is measured with; None: 4096, on GPUs 16384."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.models:
            raise UserError("--models: expected one or more names of networks")
        sizes = ("image_size", "batch_size", "peak_size")
        check_least(self, 1, *sizes, "steps", "rounds", "steps_per_dispatch")

    def config(self, name: str) -> TrainConfig:
        """What a run of a network is set up with; UserError for an unknown name or dtype."""
        known = NETWORKS.get(name)
        batch_size = self.batch_size or (known.batch_size if known else BATCH_SIZE)
        return TrainConfig(
            model=models.create(name, dtype=self.dtype),
            batch_size=batch_size,
            eval_batch_size=batch_size,
            optimizer=optimizer(self.optimizer, 1e-3),
            steps_per_dispatch=self.steps_per_dispatch,
        )

    def side(self, config: TrainConfig) -> int:
        """Height and width of a network's images."""
        return self.image_size or models.default_shape(config.model)[0]


def optimizer(name: OptimizerName, learning_rate: float) -> optimizers.Optimizer:
    """The optimizer of a name; SGD has a momentum of 0.9."""
    check_range("--learning-rate", learning_rate, POSITIVE)
    return optimizers.SGD(learning_rate) if name == "sgd" else optimizers.Adam(learning_rate)


def one_device() -> Mesh:
    """A mesh of this process's first device."""
    return sharding.data_mesh(jax.local_devices()[:1])


def noise_run(config: TrainConfig, mesh: Mesh, image_size: int) -> tuple[run.Run, Batch]:
    """(a run at step 0 on the devices of a mesh, a batch of noise there)."""
    model: Any = config.model
    shape = (image_size, image_size, CHANNELS)
    tx, schedule = config.optimizer.build(num_steps=1000, steps_per_epoch=100)
    stats = {"mean": np.full(CHANNELS, 0.5), "std": np.full(CHANNELS, 0.25)}
    start = functools.partial(create_state, model, tx, image_shape=shape, normalization=stats)
    fresh = start(seed=0)
    state = sharding.put(fresh, state_sharding(fresh, mesh, config.sharding))
    rng = np.random.default_rng(0)
    noise = {
        "image": rng.integers(0, 256, (config.batch_size, *shape), np.uint8),
        "label": rng.integers(0, model.num_classes, config.batch_size, np.int32),
    }
    # The steps ask of the data for nothing but its shapes; several in one program for the images.
    several = config.steps_per_dispatch > 1
    held = sharding.put_replicated(mesh, noise) if several else None
    data = types.SimpleNamespace(
        batch_shape=shape, eval_shape=shape, resident=True, train_arrays=held
    )
    made = run.Run(config, Path(), mesh, cast(Data, data), 1000, 100, schedule, state, start)
    return made, sharding.put_batch(mesh, noise)


def round_seconds(
    step: Callable[..., Any], state: Any, batch: Batch, steps: int
) -> tuple[Any, float]:
    """(the state after, seconds a step) of some steps, waiting for the last."""
    given = functools.reduce, lambda state, _: step(state, batch)[0], range(steps), state
    after, seconds = common.timed(*given)
    return after, seconds / steps


def training(ready: run.Run, batch: Batch) -> tuple[jax.stages.Compiled, Turn]:
    """(the program that a run compiles, what times it); the run's state is gone afterwards."""
    size, state, given = ready.config.steps_per_dispatch, ready.state, cast(Any, batch)
    step: Callable[..., Any]
    if size == 1:
        compiled = step = cast(Any, ready.programs.compile_step())
    else:
        compiled, resident = ready.programs.compile_group()
        rows = np.tile(np.arange(ready.config.batch_size, dtype=np.int32), (size, 1))
        given = sharding.put_local(sharding.group_sharding(ready.mesh), {"row": rows})

        def step(state: Any, rows: Any) -> Any:
            return compiled(state, resident, rows)

    def turn(steps: int) -> float:
        nonlocal state
        state, seconds = round_seconds(step, state, given, -(-steps // size))
        return seconds / size

    return compiled, turn


def evaluation(ready: run.Run, batch: Batch) -> tuple[jax.stages.Compiled, Turn]:
    """(the step that a run compiles, what times it in the loop of a run)."""
    compiled = cast(jax.stages.Compiled, ready.programs.compile_evaluation())
    mask = sharding.put_batch(ready.mesh, np.ones(ready.config.eval_batch_size, bool))
    masked = {**batch, "mask": mask}

    def turn(steps: int) -> float:
        _, seconds = common.timed(run.evaluate, compiled, ready.state, [masked] * steps)
        return seconds / steps

    return compiled, turn


def gflop(module: nn.Module, image_size: int, images: int, kind: Kind) -> float:
    """10^9 operations of a step: two a multiply-add of convolutions and dense layers."""
    macs = summarize(module, (image_size, image_size, CHANNELS)).macs
    return FLOPS_A_MAC[kind] * images * macs / 1e9


def speed(seconds: float, gflop_a_step: float, images: int, best: Peak) -> Row:
    """What follows from the seconds of a step."""
    return {
        "images_per_second": images / seconds,
        "gflop_a_step": gflop_a_step,
        "gflops": gflop_a_step / seconds,
        "peak_share": gflop_a_step / seconds / best.gflops,
    }


def measure(kind: Kind, name: str, settings: Settings, best: Peak) -> Row:
    """Compiles and times the step of a network on this process's first device."""
    config = settings.config(name)
    image_size = settings.side(config)
    work = gflop(config.model, image_size, config.batch_size, kind)
    ready, batch = noise_run(config, one_device(), image_size)
    parameters = sum(x.size for x in jax.tree.leaves(ready.state.params))
    compiled, turn = (training if kind == "train" else evaluation)(ready, batch)
    turn(1)
    timing = common.Timing.of([turn(settings.steps) for _ in range(settings.rounds)])
    memory: Any = compiled.memory_analysis()
    held = memory and (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return {
        "model": name,
        "image_size": image_size,
        "batch_size": config.batch_size,
        "dtype": settings.dtype,
        "optimizer": settings.optimizer if kind == "train" else None,
        "steps": settings.steps,
        "steps_per_dispatch": settings.steps_per_dispatch if kind == "train" else None,
        "parameters": parameters,
        "step_seconds": dataclasses.asdict(timing),
        **speed(timing.median, work, config.batch_size, best),
        "program_bytes": held,
        "process_peak_rss_bytes": workers.peak_rss(),
        "device_peak_bytes": common.device_peak(),
    }


def megabytes(count: float | None) -> str:
    """A cell of a table."""
    return "not known" if count is None else f"{count / 1e6:,.0f}"


COLUMNS: Columns = {
    "network": lambda row: row["model"],
    "image": lambda row: str(row["image_size"]),
    "batch": lambda row: str(row["batch_size"]),
    "step s": timing_cell("step_seconds"),
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "GFLOP a step": lambda row: f"{row['gflop_a_step']:.3g}",
    "GFLOP/s": lambda row: f"{row['gflops']:,.0f}",
    "% of peak": lambda row: f"{100 * row['peak_share']:.0f}",
    "program MB": lambda row: megabytes(row["program_bytes"]),
    "process MB": lambda row: megabytes(row["process_peak_rss_bytes"]),
}


def show_peak(peak: Mapping[str, Any]) -> str:
    """A line for people on the fields of a Peak."""
    each = ", ".join(
        f"{framework} {value if isinstance(value, str) else format(value, ',.0f')}"
        for framework, value in peak["by"].items()
    )
    best = f"{peak['gflops']:,.0f} GFLOP/s, {peak['dtype']} products of {peak['size']} rows"
    return f"peak: {best} ({each})\nmedian (least-most)"


def rows(kind: Kind, settings: Settings) -> Iterator[Row]:
    """Measures the peak and every network."""
    for name in settings.models:
        config = settings.config(name)  # what is wrong is said before anything is measured
        gflop(config.model, settings.side(config), config.batch_size, kind)
    device: workers.Device = "gpu" if jax.default_backend() == "gpu" else "cpu"
    best = machine_peak(device, settings.dtype, usable_cores(), settings.peak_size)
    for name in settings.models:
        yield {**measure(kind, name, settings, best), "peak": dataclasses.asdict(best)}


def report(rows: Sequence[Row]) -> str:
    """The peak and the table, for people."""
    return f"{show_peak(rows[0]['peak'])}\n{table(COLUMNS, rows)}"


@dataclasses.dataclass(frozen=True)
class Peak:
    """The machine's best product of square matrices: 10^9 floating-point operations a second.

    ``by`` is {framework: its own figure, or why it has none}.
    """

    gflops: float
    dtype: str
    size: int
    by: Mapping[str, float | str]


def machine_peak(device: workers.Device, dtype: str, cores: int, size: int | None) -> Peak:
    """Measures the machine's peak; UserError where neither framework can."""
    size = size or PEAK_SIZES[device]
    by: dict[str, float | str] = {}
    for framework in ("jax", "torch"):
        task = {"framework": framework, "device": device, "dtype": dtype, "size": size}
        arguments = (__name__, {**task, "cores": cores}, device, cores, PEAK_LIMIT)
        built = workers.Entrant.built(framework, *arguments)
        by[framework] = built.error or built.about["gflops"]
    best = [value for value in by.values() if not isinstance(value, str)]
    if not best:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in by.items())
        raise UserError(
            f"the machine's peak cannot be measured in {dtype} on the {device}: {reasons}"
        )
    return Peak(max(best), dtype, size, by)


def build(task: Mapping[str, Any]) -> workers.Built:
    """In a worker: measures the matrix product of one framework."""
    size = task["size"]
    if task["framework"] == "jax":
        matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(task["dtype"])
        product = jax.jit(jnp.matmul)

        def multiply() -> None:
            jax.block_until_ready(product(matrix, matrix))
    else:
        import torch

        torch.set_num_threads(task["cores"])
        device = "cuda" if task["device"] == "gpu" else "cpu"
        if device == "cuda":
            torch.set_float32_matmul_precision("high")  # as jax does by itself
        rows = torch.randn(size, size, device=device).to(getattr(torch, task["dtype"]))
        result = torch.empty_like(rows)

        def multiply() -> None:
            torch.matmul(rows, rows, out=result)
            result[0, 0].item()  # waits for a GPU

    multiply()
    seconds = min(common.timed(multiply)[1] for _ in range(PEAK_TRIES))
    return workers.Built({"gflops": 2 * size**3 / seconds / 1e9}, lambda steps: 0.0)
