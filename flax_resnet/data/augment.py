"""Augmentation of a batch of images, pure and keyed, for use inside the step.

Order: RandAugment, uint8 to float, normalise, move (rotation and shifts, flip, pad and crop), cut
(cutout), mix (mixup, cutmix). Moving happens after normalisation, as in the tutorials and
in He et al.: what a crop pads with is then zero, the mean.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from flax_resnet.data.normalization import mean_pixel
from flax_resnet.data.randaugment import MOST, apply_randaugment
from flax_resnet.errors import UserError, check_range, check_types

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes to a training batch; the default changes nothing."""

    randaugment_ops: int = 0
    """RandAugment (Cubuk et al. 2020): so many ops drawn for each image, before it is normalised,
    borders filled with the mean; 0 is off."""
    randaugment_magnitude: float = 7.0
    """Their strength, 0 to 10."""
    randaugment_std: float = 0.5
    """Deviation of a normal draw around it for each op and image (timm's mstd)."""
    randaugment_probability: float = 0.5
    """Of an op being applied when it has been drawn (timm's; the paper applies all: 1)."""
    rotation: float = 0.0
    """Rotate by an angle drawn evenly from +- this many degrees, nearest fill."""
    width_shift: float = 0.0
    """Shift sideways by up to +- this share of the width, in fractions of a pixel, nearest fill."""
    height_shift: float = 0.0
    """Shift up or down by up to +- this share of the height, nearest fill."""
    flip: bool = False
    """Mirror left to right with probability one half."""
    alternating_flip: bool = False
    """Instead: mirror half of the images in their first epoch, the others in the second, and so on
    in turn (K. Jordan 2024, section 3.6)."""
    pad_crop: int = 0
    """Pad by this many pixels on each side and crop back at a random place."""
    pad_mode: Literal["constant", "reflect"] = "constant"
    """What to pad with: zero (the mean, after normalisation) or the mirrored image."""
    cutout: int = 0
    """Set a square of this side to zero, centred anywhere (DeVries and Taylor 2017)."""
    cutout_inside: bool = False
    """Keep that square wholly within the image."""
    mixup: float = 0.0
    """Beta parameter of mixup (Zhang et al. 2018); 0 is off."""
    cutmix: float = 0.0
    """Beta parameter of CutMix (Yun et al. 2019); 0 is off. With mixup, a coin a batch decides."""

    def __post_init__(self) -> None:
        check_types(self, "augment.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)):
                check_range(f"augment.{field.name}", value, 0)
        for name, most in {"randaugment_magnitude": MOST, "randaugment_probability": 1}.items():
            if getattr(self, name) > most:
                raise UserError(f"augment.{name}={getattr(self, name)}: expected 0 to {most:g}")
        if self.flip and self.alternating_flip:
            raise UserError(
                "augment.flip with augment.alternating_flip: both mirror; leave one out"
            )

    def pixels(self, key: jax.Array, images: jax.Array, stats: dict[str, jax.Array]) -> jax.Array:
        """Applies RandAugment to uint8 images (N, H, W, C); borders are the mean of ``stats``."""
        if not self.randaugment_ops:
            return images
        return apply_randaugment(
            jax.random.fold_in(key, 2**16),  # __call__ splits it, which folds in 0, 1, ...
            images,
            ops=self.randaugment_ops,
            magnitude=self.randaugment_magnitude,
            std=self.randaugment_std,
            probability=self.randaugment_probability,
            fill=mean_pixel(stats),
        )

    def __call__(self, key: jax.Array, batch: Batch, run_key: jax.Array | None = None) -> Batch:
        """Augments a normalised batch.

        Args:
          key: a jax.random key; the same key gives the same result.
          batch: "image" float (N, H, W, C), normalised; "label" int (N,). For
            alternating_flip also "row" and "epoch", int (N,), as ``Data.train_batches`` gives.
          run_key: the same in all steps of a run, for alternating_flip.

        Returns:
          The batch with "image" changed. With mixup or cutmix also "label_mixed" int (N,)
          and "mix" float (N,), the share of "label" in the target.
        """
        images = batch["image"]
        move_key, flip_key, crop_key, cut_key, mix_key = jax.random.split(key, 5)
        if self.rotation or self.width_shift or self.height_shift:
            n, height, width, _ = images.shape
            draws = jax.random.uniform(move_key, (3, n), minval=-1.0, maxval=1.0)
            angle = jnp.deg2rad(self.rotation) * draws[0]
            rows, columns = (
                self.height_shift * height * draws[1],
                self.width_shift * width * draws[2],
            )
            images = rotate_and_shift(images, angle, rows, columns)
        if self.flip:
            images = random_flip(flip_key, images)
        if self.alternating_flip:
            if run_key is None or not {"row", "epoch"} <= batch.keys():
                raise UserError(
                    'augment.alternating_flip needs "row" and "epoch" in the batch, and run_key: '
                    "open Data(..., with_rows=True), or take augment.flip"
                )
            images = alternating_flip(run_key, images, batch["row"], batch["epoch"])
        if self.pad_crop:
            images = pad_and_crop(crop_key, images, self.pad_crop, self.pad_mode)
        if self.cutout:
            images = cutout(cut_key, images, self.cutout, self.cutout_inside)
        batch = {**batch, "image": images}
        if self.mixup and self.cutmix:
            coin_key, mix_key = jax.random.split(mix_key)
            return jax.lax.cond(
                jax.random.bernoulli(coin_key),
                lambda: mixup(mix_key, batch, self.mixup),
                lambda: cutmix(mix_key, batch, self.cutmix),
            )
        if self.mixup:
            return mixup(mix_key, batch, self.mixup)
        return cutmix(mix_key, batch, self.cutmix) if self.cutmix else batch


def rotate_and_shift(
    images: jax.Array, angle: jax.Array, rows: jax.Array, columns: jax.Array
) -> jax.Array:
    """Rotates and shifts each image, as Keras's image generator does but for its swapped axes.

    The output pixel at offset p from the centre is the bilinear sample of the input at
    R(angle) (p + (rows, columns)), or the nearest edge pixel where that is outside.

    Args:
      images: (N, H, W, C).
      angle: radians, (N,).
      rows: vertical shift in pixels, (N,).
      columns: horizontal shift in pixels, (N,).
    """
    _, height, width, _ = images.shape
    centre_row, centre_column = (height - 1) / 2, (width - 1) / 2

    def one(image: jax.Array, a: jax.Array, dr: jax.Array, dc: jax.Array) -> jax.Array:
        r, c = jnp.mgrid[:height, :width]
        r, c = r - centre_row + dr, c - centre_column + dc
        source = (
            jnp.cos(a) * r - jnp.sin(a) * c + centre_row,
            jnp.sin(a) * r + jnp.cos(a) * c + centre_column,
        )
        sample = jax.vmap(
            lambda plane: map_coordinates(plane, source, order=1, mode="nearest"), -1, -1
        )
        return sample(image).astype(image.dtype)

    return jax.vmap(one)(images, angle, rows, columns)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of (N, H, W, C) left to right with probability one half."""
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def alternating_flip(
    key: jax.Array, images: jax.Array, rows: jax.Array, epochs: jax.Array
) -> jax.Array:
    """Mirrors each image of (N, H, W, C) in every other epoch (K. Jordan 2024, section 3.6).

    Args:
      key: the same in all steps of a run; with its row it decides whether an image begins mirrored.
      images: (N, H, W, C).
      rows: numbers of the images in the split, int (N,).
      epochs: the epoch of each image, int (N,).
    """
    key = jax.random.fold_in(key, 2**32 - 1)  # steps fold in theirs, from 0
    first = jax.vmap(lambda row: jax.random.bernoulli(jax.random.fold_in(key, row)))(rows)
    mirrored = first ^ (epochs % 2 == 1)
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def pad_and_crop(
    key: jax.Array, images: jax.Array, pad: int, mode: Literal["constant", "reflect"] = "constant"
) -> jax.Array:
    """Pads each image by ``pad`` on every side and crops (H, W) at a place drawn evenly."""
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)
    corners = jax.random.randint(key, (n, 2), 0, 2 * pad + 1)
    return jax.vmap(
        lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), (height, width, channels))
    )(padded, corners)


def _box(
    centre_row: jax.Array, centre_column: jax.Array, box: tuple, shape: tuple[int, ...]
) -> jax.Array:
    """Bool (N, H, W, 1), True within a box (rows, columns) around each centre, clipped."""
    _, height, width, _ = shape
    rows, columns = box

    def within(n: int, centre: jax.Array, size: jax.Array | int) -> jax.Array:
        first = centre - size // 2
        at = jnp.arange(n)[None, :]
        return (at >= first[:, None]) & (at < (first + size)[:, None])

    return (
        within(height, centre_row, rows)[:, :, None, None]
        & within(width, centre_column, columns)[:, None, :, None]
    )


def cutout(key: jax.Array, images: jax.Array, size: int, inside: bool = False) -> jax.Array:
    """Sets a ``size`` x ``size`` square of each image to zero; its centre is any pixel.

    Args:
      key: random key.
      images: (N, H, W, C).
      size: side in pixels.
      inside: the square is any that lies wholly within the image.
    """
    n, height, width, _ = images.shape
    first, rows, columns = 0, height, width
    if inside:
        first, rows, columns = size // 2, max(height - size, 0) + 1, max(width - size, 0) + 1
    row_key, column_key = jax.random.split(key)
    hole = _box(
        first + jax.random.randint(row_key, (n,), 0, rows),
        first + jax.random.randint(column_key, (n,), 0, columns),
        (size, size),
        images.shape,
    )
    return jnp.where(hole, jnp.zeros((), images.dtype), images)


def mixup(key: jax.Array, batch: Batch, alpha: float) -> Batch:
    """Blends each image with its mirror in the batch, by one Beta(alpha, alpha) draw a batch."""
    images = batch["image"]
    share = jax.random.beta(key, alpha, alpha).astype(images.dtype)
    mixed = share * images + (1 - share) * images[::-1]
    return _mixed(batch, mixed, share)


def cutmix(key: jax.Array, batch: Batch, alpha: float) -> Batch:
    """Pastes a box of each image's mirror in the batch into it; the target is by area."""
    images = batch["image"]
    n, height, width, _ = images.shape
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))
    box = (jnp.round(side * height).astype(int), jnp.round(side * width).astype(int))
    row = jnp.broadcast_to(jax.random.randint(row_key, (), 0, height), (n,))
    column = jnp.broadcast_to(jax.random.randint(column_key, (), 0, width), (n,))
    pasted = _box(row, column, box, images.shape)
    share = 1 - jnp.mean(pasted[0].astype(jnp.float32))
    return _mixed(batch, jnp.where(pasted, images[::-1], images), share.astype(images.dtype))


def _mixed(batch: Batch, images: jax.Array, share: jax.Array) -> Batch:
    label = batch["label"]
    return {
        **batch,
        "image": images,
        "label_mixed": label[::-1],
        "mix": jnp.broadcast_to(share.astype(jnp.float32), label.shape),
    }
