"""Boxes cut out of images, and images mixed with one another: pure, keyed, inside the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]


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
