"""From a config to a run that is set up: everything checked and opened, and nothing written yet."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.errors import FlaxError
from jax.sharding import Mesh

from flax_resnet import distributed, guards, models, transfer
from flax_resnet.augment import Augment, normalize, statistics, statistics_shape
from flax_resnet.config import TrainConfig
from flax_resnet.data import Data
from flax_resnet.errors import UserError
from flax_resnet.layers import check_bn_group, needs_x64
from flax_resnet.models import ResNet, WeightsError, initializer
from flax_resnet.optim import LAMB, LARS, Muon
from flax_resnet.resume import restore
from flax_resnet.run import Run, held
from flax_resnet.step import TrainState, create_state
from flax_resnet.weights import Pretrained

# Training images that a network starts from, at most (``fitted``): as many as airbench takes.
MOST_FITTED = 5000


def set_up(config: TrainConfig, workdir: Path, mesh: Mesh) -> Run:
    """Checks and opens everything that a run needs, and writes nothing to the workdir.

    Raises:
      UserError: the first thing that is wrong.
    """
    check_batch(config, mesh)
    advice = (
        "the state, the data set and what is measured before the first step; set "
        "--data.resident-mb 0 (the data set streams), --sharding fsdp or a smaller "
        "--eval-batch-size"
    )
    with guards.memory_advice(advice):
        run = prepare(config, workdir, mesh)
        if not restore(run):
            measure_statistics(run)
            run.state = fitted(run, run.state)
        if config.cache_features:
            run.data = transfer.with_cached_features(
                run.state, config.model, run.data, config.eval_batch_size, _say
            )
            classify = functools.partial(config.model.apply, method="classify")
            run.whole, run.state = run.state, transfer.top_of(run.state).replace(apply_fn=classify)
    return run


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError where a batch does not divide over the devices, and into its parts."""
    distributed.check_divisible("batch_size", config.batch_size, mesh)
    if config.batch_size // mesh.size % config.accum_steps:
        raise UserError(
            f"batch_size={config.batch_size} over {mesh.size} devices does not divide into "
            f"accum_steps={config.accum_steps} equal parts: change one"
        )


def prepare(config: TrainConfig, workdir: Path, mesh: Mesh) -> Run:
    """The run at step 0, before anything is measured on the data or restored.

    Raises:
      UserError: the first thing that is wrong.
    """
    distributed.check_divisible("eval_batch_size", config.eval_batch_size, mesh)
    _check_model(config.model)
    if getattr(config.model, "norm_kind", None) == "batch" and not config.cache_features:
        check_bn_group(config.model.bn_group, config.batch_size, config.accum_steps)
    _check_transfer(config)
    by_layer = isinstance(config.optimizer, (LARS, LAMB, Muon))
    if by_layer and getattr(config.model, "scan_blocks", False):
        raise UserError(
            f"{type(config.optimizer).__name__} with model.scan_blocks: it treats each layer by "
            "itself, and scanned blocks share one array; use SGD, Adam or AdamW, or unrolled blocks"
        )
    with_rows = config.augment.alternating_flip
    data = Data(config.data, mesh, config.model.num_classes, with_rows=with_rows)
    steps_per_epoch = math.ceil(data.num_train / config.batch_size)
    num_steps = config.num_steps or max(1, round(config.num_epochs * steps_per_epoch))
    tx, schedule = config.optimizer.build(num_steps, steps_per_epoch)
    opened = None if config.weights is None else transfer.open_for(config.model, config.weights)
    start = _starter(config, tx, data.image_shape, opened)
    with contextlib.ExitStack() as stack:
        if config.sharding != "replicated":  # it may not fit one device whole
            with contextlib.suppress(RuntimeError):  # JAX was told to leave the CPU alone
                stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        fresh = start(config.seed)
    state = distributed.put(fresh, held(fresh, mesh, config.sharding))
    _check_shapes(config.model, state, data)
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
    if opened is None:
        fresh = initializer(model, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))

    def init(key: jax.Array, images: Any) -> Any:
        if opened is None:
            return fresh(key)
        variables, is_fresh = transfer.start_from(model, opened.variables, key, images)
        _say(f"starts from {config.weights}" + (", its head afresh" if is_fresh else ""))
        return variables

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


