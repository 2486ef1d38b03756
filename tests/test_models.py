import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import count_parameters, tiny_resnet

from flax_resnet.models import BasicBlock, MiniModel, ResidualUnit, ResNet, cifar_resnet

CIFAR = (32, 32, 3)


def test_mini_model_has_the_tutorials_parameters():
    assert count_parameters(MiniModel(num_classes=10), CIFAR) == 4_368_714


@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters"),
    [
        (20, "A", 269_722),
        (32, "A", 464_154),
        (44, "A", 658_586),
        (56, "A", 853_018),
        (110, "A", 1_727_962),
        (20, "B", 272_474),
        (32, "B", 466_906),
        (44, "B", 661_338),
        (56, "B", 855_770),
        (110, "B", 1_730_714),
    ],
)
def test_cifar_resnets_have_the_papers_parameters(depth, shortcut, parameters):
    assert count_parameters(cifar_resnet(depth, shortcut=shortcut), CIFAR) == parameters


@pytest.mark.parametrize(
    ("stage_sizes", "parameters"), [((2, 2, 2, 2), 11_689_512), ((3, 4, 6, 3), 21_797_672)]
)
def test_imagenet_basic_resnets_have_the_published_parameters(stage_sizes, parameters):
    assert count_parameters(ResNet(stage_sizes), (224, 224, 3)) == parameters


@pytest.mark.parametrize(("depth", "near"), [(21, 20), (3, 8), (57, 56)])
def test_cifar_resnet_refuses_other_depths(depth, near):
    with pytest.raises(
        ValueError, match=f"depth {depth} is not 6n . 2; the nearest that is: {near}"
    ):
        cifar_resnet(depth)


def test_stages_halve_the_map_and_double_the_filters():
    model = tiny_resnet(stage_sizes=(1, 1, 1))
    x = jnp.zeros((2, 16, 16, 3))
    _, state = model.apply(
        model.init(jax.random.key(0), x), x, capture_intermediates=True, mutable=["intermediates"]
    )
    shapes = {
        name: value["__call__"][0].shape
        for name, value in state["intermediates"].items()
        if "block" in name
    }
    assert shapes == {
        "stage1_block1": (2, 16, 16, 8),
        "stage2_block1": (2, 8, 8, 16),
        "stage3_block1": (2, 4, 4, 32),
    }


def test_imagenet_stem_quarters_the_map():
    model = tiny_resnet(stem="imagenet")
    x = jnp.zeros((1, 64, 64, 3))
    _, state = model.apply(
        model.init(jax.random.key(0), x), x, capture_intermediates=True, mutable=["intermediates"]
    )
    assert state["intermediates"]["stage1_block1"]["__call__"][0].shape == (1, 16, 16, 8)


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_shortcut_projects_where_its_letter_says(shortcut):
    model = tiny_resnet(stage_sizes=(2, 1), shortcut=shortcut)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with_projection = {
        name for name, value in variables["params"].items() if "shortcut_conv" in value
    }
    assert (
        with_projection
        == {
            "A": set(),
            "B": {"stage2_block1"},
            "C": {"stage1_block1", "stage1_block2", "stage2_block1"},
        }[shortcut]
    )


def test_zero_init_last_starts_a_block_as_relu_of_its_input(rng):
    x = rng.normal(size=(4, 8, 8, 8)).astype(np.float32)
    block = BasicBlock(8, zero_init_last=True)
    out, _ = block.apply(block.init(jax.random.key(0), x), x, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, np.maximum(x, 0))
    plain = BasicBlock(8)
    out, _ = plain.apply(plain.init(jax.random.key(0), x), x, True, mutable=["batch_stats"])
    assert np.max(np.abs(out - np.maximum(x, 0))) > 0.5


def test_mini_unit_without_residual_lacks_only_the_sum(rng):
    x = rng.normal(size=(2, 8, 8, 8)).astype(np.float32)
    unit = ResidualUnit(8)
    variables = unit.init(jax.random.key(0), x)
    plain = ResidualUnit(8, residual=False).apply(variables, x)
    np.testing.assert_allclose(unit.apply(variables, x), plain + x, rtol=1e-6)


def test_mini_unit_refuses_channels_that_do_not_add_up():
    with pytest.raises(ValueError, match="input of 4 channels to 8 filters; set pool=True"):
        ResidualUnit(8).init(jax.random.key(0), jnp.zeros((1, 8, 8, 4)))


def test_mini_model_refuses_an_input_that_pools_away():
    with pytest.raises(ValueError, match="input is 4x4, the least is 8x8"):
        MiniModel().init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))


def test_mini_model_drops_a_quarter_of_the_final_map_in_training_only():
    model = MiniModel(stage_sizes=(1,), num_filters=4)
    x = jnp.ones((1, 64, 64, 3))
    variables = model.init(jax.random.key(0), x)
    assert np.array_equal(model.apply(variables, x), model.apply(variables, x))
    _, state = model.apply(
        variables,
        x,
        True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
        rngs={"dropout": jax.random.key(1)},
    )
    dropped = state["intermediates"]["Dropout_0"]["__call__"][0]
    active = np.asarray(state["intermediates"]["final_norm"]["__call__"][0]) > 0
    assert np.mean(np.asarray(dropped)[active] == 0) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("model", [MiniModel(stage_sizes=(1, 1), num_filters=4), tiny_resnet()])
def test_bfloat16_computes_in_bfloat16_and_stores_float32(model, rng):
    x = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    half = model.clone(dtype="bfloat16")
    variables = half.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out, full = half.apply(variables, x), model.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), full, atol=0.1)
    assert np.max(np.abs(out.astype(np.float32) - full)) > 0
