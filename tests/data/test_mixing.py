import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.data import mixing

KEY = jax.random.key(7)


@pytest.fixture
def images(rng):
    return rng.normal(size=(32, 8, 6, 3)).astype(np.float32)


def test_cutout_inside_is_a_whole_square_at_every_place():
    ones = np.ones((4000, 8, 6, 2), np.float32)
    holes = (np.asarray(mixing.cutout(KEY, ones, 4, inside=True)) == 0).all(-1)
    assert (holes.sum((1, 2)) == 16).all()
    corners = {tuple(np.argwhere(hole)[0]) for hole in holes}
    assert corners == {(r, c) for r in range(5) for c in range(3)}


def test_cutout_zeroes_a_square_clipped_at_the_edge():
    ones = np.ones((4000, 8, 6, 2), np.float32)
    out = np.asarray(mixing.cutout(KEY, ones, 4))
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
    out = mixing.mixup(KEY, {"image": jnp.asarray(images), "label": label}, 0.5)
    share = float(out["mix"][0])
    assert 0 < share < 1
    np.testing.assert_allclose(
        out["image"], share * images + (1 - share) * images[::-1], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(out["label_mixed"], label[::-1])
    np.testing.assert_array_equal(out["mix"], np.full(32, share, np.float32))


def test_mixup_shares_follow_the_beta_distribution(images):
    batch = {"image": jnp.asarray(images[:2]), "label": jnp.arange(2)}
    draw = jax.jit(jax.vmap(lambda key: mixing.mixup(key, batch, 0.4)["mix"][0]))
    shares = draw(jax.random.split(KEY, 20000))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.03)


def test_cutmix_pastes_one_box_and_its_share_is_the_area():
    images = np.zeros((4, 8, 8, 1), np.float32) + np.arange(4)[:, None, None, None]
    batch = {"image": jnp.asarray(images), "label": jnp.arange(4)}
    sizes = set()
    for seed in range(30):
        out = mixing.cutmix(jax.random.key(seed), batch, 1.0)
        pasted = np.asarray(out["image"] != images)[..., 0]
        assert (pasted == pasted[0]).all()
        np.testing.assert_array_equal(out["image"][pasted], images[::-1][pasted])
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted[0].sum() == rows * columns
        assert float(out["mix"][0]) == pytest.approx(1 - rows * columns / 64)
        sizes.add(int(rows))
    assert len(sizes) > 4
