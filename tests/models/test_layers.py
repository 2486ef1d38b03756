import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnet.models.layers import Layers, average_pool_2, max_pool, shortcut_a

OPTIMIZED = True
LAYERS = Layers()


def naive_conv(x, kernel, stride, pad):
    """Cross-correlation written as loops over the kernel, zero padding on every side."""
    k = kernel.shape[0]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    side = (x.shape[1] - k) // stride + 1
    out = np.zeros((x.shape[0], side, side, kernel.shape[-1]))
    for i in range(k):
        for j in range(k):
            window = x[:, i : i + stride * side : stride, j : j + stride * side : stride]
            out += window[:, :side, :side] @ kernel[i, j]
    return out


@pytest.mark.parametrize(("kernel_size", "strides"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_conv_pads_symmetrically(rng, kernel_size, strides):
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    layer = LAYERS.conv(4, kernel_size, strides)
    variables = layer.init(jax.random.key(0), x)
    want = naive_conv(x, np.asarray(variables["params"]["kernel"]), strides, kernel_size // 2)
    np.testing.assert_allclose(layer.apply(variables, x), want, rtol=1e-4, atol=1e-5)


def test_shortcut_a_subsamples_and_pads_with_zeros(rng):
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    out = np.asarray(shortcut_a(x, 8, 2))
    assert out.shape == (2, 3, 2, 8)
    np.testing.assert_array_equal(out[..., 2:5], x[:, ::2, ::2])
    assert not out[..., :2].any()
    assert not out[..., 5:].any()


def test_shortcut_a_refuses_to_shrink():
    with pytest.raises(ValueError, match="cannot shrink 8 channels to 4"):
        shortcut_a(jnp.zeros((1, 4, 4, 8)), 4, 1)


@pytest.mark.parametrize(
    ("fields", "normed", "biased"),
    [
        ({}, False, False),
        ({"conv_bias": "unnormalized"}, False, True),
        ({"conv_bias": "all"}, True, True),
        ({"norm_kind": "none"}, True, True),
    ],
)
def test_biases_are_where_conv_bias_says(fields, normed, biased):
    assert Layers(**fields).conv(4, 3, normed=normed).use_bias is biased


def test_norm_normalises_and_keeps_its_momentum_share(rng):
    x = rng.normal(3, 2, size=(16, 4, 4, 5)).astype(np.float32)
    layer = Layers(bn_momentum=0.9, bn_epsilon=0.5).norm(True)
    out, new = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(var + 0.5), atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_a_norm_without_a_scale_has_an_offset_alone(rng):
    x = rng.normal(3, 2, size=(16, 4, 4, 5)).astype(np.float32)
    layer = Layers(bn_epsilon=0.5, bn_scale=False).norm(True)
    assert layer.init(jax.random.key(0), x)["params"].keys() == {"bias"}
    offset = rng.normal(size=5).astype(np.float32)
    out, _ = layer.apply({"params": {"bias": offset}}, x, mutable=["batch_stats"])
    want = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 0.5) + offset
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_max_pool_pads_as_tensorflow_where_that_is_asked_for():
    x = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)  # zeros around them would be larger
    np.testing.assert_array_equal(max_pool(x, 3, 2, pad=1)[0, ..., 0], [[-1, -2], [-5, -6]])
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(max_pool(x, 3, 2, pad="SAME")[0, ..., 0], [[10, 11], [14, 15]])


def test_dilated_averages_hold_the_strided_ones(rng):
    x = rng.normal(size=(2, 10, 8, 3)).astype(np.float32)
    for d in (1, 2, 4):
        dense = average_pool_2(x, 1, d)
        assert dense.shape == x.shape
        want = average_pool_2(x[:, ::d, ::d])
        np.testing.assert_allclose(dense[:, :: 2 * d, :: 2 * d], want, rtol=1e-6)


def test_average_pool_2_leaves_missing_pixels_out(rng):
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    out = np.asarray(average_pool_2(x))
    assert out.shape == (2, 3, 2, 3)
    np.testing.assert_allclose(out[:, 0, 1], x[:, :2, 2:].mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[:, 2, 0], x[:, 4, :2].mean(1), rtol=1e-5, atol=1e-6)
