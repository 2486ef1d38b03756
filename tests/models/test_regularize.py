import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.models.regularize import DropBlock, block_chance, drop_block, drop_path

KEY = jax.random.key(0)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(("size", "block_size"), [(8, 3), (16, 5), (32, 5), (5, 5), (9, 7)])
def test_drop_block_zeroes_the_share_it_is_asked_for(size, block_size, rate):
    x = jnp.ones((250, size, size, 64 if size < 16 else 16))
    dropped = np.asarray(drop_block(KEY, x, rate, block_size)) == 0
    # Blocks make neighbours fall together: the spread is that of the number of blocks.
    spread = np.std(dropped.mean((1, 2))) / np.sqrt(x.shape[0] * x.shape[-1])
    assert np.mean(dropped) == pytest.approx(rate, abs=4 * spread)
    assert 4 * spread < 0.02


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.2, 0.7, 0.99])
def test_expected_keep_ratio_is_right_within_a_percent(rate):
    """By enumeration of what each pixel's blocks are, and not by sampling."""
    for size, block in ((32, 5), (16, 5), (8, 5), (14, 7), (7, 7), (4, 4)):
        chance = float(block_chance(rate, (size, size + 1), (block, block)))
        covers = np.zeros((size, size + 1))
        for i in range(size - block + 1):
            for j in range(size + 1 - block + 1):
                covers[i : i + block, j : j + block] += 1
        keep = np.mean((1 - chance) ** covers)
        assert keep == pytest.approx(1 - rate, rel=0.01)
        assert 1 - keep == pytest.approx(rate, rel=0.01)


def test_dropped_pixels_are_whole_blocks():
    out = np.asarray(drop_block(KEY, jnp.ones((64, 9, 9, 1)), 0.1, 3))[..., 0]
    for image in out == 0:
        whole = np.zeros_like(image)
        for i in range(7):
            for j in range(7):
                if image[i : i + 3, j : j + 3].all():
                    whole[i : i + 3, j : j + 3] = True
        np.testing.assert_array_equal(image, whole)
    assert (out == 0).any()


def test_channels_and_examples_drop_apart():
    out = np.asarray(drop_block(KEY, jnp.ones((2, 8, 8, 2)), 0.3, 3)) == 0
    maps = [out[0, ..., 0], out[0, ..., 1], out[1, ..., 0], out[1, ..., 1]]
    assert len({m.tobytes() for m in maps}) == 4


def test_what_is_kept_is_scaled_by_what_is_left(rng):
    x = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    out = np.asarray(drop_block(KEY, x, 0.25, 3))
    kept = out != 0
    np.testing.assert_allclose(out[kept], x[kept] * x.size / kept.sum(), rtol=1e-6)


def test_a_rate_of_zero_changes_no_bit(rng):
    x = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    zero = jnp.float32(0)
    np.testing.assert_array_equal(jax.jit(drop_block, static_argnums=3)(KEY, x, zero, 3), x)
    np.testing.assert_array_equal(jax.jit(drop_path)(KEY, x, zero), x)
    np.testing.assert_array_equal(DropBlock(3).apply({}, x, 0.0, True), x)  # and needs no key
    np.testing.assert_array_equal(DropBlock(3).apply({}, x, 0.5, train=False), x)


def test_blocks_shrink_to_small_maps_or_leave_them():
    x = jnp.ones((100, 4, 4, 16))
    clamped = np.asarray(drop_block(KEY, x, 0.2, 5)) == 0
    assert np.mean(clamped) == pytest.approx(0.2, abs=0.04)
    assert set(clamped.mean((1, 2)).ravel()) == {0.0, 1.0}  # a block is the whole map
    assert drop_block(KEY, x, 0.2, 5, clamp=False) is x
    module = DropBlock(5, clamp=False)
    assert module.apply({}, x, 0.2, True, rngs={"dropout": KEY}) is x


def test_annealing_the_rate_compiles_once(rng):
    x = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    step = jax.jit(lambda rate: DropBlock(3).apply({}, x, rate, True, rngs={"dropout": KEY}))
    shares = [float(np.mean(np.asarray(step(jnp.float32(r))) == 0)) for r in (0, 0.1, 0.3, 0.6)]
    assert step._cache_size() == 1
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > 0.4


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_path_drops_examples_and_keeps_the_mean(rate):
    out = np.asarray(drop_path(KEY, jnp.ones((20_000, 2, 2, 1)), rate))
    np.testing.assert_allclose(sorted(set(out.ravel())), [0, 1 / (1 - rate)], rtol=1e-6)
    assert (np.ptp(out, axis=(1, 2, 3)) == 0).all()
    assert np.mean(out) == pytest.approx(1, abs=0.03)
