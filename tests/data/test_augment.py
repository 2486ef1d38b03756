import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from flax_resnet.data import augment, normalization
from flax_resnet.data.augment import Augment
from flax_resnet.errors import UserError

KEY = jax.random.key(7)


@pytest.fixture
def images(rng):
    return rng.normal(size=(32, 8, 6, 3)).astype(np.float32)


def scipy_affine(image, angle, rows, columns):
    """What the Keras generator computes: rotation after shift, about the centre, edges repeated."""
    c, s = np.cos(angle), np.sin(angle)
    rotation = np.array([[c, -s], [s, c]])
    centre = (np.array(image.shape[:2]) - 1) / 2
    offset = centre - rotation @ centre + rotation @ np.array([rows, columns])
    planes = [
        ndimage.affine_transform(image[..., i], rotation, offset, order=1, mode="nearest")
        for i in range(image.shape[-1])
    ]
    return np.stack(planes, -1)


def test_rotate_and_shift_equals_scipy(rng, images):
    angle = rng.uniform(-0.5, 0.5, 32).astype(np.float32)
    rows, columns = rng.uniform(-3, 3, (2, 32)).astype(np.float32)
    got = augment.rotate_and_shift(images, angle, rows, columns)
    want = [scipy_affine(*args) for args in zip(images, angle, rows, columns, strict=True)]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_rotation_and_shift_ranges_are_the_fields(monkeypatch):
    seen = {}

    def record(images, angle, rows, columns):
        seen.update(angle=angle, rows=rows, columns=columns)
        return images

    monkeypatch.setattr(augment, "rotate_and_shift", record)
    batch = {"image": jnp.zeros((4000, 32, 16, 1)), "label": jnp.zeros(4000, int)}
    Augment(rotation=10.0, height_shift=5 / 32, width_shift=0.25)(KEY, batch)
    for name, limit in (("angle", np.deg2rad(10)), ("rows", 5.0), ("columns", 4.0)):
        assert np.abs(seen[name]).max() == pytest.approx(limit, rel=0.01)
        assert np.abs(seen[name]).max() <= limit
        assert np.mean(seen[name]) == pytest.approx(0, abs=0.05 * limit)
        assert np.std(seen[name]) == pytest.approx(limit / np.sqrt(3), rel=0.03)
    assert np.corrcoef(seen["rows"], seen["columns"])[0, 1] == pytest.approx(0, abs=0.05)


