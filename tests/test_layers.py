import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_resnet.layers import as_dtype, batch_norm, conv, shortcut_a


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
    layer = conv(4, kernel_size, strides)
    variables = layer.init(jax.random.key(0), x)
    want = naive_conv(x, np.asarray(variables["params"]["kernel"]), strides, kernel_size // 2)
    np.testing.assert_allclose(layer.apply(variables, x), want, rtol=1e-4, atol=1e-5)


def test_same_padding_would_give_other_numbers_at_stride_2(rng):
    x = rng.normal(size=(1, 8, 8, 3)).astype(np.float32)
    ours = conv(4, 3, 2)
    variables = ours.init(jax.random.key(0), x)
    same = nn.Conv(4, (3, 3), strides=(2, 2), padding="SAME", use_bias=False)
    a, b = ours.apply(variables, x), same.apply(variables, x)
    assert a.shape == b.shape
    assert np.max(np.abs(a - b)) > 0.1


def test_conv_kernels_start_with_he_fan_out_variance():
    variables = conv(256, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 64)))
    want = np.sqrt(2 / (9 * 256))
    assert np.std(variables["params"]["kernel"]) == pytest.approx(want, rel=0.01)


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


def test_batch_norm_normalises_and_keeps_its_momentum_share(rng):
    x = rng.normal(3, 2, size=(16, 4, 4, 5)).astype(np.float32)
    variables = batch_norm(train=True).init(jax.random.key(0), x)
    out, new = batch_norm(train=True, momentum=0.9, epsilon=0.5).apply(
        variables, x, mutable=["batch_stats"]
    )
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(var + 0.5), atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_batch_norm_statistics_stay_float32_in_bfloat16(rng):
    x = rng.normal(size=(8, 4, 4, 5)).astype(jnp.bfloat16)
    layer = batch_norm(train=True, dtype="bfloat16")
    out, new = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}


def test_as_dtype_takes_names_and_none():
    assert as_dtype(None) is None
    assert as_dtype("bfloat16") == jnp.bfloat16
    assert as_dtype(jnp.float64) == np.float64
