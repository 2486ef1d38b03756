"""The networks: shapes, what each field changes, and what it leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, drawn, max_difference, shapes_of, tiny_resnet
from model_helpers import KEY, images, run

from flax_resnet.models import (
    BasicBlock,
    BottleneckBlock,
    DropBlockResNet,
    HighwayLayer,
    MiniModel,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResidualUnit,
    cifar_resnet,
    stack_blocks,
    unstack_blocks,
)

BLOCKS = (BasicBlock, BottleneckBlock, PreActBasicBlock, PreActBottleneckBlock)


@functools.partial(jax.jit, static_argnums=0)
def features_of(model, variables, x):
    """Every stage's map, compiled as a whole: one operation at a time takes longer."""
    return [f.map for f in model.apply(variables, x, method="features")]


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_cls", [BasicBlock, PreActBottleneckBlock])
@pytest.mark.parametrize(
    ("fields", "strides"),
    [
        ({"stem": "cifar"}, (1, 2, 4)),
        ({"stem": "imagenet"}, (4, 8, 16)),
        ({"stem": "deep"}, (4, 8, 16)),
        ({"stem": "imagenet", "output_stride": 8}, (4, 8, 8)),
        ({"stem": "cifar", "output_stride": 1}, (1, 1, 1)),
        ({"stem": "cifar", "stride_block": "last"}, (2, 4, 4)),
        ({"stem": "cifar", "stride_block": "last", "output_stride": 2}, (2, 2, 2)),
    ],
)
def test_features_are_each_stages_map_with_its_stride_and_width(block_cls, fields, strides):
    model = tiny_resnet(block_cls=block_cls, stage_sizes=(2, 2, 2), **fields)
    x = jax.ShapeDtypeStruct((2, 40, 31, 3), jnp.float32)
    variables = shapes_of(model, (40, 31, 3))
    apply = functools.partial(model.apply, method="features")
    features = jax.eval_shape(apply, variables, x)
    assert [f.name for f in features] == ["stage1", "stage2", "stage3"]
    assert tuple(f.stride for f in features) == strides
    assert [f.width for f in features] == [8 * block_cls.expansion * 2**s for s in range(3)]
    for f in features:
        assert f.map.shape == (2, -(-40 // f.stride), -(-31 // f.stride), f.width)
    assert model.num_features == features[-1].width


# --- dilation: the strided net's map is every other pixel of the dilated one's -------------------


@pytest.mark.parametrize(
    ("block_cls", "fields"),
    [
        (BottleneckBlock, {"stride_conv": "3x3", "shortcut": "D"}),
        (PreActBasicBlock, {"shortcut": "A"}),
    ],
)
def test_a_dilated_net_computes_the_strided_one_between_its_pixels(rng, block_cls, fields):
    fields = {"block_cls": block_cls, "stage_sizes": (1, 2, 2), **fields}
    strided = tiny_resnet(num_filters=4, **fields)
    dilated = strided.clone(output_stride=1)
    x = images(rng, n=2, size=16)
    variables = drawn(strided, x)
    want = features_of(strided, variables, x)[-1]
    got = features_of(dilated, variables, x)[-1]
    assert (want.shape[1], got.shape[1]) == (4, 16)
    np.testing.assert_allclose(got[:, ::4, ::4], want, rtol=1e-4, atol=1e-4)


# --- shortcuts and connections -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shortcut", "projecting"),
    [
        ("A", set()),
        ("B", {"stage2_block1"}),
        ("D", {"stage2_block1"}),
        ("C", {"stage1_block1", "stage1_block2", "stage2_block1"}),
    ],
)
def test_shortcut_projects_where_its_letter_says(shortcut, projecting):
    params = shapes_of(tiny_resnet(stage_sizes=(2, 1), shortcut=shortcut), (8, 8, 3))["params"]
    assert {name for name, value in params.items() if "shortcut_conv" in value} == projecting


@pytest.mark.parametrize("block_cls", [*BLOCKS, HighwayLayer])
def test_a_plain_block_is_its_branch(rng, block_cls):
    x = images(rng, channels=8 * block_cls.expansion)
    plain, residual = (block_cls(8, connection=c) for c in ("plain", "residual"))
    variables = drawn(residual, x)
    h, _ = run(plain, variables, x, True)
    both, _ = run(residual, variables, x, True)
    if block_cls.preactivation:
        np.testing.assert_allclose(both - x, h, atol=1e-5)
    else:  # both end in a ReLU: compare where the branch is positive
        np.testing.assert_allclose(both[h > 0], np.maximum(h + x, 0)[h > 0], atol=1e-5)


@pytest.mark.parametrize("block_cls", [*BLOCKS, HighwayLayer])
def test_a_highway_block_is_plain_with_its_gate_open_and_the_identity_with_it_shut(rng, block_cls):
    x = images(rng, channels=8 * block_cls.expansion)
    gated = {bias: block_cls(8, connection="highway", gate_bias=bias) for bias in (-200, 0, 200)}
    variables = drawn(gated[0], x)

    def biased(bias):
        params = {**variables["params"], "gate": dict(variables["params"]["gate"])}
        params["gate"]["bias"] = jnp.full_like(params["gate"]["bias"], bias)
        return {**variables, "params": params}

    started = gated[-200].init(KEY, x)["params"]["gate"]["bias"]
    np.testing.assert_array_equal(started, -200)
    plain, _ = run(block_cls(8, connection="plain"), variables, x, True)
    np.testing.assert_array_equal(run(gated[0], biased(200), x, True)[0], plain)
    np.testing.assert_array_equal(run(gated[0], biased(-200), x, True)[0], x)
    gate = jax.nn.sigmoid(
        gated[0].layers.conv(8 * block_cls.expansion, gated[0].convs()[0].kernel_size, bias=0.0)
        .apply({"params": variables["params"]["gate"]}, x)
    )  # fmt: skip
    mixed = gate * plain + (1 - gate) * x
    np.testing.assert_allclose(run(gated[0], variables, x, True)[0], mixed, rtol=1e-4, atol=1e-5)


# --- initialisation ------------------------------------------------------------------------------


def test_kernels_start_he_normal_by_fan_out_and_norms_as_the_identity():
    model = cifar_resnet(8, num_filters=64).clone(stage_sizes=(1, 1))
    variables = model.init(KEY, jnp.zeros((1, 8, 8, 3)))
    block = variables["params"]["stage2_block1"]
    assert np.std(block["conv1"]["kernel"]) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.01)
    np.testing.assert_array_equal(block["norm2"]["scale"], 1)
    np.testing.assert_array_equal(block["norm2"]["bias"], 0)
    head = variables["params"]["head"]
    assert np.std(head["kernel"]) == pytest.approx(np.sqrt(1 / 128), rel=0.05)
    np.testing.assert_array_equal(head["bias"], 0)


