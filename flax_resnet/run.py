"""A run that is set up: everything checked and opened, and nothing written yet."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.errors import FlaxError
from jax.sharding import Mesh, NamedSharding

from flax_resnet import distributed, metrics, transfer
from flax_resnet.augment import Augment, statistics, statistics_shape
from flax_resnet.checkpoint import Checkpoints
from flax_resnet.config import TrainConfig
from flax_resnet.data import Data
from flax_resnet.errors import UserError
from flax_resnet.layers import needs_x64
from flax_resnet.models import WeightsError, initializer
from flax_resnet.optim import LAMB, LARS, learning_rate_at
from flax_resnet.pretrained import Pretrained
from flax_resnet.record import to_record
from flax_resnet.step import LOSSES, Batch, TrainState, create_state, eval_step, train_step


@dataclasses.dataclass
class Run:
    """A run that is set up, and how far it has come."""

    config: TrainConfig
    workdir: Path
    mesh: Mesh
    data: Data
    num_steps: int
    steps_per_epoch: int
    schedule: optax.Schedule
    state: TrainState
    start: Callable[[int], TrainState]
    whole: TrainState | None = None  # where ``state`` is only the top of a frozen network
    step: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)
    confusion: np.ndarray | None = None
    shared_by: int = 1  # networks that trained in the program whose ``seconds`` these are

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = self.state
        return (state if self.whole is None else transfer.with_trunk(state, self.whole)).arrays()

    def learning_rate(self) -> Any:
        """The rate of the last step: a float, or one a network of those that train together."""
        return float(learning_rate_at(self.schedule, self.state.opt_state, self.step - 1))

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes of the state and of a batch before their own."""
        return ()

    @property
    def held(self) -> NamedSharding:
        """How the state lies on the devices."""
        return distributed.replicated(self.mesh)

    def steps(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(train step, eval step), pure functions of a state and a batch."""
        config, loss = self.config, LOSSES[self.config.loss]
        rate = None
        if config.dropblock_rise and not config.cache_features:
            rise = max(1, round(config.dropblock_rise * self.num_steps))
            rate = optax.linear_schedule(0.0, config.model.dropblock_rate, rise)
        step = functools.partial(
            train_step,
            augment=config.augment,
            loss=loss,
            label_smoothing=config.label_smoothing,
            target_threshold=config.target_threshold,
            accum_steps=config.accum_steps,
            ema_decay=config.ema_decay,
            dropblock_rate=rate,
        )
        return step, functools.partial(eval_step, loss=loss)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says beside its arrays, as JSON values."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            **self.data.describe(),
            "config": to_record(self.config),
        }

    def compile(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(train step compiled for the mesh, its state donated; eval step, jitted)."""
        step, evaluate = self.steps()
        split = distributed.batch_sharding(self.mesh)
        images = (*self.lead, self.config.batch_size)
        kind = jnp.float32 if self.config.cache_features else jnp.uint8
        batch = {
            "image": jax.ShapeDtypeStruct((*images, *self.data.batch_shape), kind, sharding=split),
            "label": jax.ShapeDtypeStruct(images, jnp.int32, sharding=split),
        }
        began = time.perf_counter()
        jitted = jax.jit(step, donate_argnums=0, out_shardings=self.held)
        compiled = jitted.lower(self.state, batch).compile()
        self.compile_seconds = time.perf_counter() - began
        return compiled, jax.jit(evaluate, out_shardings=self.held)

    def batches(self) -> Iterator[Batch]:
        """The training batches that are left."""
        config = self.config
        return self.data.train_batches(config.seed, config.batch_size, self.step, self.num_steps)

    def evaluate(self, step: Callable[..., metrics.Sums]) -> None:
        """Evaluates the state on the whole evaluation split, every example once."""
        batches = self.data.eval_batches(self.config.eval_batch_size)
        self.evaluation, self.confusion = evaluate(step, self.state, batches)


def evaluate(
    step: Callable[..., metrics.Sums], state: TrainState, batches: Iterable[Batch]
) -> tuple[dict[str, float], np.ndarray]:
    """Runs an eval step over batches.

    Returns:
      (means of the metrics over all examples, int (K, K) confusion counts).
    """
    sums: list[metrics.Sums] = []
    confusion: Any = 0
    for batch in batches:
        one = step(state, batch)
        confusion = confusion + one.pop("confusion")
        jax.block_until_ready(sums[-1:])
        sums.append(one)
    return metrics.means(sums), np.asarray(confusion)


def set_up(config: TrainConfig, workdir: Path, mesh: Mesh) -> Run:
    """Checks and opens everything that a run needs, and writes nothing to the workdir.

    Raises:
      UserError: the first thing that is wrong.
    """
    distributed.check_divisible("batch_size", config.batch_size, mesh)
    if config.batch_size // mesh.size % config.accum_steps:
        raise UserError(
            f"batch_size={config.batch_size} over {mesh.size} devices does not divide into "
            f"accum_steps={config.accum_steps} equal parts: change one"
        )
    run = prepare(config, workdir, mesh)
    if not restore(run):
        measure_statistics(run)
    if config.cache_features:
        run.data = transfer.with_cached_features(
            run.state, config.model, run.data, config.eval_batch_size, _say
        )
        classify = functools.partial(config.model.apply, method="classify")
        run.whole, run.state = run.state, transfer.top_of(run.state).replace(apply_fn=classify)
    return run


def prepare(config: TrainConfig, workdir: Path, mesh: Mesh) -> Run:
    """The run at step 0, before anything is measured on the data or restored.

    Raises:
      UserError: the first thing that is wrong.
    """
    distributed.check_divisible("eval_batch_size", config.eval_batch_size, mesh)
    _check_model(config.model)
    transfer.check(
        config.model,
        cache_features=config.cache_features,
        images_change=config.augment != Augment() or config.data.random_resized_crop,
        measure_norms=config.measure_norms,
        unfreezes=bool(config.optimizer.unfreeze),
    )
    if isinstance(config.optimizer, (LARS, LAMB)) and getattr(config.model, "scan_blocks", False):
        raise UserError(
            f"{type(config.optimizer).__name__} with model.scan_blocks: its trust ratios are by "
            "layer, and scanned blocks share one array; use SGD, Adam or AdamW, or unrolled blocks"
        )
    data = Data(config.data, mesh, config.model.num_classes)
    steps_per_epoch = math.ceil(data.num_train / config.batch_size)
    num_steps = config.num_steps or max(1, round(config.num_epochs * steps_per_epoch))
    tx, schedule = config.optimizer.build(num_steps, steps_per_epoch)
    opened = None if config.weights is None else transfer.open_for(config.model, config.weights)
    start = _starter(config, tx, data.image_shape, opened)
    state = distributed.put_replicated(mesh, start(config.seed))
    _check_output(config.model, state, data.image_shape)
    if data.eval_shape != data.image_shape:
        _check_sizes(config.model, state, data)
    return Run(config, workdir, mesh, data, num_steps, steps_per_epoch, schedule, state, start)


def _say(line: str) -> None:
    if distributed.is_lead():
        print(line, flush=True)


def _starter(
    config: TrainConfig,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    opened: Pretrained | None,
) -> Callable[[int], TrainState]:
    """seed -> the state at step 0, but for statistics that are measured on the data."""
    model = config.model
    init = transfer.initializer(model, opened, config.weights, _say)
    if init is None:
        fresh = initializer(model, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
        init = lambda key, images: fresh(key)  # noqa: E731
    if config.normalization == "weights":
        stats = transfer.normalization_of(opened, config.weights, image_shape)
    else:
        shapes = statistics_shape(config.normalization, image_shape)
        stats = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    ema = config.ema_decay is not None

    def start(seed: int) -> TrainState:
        try:
            return create_state(model, tx, seed, image_shape, stats, ema=ema, init=init)
        except WeightsError:
            raise
        except (ValueError, TypeError, ZeroDivisionError) as error:
            name = type(model).__name__
            raise UserError(
                f"{name} with the fields given does not take images of {image_shape}: {error}"
            ) from error

    return start


def _check_model(model: nn.Module) -> None:
    """Raises UserError for fields that this loop cannot honour."""
    for name in ("dtype", "param_dtype"):
        if needs_x64(getattr(model, name, None)):
            raise UserError(
                f"model.{name}=float64 needs 64-bit JAX: set JAX_ENABLE_X64=1 in the environment"
            )
    if getattr(model, "axis_name", None) is not None:
        raise UserError(
            f"model.axis_name={model.axis_name}: it is for your own jax.pmap; leave it None here, "
            "where the statistics are those of the global batch already"
        )


def _check_output(model: nn.Module, state: TrainState, image_shape: tuple[int, ...]) -> None:
    """Raises UserError unless the model gives one logit for each class."""
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    out = jax.eval_shape(state.apply_fn, state.variables(), images)
    if getattr(out, "shape", None) != (2, model.num_classes):
        raise UserError(
            f"{type(model).__name__} gives {getattr(out, 'shape', type(out))} for two images, "
            f"expected (2, {model.num_classes}) logits: train it with include_top=True"
        )


def _check_sizes(model: nn.Module, state: TrainState, data: Data) -> None:
    """Raises UserError unless what is trained at one size can be evaluated at the other."""
    if state.normalization["std"].ndim > 1:
        raise UserError(
            f"data.eval_image_size: normalised by pixel, images of {data.image_shape} in training "
            f"cannot be {data.eval_shape} in evaluation; use --normalization channel"
        )
    images = jax.ShapeDtypeStruct((1, *data.eval_shape), jnp.float32)
    try:
        jax.eval_shape(state.apply_fn, state.variables(), images)
    except (ValueError, TypeError, ZeroDivisionError, FlaxError) as error:
        raise UserError(
            f"data.eval_image_size: {type(model).__name__}, trained on images of "
            f"{data.image_shape}, does not take {data.eval_shape}; leave it out, or take a network "
            "that pools globally"
        ) from error


def measure_statistics(run: Run) -> None:
    """Puts what is measured on the training split into the state."""
    config, data, like = run.config, run.data, run.state.normalization
    if config.normalization != "weights":
        stats = statistics(config.normalization, data.image_shape, data.train_images())
        stats = jax.tree.map(lambda new, old: np.asarray(new, old.dtype), stats, like)
        run.state = run.state.replace(normalization=distributed.put_replicated(run.mesh, stats))
    if config.measure_norms:
        norms = transfer.measure_norms(run.state, config.model, data, config.eval_batch_size)
        run.state = run.state.replace(batch_stats=distributed.put_replicated(run.mesh, norms))
        if run.state.ema is not None:
            ema = {**run.state.ema, "batch_stats": jax.tree.map(jnp.copy, run.state.batch_stats)}
            run.state = run.state.replace(ema=ema)


def restore(run: Run) -> bool:
    """Puts the workdir's newest checkpoint into the run; False where there is none."""
    directory = run.workdir / "checkpoints"
    if not directory.is_dir():
        return False
    reader = Checkpoints(directory)
    try:
        if reader.latest_step() is None:
            return False
        arrays, meta = reader.restore(run.state.arrays())
    finally:
        reader.close()
    for name, here in run.data.describe().items():
        if meta[name] != here:
            raise UserError(
                f"{run.workdir} was trained on data with {name} {meta[name]} and it is {here} now: "
                "give the same data, or another --workdir"
            )
    run.state = run.state.replace(**arrays)
    run.step, run.seconds = meta["step"], meta["seconds"]
    return True
