"""Test-time augmentation: logits averaged over several views of each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from flax_resnet.errors import UserError

Views = Literal["none", "flip", "flip_shift"]
VIEWS_PER_IMAGE: Mapping[Views, int] = {"none": 1, "flip": 2, "flip_shift": 6}
"""Number of views averaged at test time, by kind."""


def check_views(kind: str) -> None:
    """Raises UserError unless there is such a kind."""
    if kind not in VIEWS_PER_IMAGE:
        raise UserError(f"tta={kind!r}: expected one of {', '.join(VIEWS_PER_IMAGE)}")


def views(images: jax.Array, kind: Views) -> tuple[jax.Array, jax.Array]:
    """The views of a batch and what each counts.

    Args:
      images: normalised, (N, H, W, C).
      kind: "none", the image; "flip", it and its mirror image; "flip_shift", these by a half, and
        both of the image shifted by one pixel up and left, and down and right, by a quarter each;
        what comes in is the image reflected (K. Jordan 2024, arXiv:2404.00498, section 3.5).

    Returns:
      ((N, V, H, W, C), float32 (V,) that sum to one), V is VIEWS_PER_IMAGE[kind].
    """
    check_views(kind)
    shifts, shares = [images], [1.0]
    if kind == "flip_shift":
        height, width = images.shape[1:3]
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        shifts += [padded[:, at : at + height, at : at + width] for at in (0, 2)]
        shares = [0.5, 0.25, 0.25]
    if kind != "none":
        shifts = [x for shift in shifts for x in (shift, shift[:, :, ::-1])]
        shares = [share / 2 for share in shares for _ in range(2)]
    # Beside one another, so that a batch split over devices stays where it is.
    return jnp.stack(shifts, axis=1), jnp.array(shares, jnp.float32)


def averaged_logits(
    apply: Callable[[jax.Array], jax.Array], images: jax.Array, kind: Views
) -> jax.Array:
    """Logits (N, K) of a batch: the weighted mean of its views', in at least float32.

    Args:
      apply: images (N, H, W, C) to logits (N, K).
      images: as for ``views``; with "none" anything that ``apply`` takes.
      kind: a kind of views.
    """
    if kind == "none":
        return apply(images)
    seen, shares = views(images, kind)
    logits = apply(seen.reshape(-1, *images.shape[1:])).reshape(*seen.shape[:2], -1)
    kept = jnp.promote_types(logits.dtype, jnp.float32)
    return jnp.sum(logits.astype(kept) * shares[:, None].astype(kept), axis=1)
