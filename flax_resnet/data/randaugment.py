"""RandAugment (Cubuk et al. 2020) of a batch on the device, each op within a grey level of Pillow.

Equalize, Invert, Posterize, Solarize and SolarizeAdd are exactly Pillow's. The others are one off
in under one percent of the values: AutoContrast, where Pillow rounds a float64 down, and the ops
that blend or move, which are computed in float32.

The fifteen ops and their strengths are those of timm's "rand-m7-mstd0.5-inc1", the form that
"ResNet strikes back" (Wightman et al. 2021) trains with: strength rises with the magnitude.
A switch under vmap computes all its branches for every image, so the ops are merged into three
kinds, each computed once: an affine map with bilinear samples (five ops), a blend with a degraded
image (four), a table of 256 values for each channel (six).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from flax_resnet.errors import UserError

OPS = (
    "AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd",
    "Color", "Contrast", "Brightness", "Sharpness",
    "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
BY_TABLE, BY_BLEND = 6, 4
# The magnitude at which an op is as strong as it gets.
MOST = 10.0
# Pillow's weights of red, green and blue in grey, in 65536ths.
GREY = (19595, 38470, 7471)


def apply_randaugment(
    key: jax.Array,
    images: jax.Array,
    *,
    ops: int,
    magnitude: float,
    std: float = 0.0,
    probability: float = 1.0,
    fill: jax.Array | float = 128,
) -> jax.Array:
    """Applies ops drawn for each image, one after the other.

    Args:
      key: a jax.random key; the same key gives the same result.
      images: uint8 (N, H, W, C) with C 1 or 3.
      ops: how many for an image, drawn evenly from OPS, with replacement.
      magnitude: their strength, 0 to 10.
      std: deviation of a normal draw around it for each op and image, cut off at 0 and 10.
      probability: of an op being applied when it has been drawn (the paper: 1, timm: 0.5).
      fill: grey level, or (C,), of what a rotation, shear or shift brings in.

    Returns:
      uint8 (N, H, W, C).

    Raises:
      UserError: images of another number of channels.
    """
    if images.shape[-1] not in (1, 3):
        raise UserError(
            f"RandAugment of images of {images.shape[-1]} channels: it is for 1 and 3, set "
            "--data.channels 3 or --augment.randaugment-ops 0"
        )

    def apply(images: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        drawn, op, level, sign = draw(key, len(images), magnitude, std, probability)
        changed = apply_ops(images, op, level, sign, fill)
        return jnp.where(drawn[:, None, None, None], changed, images), None

    return jax.lax.scan(apply, images, jax.random.split(key, ops))[0]


def draw(
    key: jax.Array, n: int, magnitude: float, std: float, probability: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """For n images: (whether to apply bool, op int, magnitude float, sign), each (n,)."""
    op_key, level_key, sign_key, coin_key = jax.random.split(key, 4)
    return (
        jax.random.bernoulli(coin_key, probability, (n,)),
        jax.random.randint(op_key, (n,), 0, len(OPS)),
        jnp.clip(magnitude + std * jax.random.normal(level_key, (n,)), 0, MOST),
        jax.random.rademacher(sign_key, (n,), jnp.float32),
    )


def apply_ops(
    images: jax.Array,
    op: jax.Array,
    level: jax.Array,
    sign: jax.Array,
    fill: jax.Array | float = 128,
) -> jax.Array:
    """One op on each image.

    At magnitude m, with s the sign: Rotate by 30 sm/10 degrees, counter-clockwise; ShearX and
    ShearY by 0.3 sm/10; TranslateX and TranslateY by 0.45 sm/10 of the size; Color, Contrast,
    Brightness and Sharpness blend by 1 + 0.9 sm/10, not below 0.1; Posterize keeps
    4 - floor(4 m/10) bits; Solarize inverts from 256 - floor(256 m/10) on; SolarizeAdd adds
    floor(110 m/10) below 128. The other ops have no strength.

    Args:
      images: uint8 (N, H, W, C).
      op: int (N,), places in OPS.
      level: magnitudes, (N,), 0 to 10.
      sign: (N,), 1 or -1.
      fill: grey level, or (C,), outside the image.
    """
    share = level / MOST
    table = jax.vmap(_tabled)(images, op, share)
    blend = jax.vmap(_blended)(images, op - BY_TABLE, jnp.maximum(1 + 0.9 * sign * share, 0.1))
    fill = jnp.broadcast_to(jnp.asarray(fill, jnp.float32), images.shape[-1:])
    moved = jax.vmap(_moved, (0, 0, 0, None))(images, op - BY_TABLE - BY_BLEND, sign * share, fill)
    op = op[:, None, None, None]
    return jnp.where(op < BY_TABLE, table, jnp.where(op < BY_TABLE + BY_BLEND, blend, moved))


def _tabled(image: jax.Array, op: jax.Array, share: jax.Array) -> jax.Array:
    """Looks each value of (H, W, C) up in its channel's table."""
    grey = jnp.arange(256)
    planes = image.reshape(-1, image.shape[-1]).T
    counts = jax.vmap(functools.partial(jnp.bincount, length=256))(planes)
    kept = 4 - jnp.floor(4 * share).astype(int)  # of eight bits
    solarized = jnp.where(grey < 256 - jnp.floor(256 * share), grey, 255 - grey)
    added = jnp.minimum(grey + jnp.floor(110 * share).astype(int), 255)
    same = jnp.stack([255 - grey, grey >> (8 - kept) << (8 - kept), solarized,
                      jnp.where(grey < 128, added, grey)])  # fmt: skip
    own = jnp.stack([jax.vmap(_stretched)(planes), jax.vmap(_equalized)(counts)])
    tables = jnp.where(op < 2, own[jnp.minimum(op, 1)], same[jnp.clip(op - 2, 0, 3)])
    return jax.vmap(lambda table, plane: table[plane], (0, -1), -1)(tables.astype(jnp.uint8), image)


