"""Each op against Pillow, on random images, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from flax_resnet.data import randaugment
from flax_resnet.data.randaugment import OPS
from flax_resnet.errors import UserError

KEY = jax.random.key(3)
apply_ops = jax.jit(randaugment.apply_ops)
draw = jax.jit(randaugment.draw, static_argnums=1)
FILL = (124, 116, 104)
EXACT = ("Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")


def add_below_128(image, add):
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def posterize(image, bits):
    # Older Pillows, as timm had them, took no bits at all for black.
    return ImageOps.posterize(image, bits) if bits else image.point(lambda _: 0)


def affine(image, *coefficients):
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=FILL
    )


def pillow(image, name, level, sign):
    """The op as timm has Pillow do it."""
    share = level / 10
    signed = sign * share
    width, height = image.size
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(max(0.1, 1 + 0.9 * signed))
    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Posterize": lambda: posterize(image, 4 - int(share * 4)),
        "Solarize": lambda: ImageOps.solarize(image, 256 - int(share * 256)),
        "SolarizeAdd": lambda: add_below_128(image, int(share * 110)),
        "Rotate": lambda: image.rotate(30 * signed, Image.Resampling.BILINEAR, fillcolor=FILL),
        "ShearX": lambda: affine(image, 1, 0.3 * signed, 0, 0, 1, 0),
        "ShearY": lambda: affine(image, 1, 0, 0, 0.3 * signed, 1, 0),
        "TranslateX": lambda: affine(image, 1, 0, 0.45 * signed * width, 0, 1, 0),
        "TranslateY": lambda: affine(image, 1, 0, 0, 0, 1, 0.45 * signed * height),
    }[name]()


@pytest.fixture(scope="module")
def pairs():
    """(inputs, ours, Pillow's) of every op at eight strengths, all in one call."""
    rng = np.random.default_rng(5)
    op = np.repeat(np.arange(len(OPS)), 8)
    n = len(op)
    # Photograph-like: smooth, and not over the whole range.
    coarse = rng.uniform(20, 235, (n, 5, 4, 3)).astype(np.uint8)
    images = np.stack(
        [np.asarray(Image.fromarray(c).resize((26, 33), Image.Resampling.BICUBIC)) for c in coarse]
    )
    level = np.tile([0.0, 10.0, 2.3, 4.9, 6.1, 7.0, 8.8, 9.9], len(OPS)).astype(np.float32)
    sign = np.tile([1, 1, -1, 1, -1, 1, -1, 1], len(OPS)).astype(np.float32)
    ours = apply_ops(images, op, level, sign, jnp.array(FILL))
    theirs = [
        np.asarray(pillow(Image.fromarray(i), OPS[o], float(x), int(s)))
        for i, o, x, s in zip(images, op, level, sign, strict=True)
    ]
    return images, np.asarray(ours), np.stack(theirs), op


@pytest.mark.parametrize("name", OPS)
def test_each_op_is_pillows_within_a_grey_level(pairs, name):
    images, ours, theirs, op = pairs
    mine = op == OPS.index(name)
    apart = np.abs(ours[mine].astype(int) - theirs[mine].astype(int))
    assert (apart > 0).mean() <= (0 if name in EXACT else 0.01)
    assert apart.max() <= 1
    assert (ours[mine][1] != images[mine][1]).any()  # at full strength it does something


def test_one_channel_is_three_equal_ones(pairs):
    images, _, _, op = pairs
    grey, n = images[..., :1], len(op)
    level, sign = np.full(n, 7, np.float32), np.ones(n, np.float32)
    alone = apply_ops(grey, op, level, sign, jnp.full(1, 99))
    three = apply_ops(np.repeat(grey, 3, -1), op, level, sign, jnp.full(3, 99))
    assert np.abs(np.asarray(alone, int) - np.asarray(three, int)).max() <= 1
    assert (np.asarray(alone) != three).mean() < 1e-4


def test_draws_are_even_and_of_the_strength_asked_for():
    applied, op, level, sign = draw(KEY, 30_000, 7.0, 0.5, 0.25)
    assert np.bincount(op) / 30_000 == pytest.approx(1 / 15, abs=0.006)
    assert (np.mean(level), np.std(level)) == pytest.approx((7, 0.5), abs=0.02)
    assert (np.mean(applied), np.mean(sign)) == pytest.approx((0.25, 0), abs=0.02)
    assert set(np.unique(sign)) == {-1, 1}
    level = draw(KEY, 30_000, 9.9, 3.0, 1.0)[2]
    assert 9.9 < np.max(level) <= 10


def test_images_differ_and_a_key_repeats():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3), dtype=np.uint8)
    images = np.repeat(pixels, 40, 0)
    apply = jax.jit(
        lambda key, p: randaugment.apply_randaugment(
            key, images, ops=2, magnitude=9.0, probability=p
        )
    )
    once = np.asarray(apply(KEY, 1.0))
    np.testing.assert_array_equal(once, apply(KEY, 1.0))
    assert len(np.unique(once.reshape(40, -1), axis=0)) > 30
    assert once.dtype == np.uint8
    assert (once != apply(jax.random.key(4), 1.0)).any()
    np.testing.assert_array_equal(apply(KEY, 0.0), images)


def test_four_channels_are_refused():
    with pytest.raises(
        UserError, match=r"of 4 channels: it is for 1 and 3, set --data\.channels 3"
    ):
        randaugment.apply_randaugment(KEY, np.zeros((1, 9, 9, 4), np.uint8), ops=1, magnitude=1.0)