def _check_transfer(config: TrainConfig) -> None:
    """Raises UserError for ways of fine-tuning that contradict one another."""
    model, cached = config.model, config.cache_features
    name, is_resnet = type(model).__name__, isinstance(model, ResNet)
    stages, frozen = len(getattr(model, "stage_sizes", ())), getattr(model, "frozen_stages", None)
    norms = getattr(model, "norm_kind", "batch")
    images_change = config.augment != Augment() or config.data.random_resized_crop
    has_norms, is_frozen = is_resnet and norms != "none", is_resnet and frozen == stages
    unfreezes, processes = bool(config.optimizer.unfreeze), jax.process_count()
    contradictions = {
        f"cache_features with model.frozen_stages={frozen}: only a ResNet frozen up to its head "
        f"has features that stay; set --model.frozen-stages {stages}, or "
        "--no-cache-features": cached and not is_frozen,
        "cache_features with augmentation: features of images that change cannot be kept; switch "
        "the augmentation off, or --no-cache-features": cached and images_change,
        f"cache_features in {processes} processes: it is for one; --no-cache-features": cached
        and processes > 1,
        f"measure_norms with this {name}: it is for ResNets with BatchNorm; "
        "leave it out": config.measure_norms and not has_norms,
        f"optimizer.unfreeze with {name}: it is for ResNets; leave it out": unfreezes
        and not is_resnet,
        "optimizer.unfreeze with BatchNorm in training: the statistics of what is still frozen "
        "would move; set --model.norm-kind frozen": unfreezes and norms == "batch",
    }
    for line, is_so in contradictions.items():
        if is_so:
            raise UserError(line)


def _check_shapes(model: nn.Module, state: TrainState, data: Data) -> None:
    """Raises UserError unless the model gives one logit for each class, at both image sizes."""
    name = type(model).__name__
    if data.eval_shape != data.image_shape and state.normalization["std"].ndim > 1:
        raise UserError(
            f"data.eval_image_size: normalised by pixel, images of {data.image_shape} in training "
            f"cannot be {data.eval_shape} in evaluation; use --normalization channel"
        )
    for shape in dict.fromkeys((data.image_shape, data.eval_shape)):
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        try:
            out = jax.eval_shape(state.apply_fn, state.variables(), images)
        except (ValueError, TypeError, ZeroDivisionError, FlaxError) as error:
            raise UserError(
                f"data.eval_image_size: {name}, trained on images of {data.image_shape}, does not "
                f"take {shape}; leave it out, or take a network that pools globally"
            ) from error
        if getattr(out, "shape", None) != (2, model.num_classes):
            raise UserError(
                f"{name} gives {getattr(out, 'shape', type(out))} for two images, expected "
                f"(2, {model.num_classes}) logits: train it with include_top=True"
            )


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
            averaged = distributed.put(norms, run.held.ema["batch_stats"])
            ema = {**run.state.ema, "batch_stats": averaged}
            run.state = run.state.replace(ema=ema)


def fitted(run: Run, state: TrainState) -> TrainState:
    """A state at step 0 with what its network starts from training images, where it does.

    Such a network has ``from_images(params, images)``: it is given normalised images (N, H, W, C),
    evenly spread over the split, and gives the parameters. With ``weights`` it is not asked.

    Args:
      run: its normalisation has been measured.
      state: its own, or that of another seed.
    """
    from_images = getattr(run.config.model, "from_images", None)
    if from_images is None or run.config.weights is not None:
        return state
    began = time.perf_counter()
    stats = jax.device_get(run.state.normalization)
    images = [
        np.asarray(normalize(jnp.asarray(x), stats)) for x in run.data.train_images(MOST_FITTED)
    ]
    new = from_images(state.params, np.concatenate(images))

    def moved(place: jax.Array, old: Any, new: Any) -> jax.Array:
        # Two machines may not compute the same bits.
        return place if new is old else distributed.put(distributed.leads(new), place.sharding)

    changed = {"params": jax.tree.map(moved, state.params, state.params, new)}
    if state.ema is not None:
        averaged = jax.tree.map(moved, state.ema["params"], state.params, new)
        changed["ema"] = {**state.ema, "params": averaged}
    fitted_state = jax.block_until_ready(state.replace(**changed))
    run.start_seconds += time.perf_counter() - began
    return fitted_state


def opening_line(run: Run) -> str:
    """What a run is of: network, data, steps and devices."""
    data, devices = run.data, run.mesh.devices.flat
    parameters = sum(x.size for x in jax.tree.leaves((run.whole or run.state).params))
    members = math.prod(run.lead)
    together = f", {run.group} a dispatch" if run.group > 1 else ""
    return (
        (f"{members} x " if run.lead else "")
        + f"{models.network_name(run.config.model)}, {parameters // members:,} parameters; "
        f"{run.config.data.title}: {data.num_train:,} training and {data.num_eval:,} evaluation "
        "images of "
        f"{data.sizes}, {'resident' if data.resident else 'streamed'}; "
        f"{run.num_steps} steps, {run.steps_per_epoch} an epoch{together}, on {run.mesh.size} x "
        f"{devices[0].device_kind}" + (f"; resumes at step {run.step}" if run.step else "")
    )
