"""The networks of benchmarks.peers in Keras and torch are ours: sizes, outputs, a step of each."""

import math

import jax
import numpy as np
import pytest
from helpers import noisy, shapes_of
from parity_helpers import assert_close, channels_first, torch, torch_layout
from peer_helpers import SIDE, SMALL
from peer_parity import load_keras, named

from experiments.benchmarks.peers import keras_nets, specs, torch_nets
from flax_resnet import models

OPTIMIZED = True


def sizes(tree):
    return [math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", specs.NETWORKS)
def test_the_networks_are_as_large_as_ours(name):
    network = specs.NETWORKS[name]
    ours = shapes_of(models.create(name), (network.image_size, network.image_size, 3))
    with torch.device("meta"):
        in_torch = torch_nets.build(network.spec, network.image_size)

    def in_keras():
        net = keras_nets.build(network.spec, network.image_size)
        return [variable.value for variable in net.trainable_variables]

    # Traced, so that no initial value is computed.
    for theirs in (list(in_torch.parameters()), jax.eval_shape(in_keras)):
        assert sorted(sizes(theirs)) == sorted(sizes(ours["params"]))


def load_torch(net, variables):
    state = {}
    for (layer, leaf), value in named(variables).items():
        name, value = torch_layout(leaf, value)
        state[f"{layer}.{name}"] = torch.tensor(value)
    if "dense1.weight" in state:  # torch flattens channels first
        weight = state["dense1.weight"]
        last = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)][-1]
        side = math.isqrt(weight.shape[1] // last.out_channels)
        maps = weight.reshape(-1, side, side, last.out_channels)
        state["dense1.weight"] = maps.permute(0, 3, 1, 2).reshape(weight.shape)
    missing = net.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches_tracked" in name for name in missing.missing_keys)


@pytest.mark.parametrize("kind", SMALL)
def test_the_networks_compute_what_ours_do(kind, rng):
    spec, ours = SMALL[kind]
    images = rng.normal(size=(4, SIDE, SIDE, 3)).astype(np.float32)
    variables = noisy(ours, images)
    in_torch, in_keras = torch_nets.build(spec, SIDE), keras_nets.build(spec, SIDE)
    load_torch(in_torch, variables)
    load_keras(in_keras, variables)
    for train in (False, True):
        want, _ = ours.apply(
            variables, images, train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
        )
        with torch.no_grad():
            got = in_torch.train(train)(channels_first(images)).numpy()
        assert_close(got, want, what=f"torch, train={train}")
        assert_close(in_keras(images, training=train), want, what=f"Keras, train={train}")


def test_drop_block_drops_as_much_in_each():
    ones = np.ones((64, 16, 16, 4), np.float32)
    in_torch = torch_nets.drop_block(channels_first(ones), 0.2, 5).numpy()
    in_keras = np.asarray(keras_nets.DropBlock(0.2, 5)(ones, training=True))
    for kept in (in_torch, in_keras):
        assert np.mean(kept == 0) == pytest.approx(0.18, abs=0.03)
        assert np.mean(kept) == pytest.approx(1, abs=1e-3)