@pytest.mark.parametrize("norm_kind", ["batch", "none"])
@pytest.mark.parametrize("block_cls", BLOCKS)
def test_zero_init_last_starts_a_block_as_its_shortcut_and_lets_it_learn(rng, block_cls, norm_kind):
    x = images(rng, channels=8 * block_cls.expansion)
    layers = tiny_resnet(norm_kind=norm_kind).layers
    block = block_cls(8, zero_init_last=True, layers=layers)
    variables = block.init(KEY, x)
    want = x if block_cls.preactivation else np.maximum(x, 0)
    np.testing.assert_array_equal(run(block, variables, x, True)[0], want)
    usual = block_cls(8, layers=layers)
    assert np.max(np.abs(run(usual, drawn(usual, x), x, True)[0] - want)) > 0.5

    def loss(params):
        return jnp.sum(run(block, {**variables, "params": params}, x, True)[0] * x)

    last = f"conv{len(block.convs())}"
    grads = jax.grad(loss)(variables["params"])
    zeroed = grads[last.replace("conv", "norm")]["scale"] if (
        norm_kind == "batch" and not block_cls.preactivation
    ) else grads[last]["kernel"]  # fmt: skip
    assert np.min(np.max(np.abs(zeroed.reshape(-1, zeroed.shape[-1])), axis=0)) > 0


# --- scanning, remat -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {"block_cls": BasicBlock, "shortcut": "A", "stage_sizes": (3,), "bn_group": 2},
            marks=pytest.mark.slow,
        ),
        {"block_cls": HighwayLayer, "connection": "highway", "stage_sizes": (1, 3)},
    ],
)
def test_scanned_and_rematted_nets_equal_the_unrolled_one(rng, fields):
    unrolled = tiny_resnet(num_filters=4, num_classes=3, **fields)
    scanned = unrolled.clone(scan_blocks=True)
    x = images(rng)
    variables = drawn(unrolled, x)
    stacked = stack_blocks(unrolled, variables)
    assert shapes_of(scanned, x.shape[1:]) == jax.eval_shape(lambda: stacked)
    assert_trees_equal(unstack_blocks(unrolled, stacked), variables)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, variables):
        def loss(params):
            out, stats = run(model, {**variables, "params": params}, x, True)
            return jnp.sum(out**2), stats

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, stats = gradients(unrolled, variables)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
    for model, given in (
        (scanned.clone(remat=True), stacked),
        (unrolled.clone(remat=True), variables),
    ):
        its_grads, its_stats = unstack_blocks(model, gradients(model, given))
        assert max_difference(its_stats, stats) < 1e-5
        assert max_difference(its_grads, grads) < 1e-4 * largest
    want = unrolled.apply(variables, x)
    np.testing.assert_allclose(scanned.apply(stacked, x), want, rtol=1e-4, atol=1e-5)