def _stretched(plane: jax.Array) -> jax.Array:
    """The table that takes a channel's least value to 0 and its largest to 255."""
    low, high = plane.min().astype(int), plane.max().astype(int)
    grey = jnp.arange(256)
    wide = jnp.clip((grey - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, wide, grey)


def _equalized(counts: jax.Array) -> jax.Array:
    """The table that spreads a channel's values evenly, from how often each occurs."""
    grey = jnp.arange(256)
    last = counts[jnp.max(jnp.where(counts > 0, grey, 0))]
    step = (counts.sum() - last) // 255
    below = jnp.cumsum(counts) - counts
    spread = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, spread, grey)


def _blended(image: jax.Array, which: jax.Array, factor: jax.Array) -> jax.Array:
    """Image (H, W, C) blended with what lacks colour, contrast, light or sharpness."""
    pixels = image.astype(jnp.int32)
    grey = pixels
    if image.shape[-1] == 3:
        grey = ((pixels * jnp.array(GREY)).sum(-1, keepdims=True) + 2**15) >> 16
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    height, width, _ = image.shape
    around = sum(pixels[r : height - 2 + r, c : width - 2 + c] for r in range(3) for c in range(3))
    # Pillow's SMOOTH: the centre counts five times, the rim stays.
    inside = (around + 4 * pixels[1:-1, 1:-1] + 6) // 13
    smooth = pixels.at[1:-1, 1:-1].set(inside)
    # Chosen by where, which is fused: a stack would hold all four.
    degraded = jnp.where(which == 0, grey, jnp.where(which == 1, mean, 0))
    degraded = jnp.where(which == BY_BLEND - 1, smooth, degraded)
    blend = degraded + factor * (pixels - degraded)
    return jnp.clip(blend, 0, 255).astype(jnp.uint8)


def _moved(image: jax.Array, which: jax.Array, amount: jax.Array, fill: jax.Array) -> jax.Array:
    """Image (H, W, C) turned, sheared or shifted; ``amount`` is -1 to 1."""
    height, width, _ = image.shape
    angle = jnp.deg2rad(30.0) * jnp.where(which == 0, amount, 0.0)
    shear_x, shear_y = (jnp.where(which == k, 0.3 * amount, 0.0) for k in (1, 2))
    shift_x = jnp.where(which == 3, 0.45 * width * amount, 0.0)
    shift_y = jnp.where(which == 4, 0.45 * height * amount, 0.0)
    # Pillow's coordinates: a pixel's centre is at a half. Shears are about the corner, rotations
    # about the centre.
    y, x = jnp.mgrid[:height, :width]
    y, x = y + 0.5, x + 0.5
    right, down = x - width / 2, y - height / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    at_x = cos * right - sin * down + width / 2 + shear_x * y + shift_x
    at_y = cos * down + sin * right + height / 2 + shear_y * x + shift_y
    inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
    left, top = jnp.floor(at_x - 0.5), jnp.floor(at_y - 0.5)
    across, along = (at_x - 0.5 - left)[..., None], (at_y - 0.5 - top)[..., None]

    def sample(row: jax.Array, column: jax.Array) -> jax.Array:
        rows = jnp.clip(row, 0, height - 1).astype(int)
        columns = jnp.clip(column, 0, width - 1).astype(int)
        return image[rows, columns].astype(jnp.float32)

    upper = sample(top, left) * (1 - across) + sample(top, left + 1) * across
    lower = sample(top + 1, left) * (1 - across) + sample(top + 1, left + 1) * across
    value = upper * (1 - along) + lower * along
    return jnp.where(inside[..., None], value, fill).astype(jnp.uint8)
