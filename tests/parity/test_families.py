"""Every family of residual network equals its reference in Keras or torch, block by block.

Each network gets random weights and statistics, in evaluation and in training mode. Compared
are the whole network (every block's output on the way, the logits, the updated statistics) and
each block by itself, fed with what the reference's own block before it gave.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_helpers import assert_close, channels_first, keras, torch
from parity_references import (
    R18,
    R50,
    R101,
    R152,
    KerasReference,
    Spec,
    TorchReference,
    random_variables,
)

from flax_resnet.models import Block, create

# Not square, and odd at strides 8 and 16. The last map, 3x2, has 12 values a channel in a batch
# of 2: enough that batch statistics blow no rounding error up.
OPTIMIZED = True
IMAGES = (2, 72, 64, 3)


def images(rng, shape=IMAGES):
    return rng.normal(size=shape).astype(np.float32)


def size(tree):
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def check_state(reference, batch_stats, train, what):
    for name, value in reference.names({"batch_stats": batch_stats}).items():
        assert_close(value, reference.state[name], what=f"{name} of {what}, train={train}")


def check_network(module, variables, reference, x, train):
    """The whole network, then each block by itself.

    Args:
      module: ours.
      variables: its variables.
      reference: has ``run(x, train)``, which gives {"stem", our names of blocks, "logits": output}
        and leaves the updated statistics in ``state``; ``names(variables)`` of ours are {name
        there: array}.
      x: images.
      train: of both.
    """
    outputs = reference.run(x, train)
    logits, new = module.apply(
        variables,
        x,
        train,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda m, method: isinstance(m, Block) and method == "__call__",
    )
    assert outputs.keys() == new["intermediates"].keys() | {"stem", "logits"}
    for name, found in new["intermediates"].items():
        assert_close(found["__call__"][0], outputs[name], what=f"{name} on the way, train={train}")
    assert_close(logits, outputs["logits"], what=f"logits, train={train}")
    check_state(reference, new["batch_stats"], train, "the whole")

    given = outputs["stem"]
    for stage, blocks in enumerate(module.stage_sizes):
        for index in range(blocks):
            block = module.block(stage, index)
            name = block.name
            own = {kind: variables[kind][name] for kind in ("params", "batch_stats")}
            got, new = block.apply(own, given, train, mutable=["batch_stats"])
            assert_close(got, outputs[name], what=f"{name}, train={train}")
            check_state(reference, {name: new["batch_stats"]}, train, "a block by itself")
            given = outputs[name]


# --- keras.applications -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("ResNet50", 25_636_712),
        ("ResNet101", 44_707_176),
        ("ResNet152", 60_419_944),
        ("ResNet50V2", 25_613_800),
        ("ResNet101V2", 44_675_560),
        ("ResNet152V2", 60_380_648),
    ],
)
def test_keras_applications(rng, name, total):
    module, x = create(name), images(rng)
    variables = random_variables(module, x, rng)
    reference = KerasReference(name, variables, x.shape)
    assert size(variables) == reference.model.count_params() == total
    for layer in reference.model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            constants = (layer.momentum, layer.epsilon)
            assert constants == (module.bn_momentum, module.bn_epsilon)
    for train in (False, True):
        check_network(module, variables, reference, x, train)


# --- torch, in torchvision's names ------------------------------------------------------------


def torch_pair(module, spec, rng, shape=IMAGES):
    """(variables, the same network in torch, images)."""
    x = images(rng, shape)
    variables = random_variables(module, x, rng)
    return variables, TorchReference(spec, variables), x


@pytest.mark.parametrize(
    ("name", "spec", "total"),
    [
        ("resnet18", Spec(False, R18), 11_689_512),
        ("resnet34", Spec(False, R50), 21_797_672),
        ("resnet50", Spec(True, R50), 25_557_032),
        ("resnet101", Spec(True, R101), 44_549_160),
        ("resnet152", Spec(True, R152), 60_192_808),
        ("resnext50_32x4d", Spec(True, R50, groups=32, width=4), 25_028_904),
        ("resnext101_32x8d", Spec(True, R101, groups=32, width=8), 88_791_336),
        ("resnext101_64x4d", Spec(True, R101, groups=64, width=4), 83_455_272),
        ("wide_resnet50_2", Spec(True, R50, width=128), 68_883_240),
        ("wide_resnet101_2", Spec(True, R101, width=128), 126_886_696),
    ],
)
def test_torchvision(rng, name, spec, total):
    module = create(name)
    variables, reference, x = torch_pair(module, spec, rng)
    assert size(variables["params"]) == total
    for train in (False, True):
        check_network(module, variables, reference, x, train)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("resnet50_v1", Spec(True, R50, early=True)),
        ("resnet50d", Spec(True, R50, stem="deep", shortcut="D")),
        ("seresnet50", Spec(True, R50, squeeze=True)),
        ("resnet18_v2", Spec(False, R18, preact=True)),
        ("resnet50_v2", Spec(True, R50, preact=True)),
    ],
)
def test_variants(rng, name, spec):
    module = create(name)
    variables, reference, x = torch_pair(module, spec, rng)
    for train in (False, True):
        check_network(module, variables, reference, x, train)


@pytest.mark.parametrize(
    ("output_stride", "dilate", "strides"),
    [
        (16, (False, False, False, True), (4, 8, 16, 16)),
        (8, (False, False, True, True), (4, 8, 8, 8)),
    ],
)
def test_dilation_in_place_of_strides(rng, output_stride, dilate, strides):
    module = create("resnet50", output_stride=output_stride)
    variables, reference, x = torch_pair(module, Spec(True, R50, dilate=dilate), rng)
    for train in (False, True):
        check_network(module, variables, reference, x, train)
    found, _ = module.apply(variables, x, True, mutable=["batch_stats"], method="features")
    outputs = reference.run(x, True)
    assert tuple(feature.stride for feature in found) == strides
    for stage, feature in enumerate(found):
        assert_close(feature.map, outputs[f"stage{stage + 1}_block{R50[stage]}"], what=feature.name)


def small(name, spec):
    """(ours, the spec, shape of images): two stages of few filters, the first of 9x8 maps."""
    spec = spec._replace(sizes=(1, 2), classes=10)
    module = create(name, stage_sizes=spec.sizes, num_filters=spec.filters, num_classes=10)
    return module, spec, (4, 9, 8, 3) if spec.stem == "cifar" else (4, 36, 32, 3)


CIFAR = [
    ("resnet20", Spec(False, (), 8, stem="cifar", shortcut="A")),
    ("preresnet110", Spec(False, (), 8, stem="cifar", shortcut="A", preact=True)),
    ("preresnet164", Spec(True, (), 8, stem="cifar", preact=True, early=True)),
    ("wrn_16_4", Spec(False, (), 32, stem="cifar", stem_filters=16, preact=True)),
]


@pytest.mark.parametrize(("shortcut", "total"), [("A", 269_722), ("B", 272_474)])
def test_cifar_resnet_20(rng, shortcut, total):
    spec = Spec(False, (3, 3, 3), 16, shortcut=shortcut, stem="cifar", classes=10)
    module = create("resnet20", shortcut=shortcut)
    variables, reference, x = torch_pair(module, spec, rng, (8, 32, 32, 3))
    assert size(variables["params"]) == total
    for train in (False, True):
        check_network(module, variables, reference, x, train)


@pytest.mark.parametrize(("name", "spec"), CIFAR)
def test_cifar_families(rng, name, spec):
    module, spec, shape = small(name, spec)
    variables, reference, x = torch_pair(module, spec, rng, shape)
    for train in (False, True):
        check_network(module, variables, reference, x, train)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *CIFAR,
        ("resnet18", Spec(False, (), 8)),
        ("resnet50", Spec(True, (), 8)),
        ("resnet50_v1", Spec(True, (), 8, early=True)),
        ("resnet18_v2", Spec(False, (), 8, preact=True)),
        ("resnet50_v2", Spec(True, (), 8, preact=True)),
        ("resnet50d", Spec(True, (), 8, stem="deep", shortcut="D")),
        ("seresnet50", Spec(True, (), 8, squeeze=True)),
        ("resnext50_32x4d", Spec(True, (), 16, groups=32, width=4)),
    ],
)
def test_gradients(rng, name, spec):
    """In float64: a ReLU that a rounding error of float32 switches is more than 1e-4."""
    module, spec, shape = small(name, spec)
    variables, reference, x = torch_pair(module, spec, rng, shape)
    weight = rng.normal(size=(len(x), 10))
    theirs = reference.model.double().train()
    (theirs(channels_first(x).double())["logits"] * torch.tensor(weight)).sum().backward()
    with jax.enable_x64(True):
        exact = module.clone(dtype="float64", param_dtype="float64")
        given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)

        def loss(params):
            logits, _ = exact.apply(
                given | {"params": params}, np.float64(x), True, mutable=["batch_stats"]
            )
            return (logits * weight).sum()

        grads = reference.names({"params": jax.grad(loss)(given["params"])})
    for key, parameter in theirs.named_parameters():
        assert_close(grads[key], parameter.grad, rtol=1e-9, what=f"gradient of {key}")
