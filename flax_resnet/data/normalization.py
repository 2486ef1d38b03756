"""Normalisation of images: statistics of a training split, and their use inside the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnet.errors import UserError

NormalizationKind = Literal["channel", "pixel", "imagenet", "none", "weights"]
Statistics = dict[str, np.ndarray]

# The ImageNet training set's channel statistics on the 0..1 scale, as torchvision prints them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# A pixel that never changes (the rim of a digit) would otherwise divide by zero: one grey level.
LEAST_STD = 1 / 255


def statistics(
    kind: NormalizationKind, image_shape: tuple[int, int, int], batches: Iterable[np.ndarray]
) -> Statistics:
    """What to subtract and divide by, from the images of the training split.

    Args:
      kind: "channel" is mean and deviation of each channel; "pixel" is the one mean of the
        whole set and the deviation of each pixel over the images (the CIFAR-10 tutorial's);
        "imagenet" the published constants; "none" leaves the 0..1 scale.
      image_shape: (H, W, C).
      batches: uint8 arrays (N, H, W, C). Sums are in integers, so the result does not depend on
        how the images are batched.

    Returns:
      {"mean", "std"}: float32, (C,) or, for "pixel", a scalar mean and (H, W, C) std, on the
      0..1 scale.
    """
    statistics_shape(kind, image_shape)
    channels = image_shape[-1]
    if kind == "none":
        return _stats(np.zeros(channels), np.ones(channels))
    if kind == "imagenet":
        return _stats(np.array(IMAGENET_MEAN), np.array(IMAGENET_STD))
    total, squares = np.zeros((2, *image_shape), np.int64)
    count = 0
    for images in batches:
        total += images.sum(axis=0, dtype=np.int64)
        squares += np.square(images, dtype=np.int64).sum(axis=0)
        count += len(images)
    if kind == "channel":
        mean, mean_square = (s.mean(axis=(0, 1)) / count for s in (total, squares))
        return _stats(mean / 255, np.sqrt(mean_square - mean**2) / 255)
    mean, mean_square = total / count, squares / count
    return _stats(np.asarray(np.mean(mean)) / 255, np.sqrt(mean_square - mean**2) / 255)


def statistics_shape(
    kind: NormalizationKind, image_shape: tuple[int, int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes that ``statistics`` would return, without reading any image.

    Raises:
      UserError: the kind does not fit the images.
    """
    if kind == "imagenet" and image_shape[-1] != 3:
        raise UserError(
            f"normalization 'imagenet' is for 3 channels, the images have {image_shape[-1]}: use "
            "--normalization channel"
        )
    std = image_shape if kind == "pixel" else image_shape[-1:]
    mean = () if kind == "pixel" else std
    return {
        "mean": jax.ShapeDtypeStruct(mean, jnp.float32),
        "std": jax.ShapeDtypeStruct(std, jnp.float32),
    }


def _stats(mean: np.ndarray, std: np.ndarray) -> Statistics:
    return {
        "mean": np.asarray(mean, np.float32),
        "std": np.maximum(std, LEAST_STD).astype(np.float32),
    }


def normalize(images: jax.Array, stats: dict[str, jax.Array]) -> jax.Array:
    """uint8 (N, H, W, C) to the dtype of the statistics: ``(images / 255 - mean) / std``.

    Where the statistics have an "order", the channels are put in it first. What is not uint8 has
    been normalised: features that a frozen trunk has given already.
    """
    if not jnp.issubdtype(images.dtype, jnp.integer):
        return images
    if "order" in stats:
        images = images[..., stats["order"]]
    return (images.astype(stats["std"].dtype) / 255 - stats["mean"]) / stats["std"]


def mean_pixel(stats: dict[str, jax.Array]) -> jax.Array:
    """What ``normalize`` takes to about zero: a grey level, or one for each channel."""
    mean = jnp.round(255 * stats["mean"])
    return mean[jnp.argsort(stats["order"])] if "order" in stats and mean.ndim else mean
