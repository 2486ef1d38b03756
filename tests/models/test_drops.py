"""What is dropped in training, where, how often, and that nothing is at evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, drawn, tiny_resnet
from model_helpers import KEY, images, run

from flax_resnet.models import (
    DropBlockResNet,
    PreActBasicBlock,
    stack_blocks,
)


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_stochastic_depth_drops_branch_l_of_L_at_l_over_L_of_the_rate(scan_blocks):
    """Branch l gives 2^l times its keep probability everywhere, so the sum says which were kept."""
    model = tiny_resnet(stage_sizes=(4,), norm_kind="none", block_cls=PreActBasicBlock,
                        drop_path_rate=0.8, scan_blocks=scan_blocks)  # fmt: skip
    x, rates = jnp.zeros((1000, 4, 4, 1)), 0.8 * np.arange(1, 5) / 4
    unrolled = model.clone(scan_blocks=False)
    params = jax.tree.map(jnp.zeros_like, drawn(unrolled, x)["params"])
    for i, rate in enumerate(rates):
        params[f"stage1_block{i + 1}"]["conv2"]["bias"] += 2**i * (1 - rate)
    if scan_blocks:
        params = stack_blocks(model, params)
    out = model.apply({"params": params}, x, True, rngs={"dropout": KEY}, method="features")[0].map
    sums = np.asarray(out)[:, 0, 0, 0]
    np.testing.assert_allclose(out, np.broadcast_to(sums[:, None, None, None], out.shape))
    np.testing.assert_allclose(sums, np.round(sums), atol=1e-5)
    kept = np.round(sums).astype(int)[:, None] >> np.arange(4) & 1
    np.testing.assert_allclose(kept.mean(0), 1 - rates, atol=0.05)
    # Each block draws for itself.
    np.testing.assert_allclose(np.corrcoef(kept.T), np.eye(4), atol=0.15)
    whole = model.apply({"params": params}, x[:1], method="features")[0].map
    np.testing.assert_allclose(whole, sum(2**i * (1 - r) for i, r in enumerate(rates)), rtol=1e-6)


def test_dropblock_acts_in_the_last_two_stages_and_its_rate_is_passed_in(rng):
    model = tiny_resnet(stage_sizes=(1, 1, 1), dropblock_size=3)
    x = images(rng, size=16)
    variables = drawn(model, x)

    @jax.jit
    def features(rate):
        out, _ = model.apply(variables, x, True, dropblock_rate=rate, method="features",
                             mutable=["batch_stats"], rngs={"dropout": KEY})  # fmt: skip
        return [f.map for f in out]

    exact, none, some = ([np.asarray(m) for m in features(r)] for r in (0, 0.0, 0.1))
    plain, _ = model.apply(variables, x, True, method="features", mutable=["batch_stats"])
    for a, b, c in zip(exact, none, plain, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c.map, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(some[0], none[0])
    assert all(np.any(s != n) for s, n in zip(some[1:], none[1:], strict=True))
    field = model.clone(dropblock_rate=0.1)
    out, _ = field.apply(variables, x, True, method="features", mutable=["batch_stats"],
                         rngs={"dropout": KEY})  # fmt: skip
    np.testing.assert_allclose(out[-1].map, some[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(field.apply(variables, x), model.apply(variables, x))


@pytest.mark.slow
def test_dropblock_drops_both_paths_and_a_quarter_as_much_a_stage_before(rng):
    """Branches of zero leave what the shortcuts carry: what is dropped there is zero."""
    model = tiny_resnet(stage_sizes=(1, 1, 1), stem_filters=32, num_filters=32, shortcut="A",
                        zero_init_last=True, dropblock_size=1, dropblock_rate=0.4)  # fmt: skip
    x = images(rng, n=16, size=16)
    variables = model.init(KEY, x)
    maps = {}
    for name, module in (("dropped", model), ("exact", model.clone(dropblock_rate=0.0))):
        features, _ = module.apply(variables, x, True, mutable=["batch_stats"], method="features",
                                   rngs={"dropout": KEY})  # fmt: skip
        maps[name] = [np.asarray(f.map) for f in features]
    shares = [np.mean(d[e > 0] == 0) for d, e in zip(*maps.values(), strict=True)]
    np.testing.assert_allclose(shares, [0, 0.1, 1 - 0.9 * 0.6], atol=0.02)


def test_block_dropout_acts_before_the_last_convolution(rng):
    x = images(rng, n=16, size=16, channels=8)
    block = PreActBasicBlock(8, dropout_rate=0.3)
    variables = block.init(KEY, x)
    assert_trees_equal(variables, PreActBasicBlock(8).init(KEY, x))
    _, state = block.apply(variables, x, True, rngs={"dropout": KEY}, capture_intermediates=True,
                           mutable=["batch_stats", "intermediates"])  # fmt: skip
    seen = state["intermediates"]["Dropout_0"]["__call__"][0]
    active = np.asarray(state["intermediates"]["norm2"]["__call__"][0]) > 0
    assert np.mean(np.asarray(seen)[active] == 0) == pytest.approx(0.3, abs=0.02)
    np.testing.assert_array_equal(
        block.apply(variables, x), PreActBasicBlock(8).apply(variables, x)
    )


def test_dropblock_resnets_last_map_is_left_alone_where_that_is_asked_for(rng):
    rates = {"dropblock_rate": 0.5, "dropout_rate": 0.0}
    model = DropBlockResNet(3, (4,), (8,), dropblock_clamp=False, **rates)
    x = images(rng, size=4)
    variables = drawn(model, x)
    rngs = {"rngs": {"dropout": KEY}}
    exact, _ = run(model.clone(dropblock_rate=0.0), variables, x, True)
    np.testing.assert_array_equal(run(model, variables, x, True, **rngs)[0], exact)
    zero = run(model.clone(dropblock_clamp=True), variables, x, True, dropblock_rate=0.0, **rngs)
    np.testing.assert_allclose(zero[0], exact, rtol=1e-5, atol=1e-5)
    clamped = run(model.clone(dropblock_clamp=True), variables, x, True, **rngs)[0]
    assert np.any(clamped != exact)
