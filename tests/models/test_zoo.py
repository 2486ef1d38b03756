"""The named networks: published sizes, and what ``load`` does with a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal, count_parameters, shapes_of

from experiments import plots
from flax_resnet.errors import UserError
from flax_resnet.models import (
    BottleneckBlock,
    PreActBasicBlock,
    PreActBottleneckBlock,
    ResNet,
    cifar_preact,
    cifar_resnet,
    create,
    highway_net,
    imagenet_resnet,
    names,
    replace_head,
    stack_blocks,
    summary,
    wide_resnet,
)
from flax_resnet.weights import load

IMAGENET, CIFAR = (224, 224, 3), (32, 32, 3)

# He et al., torchvision, timm (d, se) and Keras; ../shared/references.md has most of them.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet50_v1": 25_557_032,
    "resnet18_v2": 11_687_720,
    "resnet34_v2": 21_795_880,
    "resnet50_v2": 25_549_352,
    "resnet101_v2": 44_541_480,
    "resnet152_v2": 60_185_128,
    "resnet200_v2": 64_666_152,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnet50d": 25_576_264,
    "seresnet50": 28_088_024,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
    "wrn_28_10": 36_479_194,
    "mini": 4_368_714,
    "dropblock_resnet": 77_791_210,  # the CIFAR-100 tutorial's, added up by hand
}
KERAS_VALUES = {
    "ResNet50": 25_636_712,
    "ResNet101": 44_707_176,
    "ResNet152": 60_419_944,
    "ResNet50V2": 25_613_800,
    "ResNet101V2": 44_675_560,
    "ResNet152V2": 60_380_648,
}
PROJECTED = {20: 272_474, 32: 466_906, 44: 661_338, 56: 855_770, 110: 1_730_714}
# torchvision's table; resnet50_v1 and seresnet50 from Hu et al. 2018, table 2.
GMACS = {
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 4.089,
    "resnet101": 7.801,
    "resnet152": 11.514,
    "resnext50_32x4d": 4.23,
    "resnext101_32x8d": 16.414,
    "resnext101_64x4d": 15.46,
    "wide_resnet50_2": 11.398,
    "wide_resnet101_2": 22.753,
    "resnet50_v1": 3.86,
    "seresnet50_v1": 3.87,  # not a name: the paper's net strides where v1 does
}


def scanned(name):
    """The network by its name; a very deep one with its blocks scanned, to be traced soon."""
    module = create(name)
    deep = isinstance(module, ResNet) and sum(module.stage_sizes) > 50
    return module.clone(scan_blocks=True) if deep else module


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    shape = CIFAR if name in names()[names().index("resnet20") :] else IMAGENET
    assert count_parameters(scanned(name), shape) == PARAMETERS[name]


@pytest.mark.parametrize("name", KERAS_VALUES)
def test_keras_nets_hold_as_many_values_as_keras(name):
    shapes = shapes_of(scanned(name), IMAGENET)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == KERAS_VALUES[name]


@pytest.mark.parametrize("depth", PROJECTED)
def test_projecting_cifar_resnets_have_the_papers_parameters(depth):
    model = cifar_resnet(depth, shortcut="B", scan_blocks=True)
    assert count_parameters(model, CIFAR) == PROJECTED[depth]


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_are_the_published_ones(name):
    unnamed = {"seresnet50_v1": imagenet_resnet(50, "v1", se_reduction=16)}
    module = unnamed[name] if name in unnamed else create(name)
    assert summary.summarize(module, IMAGENET).macs / 1e9 == pytest.approx(GMACS[name], rel=0.01)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("plain34", 34), ("preresnet164", 164), ("highway19", 19), ("resnet50d", 52),
     ("seresnet50", 50), ("mini", 26), ("dropblock_resnet", 19), ("wrn_28_10", 26)],
)  # fmt: skip
def test_a_net_is_as_deep_as_its_name(name, layers):
    # A D-stem has three convolutions; WRN's 28 counts its projections (its paper, table 1).
    assert plots.depth(create(name)) == layers


def test_every_name_makes_a_network():
    assert len(set(names())) == len(names()) >= 60
    assert {create(name, num_classes=7).num_classes for name in names()} == {7}


def test_a_depth_is_cut_into_blocks_by_the_blocks_convolutions():
    assert cifar_resnet(110).stage_sizes == (18, 18, 18)
    assert cifar_resnet(110, block_cls=BottleneckBlock).stage_sizes == (12, 12, 12)
    for depth, block_cls, blocks in (
        (110, PreActBasicBlock, 18),
        (164, PreActBottleneckBlock, 18),
        (1001, PreActBottleneckBlock, 111),
    ):
        model = cifar_preact(depth)
        assert (model.block_cls, model.stage_sizes) == (block_cls, (blocks,) * 3)
    assert (cifar_preact(110).shortcut, model.shortcut, model.stride_conv) == ("A", "B", "1x1")
    assert cifar_preact(20, block_cls=PreActBottleneckBlock).stage_sizes == (2, 2, 2)
    assert highway_net(19).stage_sizes == (6, 6, 5)


def test_load_gives_a_network_and_its_variables():
    fields, shape = {"stage_sizes": (1, 1)}, {"input_shape": (8, 8, 1)}
    module, variables = load("resnet20", classes=5, **fields, **shape, dtype="bfloat16")
    assert module == create("resnet20").clone(num_classes=5, **fields, dtype="bfloat16")
    out = module.apply(variables, jnp.zeros((2, 8, 8, 1)))
    assert (out.shape, out.dtype) == ((2, 5), jnp.bfloat16)
    other = load("resnet20", num_classes=5, **fields, **shape, seed=1)[1]
    assert np.any(other["params"]["head"]["kernel"] != variables["params"]["head"]["kernel"])


def test_load_without_the_top_pools_as_it_is_told(rng):
    x = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    module, variables = load("resnet20", include_top=False)
    assert "head" not in variables["params"]
    maps = module.apply(variables, x)
    assert maps.shape == (2, 4, 4, 64)
    for pooling, pool in (("avg", np.mean), ("max", np.max)):
        module, _ = load("resnet20", include_top=False, pooling=pooling, weights=variables)
        np.testing.assert_allclose(
            module.apply(variables, x), pool(maps, axis=(1, 2)), rtol=1e-5, atol=1e-6
        )


def test_given_weights_are_the_variables(rng):
    small = {"num_classes": 3, "stage_sizes": (1, 3)}
    module, variables = load("resnet20", **small)
    assert_trees_equal(load("resnet20", **small, weights=variables)[1], variables)
    headless = load("resnet20", **small, include_top=False, weights=variables)[1]
    assert headless["params"].keys() == variables["params"].keys() - {"head"}
    stacked = load("resnet20", **small, weights=variables, scan_blocks=True)[1]
    assert_trees_equal(stacked, stack_blocks(module, variables))
    back = load("resnet20", **small, weights=stacked)[1]
    assert_trees_equal(back, variables)


@pytest.fixture(scope="module")
def resnet20():
    return load("resnet20")[1]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("resnet51", {}, r"network 'resnet51' is not known \(did you mean 'resnet5\d|18|01'\?\)"),
        ("ResNet152v2", {}, r"not known \(did you mean 'ResNet152V2'\?\); .* names lists them"),
        ("resnet18", {"shortcuts": "A"}, r"resnet18 has no field 'shortcuts' .*'shortcut'\?"),
        ("mini", {"input_shape": (7, 8, 3)}, "input is 7x8, the least for .* is 8x8: enl"),
        ("resnet18", {"input_shape": (224, 224)}, r"shape=\(224, 224\): expected height, width"),
        ("resnet18", {"classes": 5, "num_classes": 6}, "num_classes=6 and classes=5: give one"),
        ("resnet18", {"output_stride": 3}, r"output_stride=3: expected .* \[4, 8, 16, 32\]"),
        ("resnet18", {"frozen_stages": 5}, "frozen_stages=5: expected -1 to 4"),
        ("resnet18", {"stage_sizes": ()}, r"stage_sizes=\(\): expected one or more whole"),
        ("ResNet50V2", {"stage_sizes": (1, 2)}, "with stride_block='last' a stage needs 2 blocks"),
        ("resnet18", {"weights": 7}, "weights=7: expected None, a tag, a path, or variables"),
        ("resnet20", {"weights": "imagenet"}, "'resnet20' has no published weights"),
        ("resnet18", {"weights": "imagenot"}, "'imagenot' of resnet18 are not known"),
        ("resnet18", {"drop_path_rate": 1.0}, "drop_path_rate=1.0: expected 0 or more, below 1"),
        ("resnet18", {"groups": 32}, "BasicBlock with groups=32, .* expected 1 and 64"),
        ("resnet18", {"connection": "Residual"}, r"connection='Residual': .*mean 'residual'"),
        ("resnext50_32x4d", {"num_filters": 8}, "a convolution is left without channels"),
        ("resnet18", {"dtype": "float64"}, "dtype 'float64' needs 64-bit JAX: set JAX_ENABLE"),
        ("resnet18", {"input_shape": 32}, "input_shape=32: expected one or more whole numbers"),
        ("plain20", {"drop_path_rate": 0.1}, "drop_path_rate=0.1 with connection='plain'"),
        (50, {}, "network 50 is not known"),
        ("resnet18", {"block_cls": int}, "block_cls=.*int.*: expected a subclass of Block"),
    ],
)
def test_bad_input_is_one_line(name, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        load(name, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("resnet20", {"num_classes": 7}, "num_classes=7, the weights' head has 10: say num_cl"),
        ("resnet20", {"input_shape": (32, 32, 1)}, "has 1 channels, the weights' stem takes 3"),
        ("resnet32", {}, r"not this ResNet's: \d+ missing \(batch_stats/stage1_block4/norm1/"),
        ("resnet20", {"shortcut": "B"}, r"10 missing \(.*shortcut_norm/mean.*, and 2 more\)$"),
        ("resnet20", {"num_filters": 8}, r"of another shape \(batch_stats/stage1_block1/norm1/"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_one_line(resnet20, name, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        load(name, weights=resnet20, **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cifar_resnet(21), r"21 is not 6n \+ 2, .* BasicBlock make it; .* is: 20"),
        (lambda: cifar_resnet(32, block_cls=BottleneckBlock), r"32 is not 9n \+ 2, .* BottleneckB"),
        (lambda: cifar_preact(163), r"163 is not 9n \+ 2, .* PreActBottleneckBlock .*: 164"),
        (lambda: wide_resnet(27, 10), r"27 is not 6n \+ 4, .*: 28"),
        (lambda: highway_net(4), "depth 4: expected 5 or more"),
        (lambda: imagenet_resnet(51), "depth 51, .*: expected a depth of 18, 34, 50"),
        (lambda: imagenet_resnet(50, "v3"), "version 'v3': expected .* version of v1, v1.5, v2"),
    ],
)
def test_depths_that_do_not_fit_the_block_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_network_without_a_head_gets_one(resnet20):
    module, variables = replace_head(create("resnet20"), resnet20, num_classes=4)
    headless, bare = load("resnet20", include_top=False, weights=resnet20)
    again, full = replace_head(headless, bare, num_classes=4)
    assert again == module
    assert_trees_equal(full, variables)


def test_input_that_is_no_batch_of_images_is_refused(resnet20):
    with pytest.raises(UserError, match=r"shape \(32, 32, 3\): expected images \(N, H, W, C\)"):
        create("resnet20").apply(resnet20, jnp.zeros((32, 32, 3)))


def test_weights_are_cast_to_the_networks_dtype_and_must_be_floats(resnet20):
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), resnet20)
    assert {x.dtype for x in jax.tree.leaves(load("resnet20", weights=half)[1])} == {
        jnp.dtype("float32")
    }
    whole = jax.tree.map(lambda x: np.asarray(x, np.int32), resnet20)
    with pytest.raises(UserError, match="no floating-point array"):
        load("resnet20", weights=whole)
    with pytest.raises(UserError, match=r"no floating-point array: params/head/kernel$"):
        load("resnet20", weights={"params": {"head": {"kernel": [1, 2]}}})


@pytest.mark.slow
def test_stacked_weights_of_another_depth_are_refused():
    """Indexing past the end of a jax array repeats its last row."""
    for theirs, ours in (("resnet20", "resnet56"), ("resnet32", "resnet20")):
        _, variables = load(theirs, scan_blocks=True)
        with pytest.raises(UserError, match=r"stage1_blocks holds arrays .* another depth"):
            load(ours, weights=variables)


def test_a_seed_gives_the_same_weights_scanned_or_not():
    _, variables = load("resnet20", seed=3)
    module, stacked = load("resnet20", seed=3, scan_blocks=True)
    assert_trees_equal(stack_blocks(module, variables), stacked)


def test_sizes_may_be_lists_or_numpy():
    want = create("resnet20", stage_sizes=(1, 1))
    for sizes in ([1, 1], np.array([1, 1])):
        assert create("resnet20", stage_sizes=sizes) == want
        assert hash(create("resnet20", stage_sizes=sizes)) == hash(want)