# --- freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_cls", [BasicBlock, PreActBasicBlock])
def test_frozen_parts_keep_their_statistics_and_have_no_backward_pass(rng, block_cls):
    model = tiny_resnet(stage_sizes=(1, 1), block_cls=block_cls)
    x = images(rng)
    variables = drawn(model, x)

    def outcome(frozen):
        frozen_model = model.clone(frozen_stages=frozen)

        def loss(params):
            out, stats = run(frozen_model, {**variables, "params": params}, x, True)
            return jnp.sum(out), stats

        gradient = jax.grad(loss, has_aux=True)
        grads, stats = gradient(variables["params"])
        before = variables["batch_stats"]
        moved = {name for name, new in stats.items() if max_difference(new, before[name])}
        learning = {n for n, g in grads.items() if any(np.any(leaf) for leaf in jax.tree.leaves(g))}
        convolutions = str(jax.make_jaxpr(gradient)(variables["params"])).count(
            " conv_general_dilated["
        )
        return learning, moved, convolutions

    final = {"final_norm"} if block_cls.preactivation else set()
    norms = set() if block_cls.preactivation else {"stem_norm"}
    stem, stages = {"stem_conv"} | norms, [{"stage1_block1"}, {"stage2_block1"}]
    # Forward 1 + 2 + 3 convolutions; backward one for each kernel that learns, and one for each
    # input below which something does: a pre-activated block's first norm does, images do not.
    counts = [6 + 6 + 5, 6 + 5 + 5, 6 + 3 + 3] if final else [6 + 6 + 5, 6 + 5 + 4, 6 + 3 + 1]
    both = stages[0] | stages[1] | final
    assert outcome(-1) == (stem | both | {"head"}, norms | both, counts[0])
    assert outcome(0) == (both | {"head"}, both, counts[1])
    assert outcome(1) == (stages[1] | final | {"head"}, stages[1] | final, counts[2])
    assert outcome(2) == ({"head"}, set(), 6)


# --- the tutorials' networks ---------------------------------------------------------------------


def test_mini_unit_without_residual_lacks_only_the_sum(rng):
    x = images(rng, channels=8)
    unit = ResidualUnit(8)
    variables = drawn(unit, x)
    plain = ResidualUnit(8, residual=False).apply(variables, x)
    np.testing.assert_allclose(unit.apply(variables, x), plain + x, rtol=1e-6)


def test_mini_unit_refuses_channels_that_do_not_add_up():
    with pytest.raises(ValueError, match="input of 4 channels to 8 filters; set pool=True"):
        ResidualUnit(8).init(KEY, jnp.zeros((1, 8, 8, 4)))


def test_mini_model_drops_a_quarter_of_the_final_map_in_training_only():
    model = MiniModel(stage_sizes=(1,), num_filters=4)
    x = jnp.ones((1, 64, 64, 3))
    variables = drawn(model, x)
    _, state = model.apply(variables, x, True, rngs={"dropout": KEY}, capture_intermediates=True,
                           mutable=["batch_stats", "intermediates"])  # fmt: skip
    dropped = state["intermediates"]["Dropout_0"]["__call__"][0]
    active = np.asarray(state["intermediates"]["final_norm"]["__call__"][0]) > 0
    assert np.mean(np.asarray(dropped)[active] == 0) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    "model",
    [
        MiniModel(stage_sizes=(1, 1), num_filters=4),
        tiny_resnet(block_cls=PreActBottleneckBlock, connection="highway", se_reduction=8),
        DropBlockResNet(stage_filters=(4,), dense_features=(8,)),
    ],
)
def test_bfloat16_computes_in_bfloat16_and_stores_float32(model, rng):
    x = images(rng)
    half = model.clone(dtype="bfloat16")
    variables = drawn(half, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out, full = half.apply(variables, x), model.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), full, atol=0.1)
    assert np.max(np.abs(out.astype(np.float32) - full)) > 0