def test_flip_mirrors_about_half_and_only_left_to_right(images):
    many = np.tile(images, (40, 1, 1, 1))
    out = np.asarray(augment.random_flip(KEY, many))
    same = (out == many).all((1, 2, 3))
    mirrored = (out == many[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert mirrored.mean() == pytest.approx(0.5, abs=0.05)


def test_alternating_flips_show_each_image_both_ways_in_two_epochs(images):
    rows = np.random.default_rng(1).permutation(4000)
    many = np.broadcast_to(images[:1], (4000, 8, 6, 3))
    mirrored = {}
    for epoch in (0, 1, 2):
        batch = {"image": many, "label": rows, "row": rows, "epoch": np.full(4000, epoch)}
        out = Augment(alternating_flip=True)(KEY, batch, jax.random.key(3))["image"]
        mirrored[epoch] = (np.asarray(out) == many[:, :, ::-1]).all((1, 2, 3))
        assert ((np.asarray(out) == many).all((1, 2, 3)) ^ mirrored[epoch]).all()
    assert (mirrored[0] ^ mirrored[1]).all()
    np.testing.assert_array_equal(mirrored[0], mirrored[2])
    assert mirrored[0].mean() == pytest.approx(0.5, abs=4 * np.sqrt(0.25 / 4000))
    order = np.argsort(rows)  # a row's flip is its own, whatever the batch
    batch = {"image": many[:9], "label": rows[:9], "row": np.arange(9), "epoch": np.zeros(9, int)}
    out = Augment(alternating_flip=True)(jax.random.key(0), batch, jax.random.key(3))["image"]
    alone = (np.asarray(out) == many[:9, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal(alone, mirrored[0][order][:9])
    other = Augment(alternating_flip=True)(KEY, batch, jax.random.key(4))["image"]
    assert (np.asarray(other) != np.asarray(out)).any()


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crops_are_windows_of_the_padded_image_at_every_place(images, mode):
    many = np.tile(images[:1], (500, 1, 1, 1))
    out = np.asarray(augment.pad_and_crop(KEY, many, 2, mode))
    padded = np.pad(images[0], ((2, 2), (2, 2), (0, 0)), mode=mode)
    windows = np.array([padded[r : r + 8, c : c + 6] for r in range(5) for c in range(5)])
    matches = (out[:, None] == windows[None]).all((2, 3, 4))
    assert (matches.sum(1) == 1).all()
    assert matches.any(0).all()
    assert matches.mean(0) == pytest.approx(1 / 25, abs=0.03)


def test_mixup_and_cutmix_together_toss_a_coin():
    images = np.zeros((2, 8, 8, 1), np.float32) + np.arange(2)[:, None, None, None]
    batch = {"image": jnp.asarray(images), "label": jnp.arange(2)}
    both = jax.jit(Augment(mixup=1.0, cutmix=1.0))
    blended = [
        bool(np.mod(both(jax.random.key(seed), batch)["image"], 1).any()) for seed in range(200)
    ]
    assert np.mean(blended) == pytest.approx(0.5, abs=0.12)


def test_same_key_same_result_and_default_is_identity(images):
    batch = {"image": jnp.asarray(images), "label": jnp.arange(32)}
    full = Augment(rotation=5, width_shift=0.1, height_shift=0.1, flip=True, pad_crop=1, cutout=2)
    a, b = full(KEY, batch)["image"], full(KEY, batch)["image"]
    np.testing.assert_array_equal(a, b)
    assert np.max(np.abs(a - full(jax.random.key(8), batch)["image"])) > 0.1
    np.testing.assert_array_equal(Augment()(KEY, batch)["image"], images)


def test_the_mean_pixel_normalises_to_nothing():
    mean = np.array([0.5, 0.2, 0.7], np.float32)
    for stats in ({"mean": mean}, {"mean": mean, "order": np.array([2, 0, 1])}, {"mean": mean[0]}):
        stats = jax.tree.map(jnp.asarray, {**stats, "std": np.ones(3, np.float32)})
        pixel = normalization.mean_pixel(stats).astype(jnp.uint8)
        image = jnp.broadcast_to(pixel, (1, 1, 1, 3))
        np.testing.assert_allclose(normalization.normalize(image, stats), 0, atol=0.5 / 255 + 1e-6)


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (50, 4, 5, 3), dtype=np.uint8)


def test_channel_statistics(pixels):
    got = normalization.statistics("channel", (4, 5, 3), [pixels[:30], pixels[30:]])
    scaled = pixels / 255
    np.testing.assert_allclose(got["mean"], scaled.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(got["std"], scaled.std((0, 1, 2)), rtol=1e-6)


def test_pixel_statistics_are_one_mean_and_a_deviation_for_each_pixel(pixels):
    got = normalization.statistics("pixel", (4, 5, 3), [pixels])
    np.testing.assert_allclose(got["mean"], (pixels / 255).mean(), rtol=1e-6)
    np.testing.assert_allclose(got["std"], (pixels / 255).std(0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["channel", "pixel"])
def test_statistics_do_not_depend_on_the_batching(pixels, kind):
    a = normalization.statistics(kind, (4, 5, 3), [pixels])
    b = normalization.statistics(kind, (4, 5, 3), [pixels[i : i + 7] for i in range(0, 50, 7)])
    assert all((a[name] == b[name]).all() for name in a)


def test_constant_pixels_are_divided_by_one_grey_level():
    got = normalization.statistics("pixel", (2, 2, 1), [np.full((9, 2, 2, 1), 7, np.uint8)])
    np.testing.assert_allclose(got["std"], 1 / 255, rtol=1e-6)


@pytest.mark.parametrize("kind", ["channel", "pixel", "imagenet", "none"])
def test_statistics_shape_says_what_statistics_gives(pixels, kind):
    got = normalization.statistics(kind, (4, 5, 3), [pixels])
    want = normalization.statistics_shape(kind, (4, 5, 3))
    assert {k: (v.shape, v.dtype) for k, v in got.items()} == {
        k: (v.shape, v.dtype) for k, v in want.items()
    }


BATCH = {"image": np.zeros((4, 8, 6, 3), np.float32), "label": np.zeros(4, int)}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Augment(pad_crop=-4), r"augment\.pad_crop=-4: expected 0"),
        (lambda: Augment(randaugment_magnitude=11), r"randaugment_magnitude=11: expected 0 to 10"),
        (lambda: Augment(randaugment_probability=2), r"randaugment_probability=2: expected 0 to 1"),
        (lambda: Augment(flip=True, alternating_flip=True), "both mirror; leave one out"),
        (lambda: Augment(alternating_flip=True)(KEY, BATCH, KEY), 'needs "row" and "epoch"'),
        (
            lambda: normalization.statistics("imagenet", (4, 5, 1), []),
            "is for 3 channels, .* 1",
        ),
    ],
)
def test_bad_input_is_one_line(ask, message):
    with pytest.raises(UserError, match=message):
        ask()


def test_cutout_inside_is_a_whole_square_at_every_place():
    ones = np.ones((4000, 8, 6, 2), np.float32)
    holes = (np.asarray(augment.cutout(KEY, ones, 4, inside=True)) == 0).all(-1)
    assert (holes.sum((1, 2)) == 16).all()
    corners = {tuple(np.argwhere(hole)[0]) for hole in holes}
    assert corners == {(r, c) for r in range(5) for c in range(3)}


def test_cutout_zeroes_a_square_clipped_at_the_edge():
    ones = np.ones((4000, 8, 6, 2), np.float32)
    out = np.asarray(augment.cutout(KEY, ones, 4))
    holes = (out == 0).all(-1)
    assert (holes == (out == 0).any(-1)).all()
    height, width = holes.any(2).sum(1), holes.any(1).sum(1)
    assert (holes.sum((1, 2)) == height * width).all()
    assert set(height) == {2, 3, 4}
    assert set(width) == {2, 3, 4}
    first = holes.any(2).argmax(1)
    assert set(first) == {0, 1, 2, 3, 4, 5}


def test_mixup_blends_with_the_mirror_in_the_batch(images):
    label = jnp.arange(32)
    out = augment.mixup(KEY, {"image": jnp.asarray(images), "label": label}, 0.5)
    share = float(out["mix"][0])
    assert 0 < share < 1
    np.testing.assert_allclose(
        out["image"], share * images + (1 - share) * images[::-1], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(out["label_mixed"], label[::-1])
    np.testing.assert_array_equal(out["mix"], np.full(32, share, np.float32))


def test_mixup_shares_follow_the_beta_distribution(images):
    batch = {"image": jnp.asarray(images[:2]), "label": jnp.arange(2)}
    draw = jax.jit(jax.vmap(lambda key: augment.mixup(key, batch, 0.4)["mix"][0]))
    shares = draw(jax.random.split(KEY, 20000))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.03)


def test_cutmix_pastes_one_box_and_its_share_is_the_area():
    images = np.zeros((4, 8, 8, 1), np.float32) + np.arange(4)[:, None, None, None]
    batch = {"image": jnp.asarray(images), "label": jnp.arange(4)}
    sizes = set()
    for seed in range(30):
        out = augment.cutmix(jax.random.key(seed), batch, 1.0)
        pasted = np.asarray(out["image"] != images)[..., 0]
        assert (pasted == pasted[0]).all()
        np.testing.assert_array_equal(out["image"][pasted], images[::-1][pasted])
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted[0].sum() == rows * columns
        assert float(out["mix"][0]) == pytest.approx(1 - rows * columns / 64)
        sizes.add(int(rows))
    assert len(sizes) > 4
