"""The CPU's forms compute what the plain ones do; its compiler options are given on it alone."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from flax_resnet.models import cpu_forms, layers
from flax_resnet.xla import backend

DIMENSIONS = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2)])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        (2, 2, ((0, 0), (0, 0))),
        (3, 2, ((1, 1), (1, 1))),
        (3, 2, ((0, 1), (0, 1))),
        (3, 1, ((1, 1), (1, 1))),
        (2, 3, ((0, 0), (0, 0))),
    ],
)
def test_max_pool_and_its_gradients_are_the_plain_ones(rng, shape, window, strides, padding):
    # Few different values: of several maxima in a window the same one has the gradient.
    x = jnp.asarray(rng.integers(0, 3, shape), jnp.float32)

    def plain(x):
        return nn.max_pool(x, (window, window), (strides, strides), padding)

    def ours(x):
        return cpu_forms.max_pool(x, window, strides, padding)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def both(f, x, dy, dx):
        y, back = jax.vjp(f, x)
        return y, back(dy(y))[0], jax.jvp(f, (x,), (dx,))[1]

    def dy(y):
        return jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)

    dx = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    want, want_back, _ = both(plain, x, dy, dx)
    got, back, forth = both(ours, x, dy, dx)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(back, want_back, rtol=1e-6, atol=1e-6)
    # XLA's own takes another of equal ones here.
    assert float(jnp.vdot(dy(got), forth)) == pytest.approx(float(jnp.vdot(back, dx)), abs=1e-3)


def test_max_pool_keeps_what_is_not_a_number():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 3, 3, 0].set(jnp.nan)
    pooled = cpu_forms.max_pool(x, 2, 2, ((0, 0), (0, 0)))[0, ..., 0]
    np.testing.assert_array_equal(jnp.isnan(pooled), [[False, False], [False, True]])


def convolution(strides=1, padding=1, groups=1, dilation=1):
    """(The plain convolution, ours), functions of input and kernel."""
    arguments = (strides, strides), ((padding, padding), (padding, padding))
    options = {
        "lhs_dilation": (1, 1),
        "rhs_dilation": (dilation, dilation),
        "dimension_numbers": DIMENSIONS,
        "feature_group_count": groups,
        "precision": None,
    }

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, *arguments, **options)

    def ours(x, kernel):
        return cpu_forms.convolve(x, kernel, *arguments, **options)

    return plain, ours


CONVOLUTIONS = {
    "3x3": ((8, 6, 6, 4), (3, 3, 4, 5), {}),
    "3x3 of stride 2": ((8, 7, 7, 4), (3, 3, 4, 5), {"strides": 2}),
    "3x3 of stride 2 to 2x2": ((8, 4, 3, 4), (3, 3, 4, 5), {"strides": 2}),
    "7x7 of stride 2 to 2x3": ((8, 8, 9, 3), (7, 7, 3, 5), {"strides": 2, "padding": 1}),
    "4x4 of stride 3": ((8, 9, 11, 4), (4, 4, 4, 5), {"strides": 3}),
    "2x2 of stride 3": ((8, 10, 10, 4), (2, 2, 4, 5), {"strides": 3, "padding": 0}),  # skips pixels
    "1x1": ((8, 6, 6, 4), (1, 1, 4, 5), {"padding": 0}),
    "1x1 of stride 2 with padding": ((8, 6, 6, 4), (1, 1, 4, 5), {"strides": 2}),
    "1x1 of stride 2": ((8, 7, 7, 4), (1, 1, 4, 5), {"strides": 2, "padding": 0}),
    "7x7 of stride 2": ((8, 12, 12, 3), (7, 7, 3, 5), {"strides": 2, "padding": 3}),
    "groups": ((8, 6, 6, 4), (3, 3, 2, 6), {"groups": 2}),
    "dilated": ((8, 9, 9, 4), (3, 3, 4, 5), {"padding": 2, "dilation": 2}),
    "map below the kernel": ((8, 2, 2, 4), (3, 3, 4, 5), {}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients_are_xlas(rng, name):
    with jax.enable_x64(True):
        shape, kernel_shape, fields = CONVOLUTIONS[name]
        x, kernel = (jnp.asarray(rng.standard_normal(s)) for s in (shape, kernel_shape))
        plain, ours = convolution(**fields)
        (want, back), (got, our_back) = (jax.vjp(f, x, kernel) for f in (plain, ours))
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
        dy = jnp.asarray(rng.standard_normal(want.shape))
        for ours_is, plain_is in zip(our_back(dy), back(dy), strict=True):
            np.testing.assert_allclose(ours_is, plain_is, rtol=1e-12, atol=1e-12)


def test_a_gradient_of_a_gradient_is_the_plain_one(rng):
    """As sharpness-aware steps and Hessian-vector products take it."""
    with jax.enable_x64(True):
        shape, kernel_shape, fields = CONVOLUTIONS["3x3 of stride 2 to 2x2"]
        x, kernel, along = (
            jnp.asarray(rng.standard_normal(s)) for s in (shape, kernel_shape, kernel_shape)
        )
        curved = [
            jax.jvp(
                jax.grad(lambda k, f=f: jnp.sum(jnp.tanh(f(x, k)))), (kernel,), (along,)
            )[1]
            for f in convolution(**fields)
        ]  # fmt: skip
        np.testing.assert_allclose(*curved, rtol=1e-9, atol=1e-9)


def of_batch_norm(normalize):
    """A function of x, scale and bias that takes everything that a BatchNorm gives."""

    def value(x, scale, bias):
        y, mean, var = normalize(x, scale, bias)
        return jnp.sum(jnp.tanh(y)) + jnp.sum(jnp.sin(mean)) + jnp.sum(jnp.cos(var))

    return value


def flax_batch_norm(x, scale, bias):
    norm = nn.BatchNorm(use_running_average=False, momentum=0.0, epsilon=1e-3, dtype=x.dtype)
    kept = {"mean": jnp.zeros(x.shape[-1], x.dtype), "var": jnp.ones(x.shape[-1], x.dtype)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": kept}
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]


def test_batch_norm_and_its_derivatives_are_flaxs(rng):
    with jax.enable_x64(True):
        point = [jnp.asarray(rng.standard_normal(s)) for s in ((4, 3, 3, 5), (5,), (5,))]
        point[0] = 3 * point[0] + 2
        along = [jnp.asarray(rng.standard_normal(a.shape)) for a in point]

        def ours(x, scale, bias):
            return cpu_forms.batch_norm(x, scale, bias, 1e-3)

        @functools.partial(jax.jit, static_argnums=0)
        def everything(normalize, x, scale, bias):
            point = (x, scale, bias)
            value = of_batch_norm(normalize)
            gradient = jax.grad(value, (0, 1, 2))
            return [
                normalize(*point),
                gradient(*point),
                jax.jvp(value, point, tuple(along))[1],
                jax.jvp(gradient, point, tuple(along))[1],
                jax.vmap(gradient, (None, 0, None))(x, jnp.stack([scale, bias]), bias),
            ]

        found = [jax.tree.leaves(everything(f, *point)) for f in (ours, flax_batch_norm)]
        for got, want in zip(*found, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_the_compilers_options_change_no_number(rng):
    options = backend.compiler_options()
    assert options == {backend.YNN: backend.FUSION_TYPES}
    x = jnp.asarray(rng.standard_normal((64, 8, 8, 32)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 32, 32)), jnp.float32)
    plain, _ = convolution()

    def program(x, kernel):
        y = plain(x, kernel)
        return jnp.sum(y, (0, 1, 2)), y

    want, got = (jax.jit(program, compiler_options=o)(x, kernel) for o in (None, options))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-3)


def test_forms_are_chosen_within_a_block_alone(monkeypatch):
    def program():
        pool = jax.make_jaxpr(lambda x: layers.max_pool(x, 3, 2, pad=1))
        return "reduce_window_max" in str(pool(jnp.zeros((1, 8, 8, 2))))

    assert not program()
    with backend.traced_for("any"):
        assert not backend.is_cpu()
        assert program()
        with pytest.raises(ZeroDivisionError), backend.traced_for("any"):
            _ = 1 / 0
        assert program()
    assert backend.is_cpu()
    assert not program()
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    assert program()
    with backend.traced_for("cpu"):
        assert not program()


def test_a_users_choice_stands_and_other_backends_have_no_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{backend.YNN}=")
    assert backend.compiler_options() is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert backend.compiler_options() is not None
    monkeypatch.setattr(backend.jax, "default_backend", lambda: "gpu")
    assert backend.compiler_options() is None


def test_usable_cores_are_those_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 7}, raising=False)
    assert backend.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert backend.usable_cores() == (os.cpu_count() or 1)
