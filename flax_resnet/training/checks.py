"""Whether a config fits: its devices, its network, its data, and its fields with one another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import FlaxError
from jax.sharding import Mesh

from flax_resnet.data.augment import Augment
from flax_resnet.data.batches import Data
from flax_resnet.distributed.sharding import check_divisible
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet
from flax_resnet.models.arguments import check_bn_group, needs_x64
from flax_resnet.optim.optimizers import LAMB, LARS, Muon
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.step import TrainState
from flax_resnet.xla import backend


def check_config(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError for the first thing in a config that needs no data to be seen as wrong."""
    backend.check_settings()
    check_divisible("eval_batch_size", config.eval_batch_size, mesh)
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


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Raises UserError where a batch does not divide over the devices, and into its parts."""
    check_divisible("batch_size", config.batch_size, mesh)
    if config.batch_size // mesh.size % config.accum_steps:
        raise UserError(
            f"batch_size={config.batch_size} over {mesh.size} devices does not divide into "
            f"accum_steps={config.accum_steps} equal parts: change one"
        )


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
    unfreezes = bool(config.optimizer.unfreeze)
    lines = {
        f"cache_features with model.frozen_stages={frozen}: only a ResNet frozen up to its head "
        f"has features that stay; set --model.frozen-stages {stages}, or "
        "--no-cache-features": cached and not (is_resnet and frozen == stages),
        "cache_features with augmentation: features of images that change cannot be kept; switch "
        "the augmentation off, or --no-cache-features": cached
        and (config.augment != Augment() or config.data.random_resized_crop),
        "cache_features in several processes: it is for one; --no-cache-features": cached
        and jax.process_count() > 1,
        f"measure_norms with this {name}: it is for ResNets with BatchNorm; "
        "leave it out": config.measure_norms and not (is_resnet and norms != "none"),
        f"optimizer.unfreeze with {name}: it is for ResNets; leave it out": unfreezes
        and not is_resnet,
        "optimizer.unfreeze with BatchNorm in training: the statistics of what is still frozen "
        "would move; set --model.norm-kind frozen": unfreezes and norms == "batch",
    }
    if line := next((line for line, is_so in lines.items() if is_so), None):
        raise UserError(line)


def check_shapes(model: nn.Module, state: TrainState, data: Data) -> None:
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
