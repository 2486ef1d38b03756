"""BatchNorm in groups: against nn.BatchNorm of each, on one device and eight, and in training."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_trees_equal,
    drawn,
    make_state,
    max_difference,
    random_batch,
    shapes_of,
    tiny_resnet,
)

from flax_resnet.distributed import sharding
from flax_resnet.errors import UserError
from flax_resnet.models.arguments import check_bn_group
from flax_resnet.models.layers import Layers
from flax_resnet.training.step import train_step

OPTIMIZED = True  # one device against eight
KEY = jax.random.key(0)


def noise(rng, shape=(24, 3, 2, 5), dtype=np.float32):
    """Images whose mean and spread differ from row to row."""
    scale = np.exp(rng.normal(size=(shape[0], 1, 1, shape[3])))
    return (scale * rng.normal(1, 1, size=shape)).astype(dtype)


def noisy(rng, variables):
    """Variables of a norm that are neither 0 nor 1."""
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype), variables)


def run(layer, variables, x):
    """(output, new batch_stats) in training."""
    return layer.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-12), ("float32", 2e-6)])
@pytest.mark.parametrize("group", [1, 4, 24])
def test_groups_are_normalised_as_if_alone(rng, dtype, close, group):
    """Output, running statistics, and the gradients of input, scale and bias."""
    with jax.enable_x64(dtype == "float64"):
        layers = Layers(dtype=dtype, param_dtype=dtype, bn_epsilon=0.1)
        x = noise(rng, dtype=dtype)
        plain = layers.norm(True)
        variables = noisy(rng, plain.init(KEY, x))
        stats = variables["batch_stats"]

        def alone(params, x):
            each = [run(plain, {"params": params, "batch_stats": stats}, x[i : i + group])
                    for i in range(0, len(x), group)]  # fmt: skip
            outs, new = zip(*each, strict=True)
            return jnp.concatenate(outs), jax.tree.map(lambda *s: sum(s) / len(s), *new)

        def grouped(params, x):
            layer = Layers(**{**vars(layers), "bn_group": group}).norm(True)
            return run(layer, {"params": params, "batch_stats": stats}, x)

        @functools.partial(jax.jit, static_argnums=0)
        def both_ways(function):
            out, back = jax.vjp(function, variables["params"], jnp.asarray(x))
            return out, back(jax.tree.map(jnp.cos, out))

        got, want = both_ways(grouped), both_ways(alone)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(dtype)}
        largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want))
        assert max_difference(got, want) < close * largest
        whole = both_ways(lambda params, x: run(plain, {**variables, "params": params}, x))
        assert (max_difference(got, whole) < close * largest) == (group == len(x))


def test_variables_and_evaluation_are_those_of_batch_norm_to_the_last_bit(rng):
    x = noise(rng)
    grouped, plain = Layers(bn_group=4), Layers()
    for train in (False, True):  # started with one image
        start = grouped.norm(train).init(KEY, x[:1])
        assert_trees_equal(start, plain.norm(train).init(KEY, x[:1]))
        assert jax.tree.structure(start) == jax.tree.structure(plain.norm(train).init(KEY, x))
    variables = noisy(rng, start)
    for images in (x, x[:7]):
        out, want = (layers.norm(False).apply(variables, images) for layers in (grouped, plain))
        np.testing.assert_array_equal(out, want)
    model = tiny_resnet()
    assert shapes_of(model.clone(bn_group=4), (8, 8, 3)) == shapes_of(model, (8, 8, 3))


def test_statistics_of_groups_stay_float32_in_bfloat16(rng):
    x = noise(rng)
    layer = Layers(dtype="bfloat16", bn_group=4).norm(True)
    variables = layer.init(KEY, x)
    out, new = run(layer, variables, jnp.asarray(x, "bfloat16"))
    assert out.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
    want, stats = run(Layers(bn_group=4).norm(True), variables, x)
    np.testing.assert_allclose(np.float32(out), want, atol=0.03)
    assert max_difference(new, stats) < 0.01
    # As in nn.BatchNorm: an input that is wider than the computation is rounded only at the end.
    same, _ = run(Layers(dtype="bfloat16", bn_group=24).norm(True), variables, x)
    plain, _ = run(Layers(dtype="bfloat16").norm(True), variables, x)
    np.testing.assert_allclose(np.float32(same), np.float32(plain), rtol=0.01)
    assert run(Layers(dtype=None, bn_group=4).norm(True), variables, x)[0].dtype == x.dtype


EXCHANGES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(compiled):
    """[(shapes of the result, operation)] of what devices exchange."""
    return re.findall(rf" = (.*?) ({EXCHANGES})[-\w]*\(", compiled.as_text())


@pytest.mark.parametrize("group", [2, 16, None])
def test_a_batch_on_eight_devices_is_normalised_as_on_one(rng, meshes, group):
    """Of 48 images each holds 6: groups of 2 are whole, the others are not."""
    x = noise(rng, (48, 3, 2, 5))
    layer = Layers(bn_group=group).norm(True)
    variables = noisy(rng, layer.init(KEY, x[:1]))
    found = []
    for mesh in meshes:
        given = sharding.put_replicated(mesh, variables), sharding.put_batch(mesh, x)
        found.append(jax.device_get(jax.jit(functools.partial(run, layer))(*given)))
    assert max_difference(*found) < 1e-5


def test_a_network_waits_for_no_other_device_on_its_way_forward(rng, meshes):
    """One all-reduce of the running statistics of all norms; without groups, one a norm."""
    x = noise(rng, (16, 8, 8, 3))
    counts = {}
    for group in (2, None):
        model = tiny_resnet(bn_group=group)
        forward = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        given = sharding.put_replicated(meshes[1], drawn(model, x))
        compiled = jax.jit(forward).lower(given, sharding.put_batch(meshes[1], x)).compile()
        shapes, kinds = zip(*collectives(compiled), strict=True)
        assert set(kinds) == {"all-reduce"}
        assert set(re.findall(r"f32\[[^]]*\]", "".join(shapes))) == {"f32[8]"}
        counts[group] = len(kinds)
    assert counts == {2: 1, None: 3}


@pytest.mark.slow
@pytest.mark.parametrize(("accum_steps", "group"), [(1, 4), (2, 2)])
def test_training_is_the_same_on_one_device_and_eight(rng, meshes, accum_steps, group):
    batches = [random_batch(rng, 32) for _ in range(2)]
    step = functools.partial(train_step, accum_steps=accum_steps)

    def trained(mesh, model):
        whole = sharding.replicated(mesh)
        state = sharding.put_replicated(mesh, make_state(model))
        first = sharding.put_batch(mesh, batches[0])
        compiled = jax.jit(step, out_shardings=whole).lower(state, first).compile()
        for batch in batches:
            state, _ = compiled(state, sharding.put_batch(mesh, batch))
        return jax.device_get((state.params, state.batch_stats)), collectives(compiled)

    with jax.enable_x64(True):
        model = tiny_resnet(dtype="float64", param_dtype="float64", bn_group=group)
        (one, _), (eight, exchanged) = (trained(mesh, model) for mesh in meshes)
        assert max_difference(one, eight) < 1e-11
        if accum_steps == 1:
            across, _ = trained(meshes[0], model.clone(bn_group=None))
            assert max_difference(one, across) > 1e-4
    assert {kind for _, kind in exchanged} == {"all-reduce"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_resnet(bn_group=0), "bn_group=0: expected 1 or more"),
        (lambda: tiny_resnet(bn_group=4, axis_name="batch"), "bn_group=4 with axis_name='batch': "),
        (lambda: check_bn_group(8, 36), "bn_group=8 does not divide a batch of 36 images: use 6, "),
        (lambda: check_bn_group(8, 36, 2), "18 images, each of accum_steps=2 parts of 36: use 6, "),
        (lambda: check_bn_group(64, 32), "bn_group=64 does not divide a batch of 32 .* use 32, "),
    ],
)
def test_bad_groups_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_batch_that_does_not_divide_is_one_line(rng):
    step = functools.partial(train_step, accum_steps=2)
    state = make_state(tiny_resnet(bn_group=8))
    with pytest.raises(UserError, match="bn_group=8 does not divide a batch of 12 images: use 6"):
        jax.eval_shape(step, state, random_batch(rng, 24))
    jax.eval_shape(step, state, random_batch(rng, 32))
    for size, group, accum_steps in ((32, 8, 2), (32, None, 1), (32, 32, 1), (7, 1, 1)):
        check_bn_group(group, size, accum_steps)
