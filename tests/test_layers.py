import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_resnet.layers import Layers, as_dtype, average_pool_2, max_pool, shortcut_a

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


def test_same_padding_would_give_other_numbers_at_stride_2(rng):
    x = rng.normal(size=(1, 8, 8, 3)).astype(np.float32)
    ours = LAYERS.conv(4, 3, 2)
    variables = ours.init(jax.random.key(0), x)
    same = nn.Conv(4, (3, 3), strides=(2, 2), padding="SAME", use_bias=False)
    a, b = ours.apply(variables, x), same.apply(variables, x)
    assert a.shape == b.shape
    assert np.max(np.abs(a - b)) > 0.1


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


def test_dilated_conv_is_a_conv_with_a_spread_kernel(rng):
    x = rng.normal(size=(1, 9, 9, 2)).astype(np.float32)
    layer = LAYERS.conv(3, 3, dilation=2)
    variables = layer.init(jax.random.key(0), x)
    spread = np.zeros((5, 5, 2, 3), np.float32)
    spread[::2, ::2] = variables["params"]["kernel"]
    want = naive_conv(x, spread, 1, 2)
    np.testing.assert_allclose(layer.apply(variables, x), want, rtol=1e-4, atol=1e-5)


def test_grouped_conv_sees_its_group_only(rng):
    x = rng.normal(size=(1, 4, 4, 4)).astype(np.float32)
    layer = LAYERS.conv(6, 3, groups=2)
    variables = layer.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"])
    assert kernel.shape == (3, 3, 2, 6)
    halves = [
        naive_conv(x[..., :2], kernel[..., :3], 1, 1),
        naive_conv(x[..., 2:], kernel[..., 3:], 1, 1),
    ]
    want = np.concatenate(halves, axis=-1)
    np.testing.assert_allclose(layer.apply(variables, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "normed", "biased"),
    [
        ({}, True, False),
        ({}, False, False),
        ({"conv_bias": "unnormalized"}, True, False),
        ({"conv_bias": "unnormalized"}, False, True),
        ({"conv_bias": "all"}, True, True),
        ({"norm_kind": "none"}, True, True),
    ],
)
def test_biases_are_where_conv_bias_says(fields, normed, biased):
    assert Layers(**fields).conv(4, 3, normed=normed).use_bias is biased


def test_glorot_kernels_fill_keras_range():
    layers = Layers(kernel_init="glorot_uniform")
    for layer, fans in ((layers.conv(256, 3), 9 * (64 + 256)), (layers.dense(256), 64 + 256)):
        kernel = layer.init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))["params"]["kernel"]
        assert np.max(np.abs(kernel)) == pytest.approx(np.sqrt(6 / fans), rel=0.01)


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


def test_norm_statistics_stay_float32_in_bfloat16(rng):
    x = rng.normal(size=(8, 4, 4, 5)).astype(jnp.bfloat16)
    layer = Layers(dtype="bfloat16").norm(True)
    out, new = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}


def test_max_pool_pads_with_minus_infinity():
    x = -jnp.arange(1.0, 17.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(max_pool(x, 3, 2, pad=1)[0, ..., 0], [[-1, -2], [-5, -6]])


def test_max_pool_pads_as_tensorflow_where_that_is_asked_for():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(max_pool(x, 3, 2, pad="SAME")[0, ..., 0], [[10, 11], [14, 15]])
    np.testing.assert_array_equal(max_pool(x, 3, 2, pad=1)[0, ..., 0], [[5, 7], [13, 15]])


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


def test_as_dtype_takes_names_and_none():
    assert as_dtype(None) is None
    assert as_dtype("bfloat16") == jnp.bfloat16
    assert as_dtype(jnp.float64) == np.float64


@pytest.mark.parametrize(
    ("size", "kernel_size", "strides"),
    [((1, 1), 3, 1), ((2, 2), 3, 1), ((3, 2), 3, 1), ((2, 5), 3, 2), ((1, 2), 3, 2),
     ((5, 6), 7, 2), ((3, 3), 3, 2), ((1, 1), 1, 1)],
)  # fmt: skip
def test_convolutions_of_small_maps_are_what_xla_computes(rng, size, kernel_size, strides):
    """Values and gradients: on a CPU those of maps smaller than the kernel are matrix products."""
    layer = Layers(conv_bias="all").conv(5, kernel_size, strides)
    x = jnp.asarray(rng.normal(size=(3, *size, 4)), jnp.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    plain = layer.clone(conv_general_dilated=jax.lax.conv_general_dilated)

    @functools.partial(jax.jit, static_argnums=0)
    def run(layer):
        out, back = jax.vjp(layer.apply, variables, x)
        return out, back(jnp.cos(out))

    ours, theirs = run(layer), run(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    pads = kernel_size > min(size)
    assert ("conv_general" not in str(jax.make_jaxpr(layer.apply)(variables, x))) == pads
