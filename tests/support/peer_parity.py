"""Our variables in the peers' networks, for tests that compare both."""

import jax
import numpy as np
from helpers import drawn
from parity_helpers import keras

KERAS_NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def named(variables):
    """{(layer's name with dots, leaf): value} of our variables."""
    return {
        (".".join(part.key for part in path[1:-1]), path[-1].key): np.asarray(value)
        for path, value in jax.tree_util.tree_leaves_with_path(variables)
    }


def load_keras(net, variables):
    for (layer, leaf), value in named(variables).items():
        its = net.get_layer(layer)
        norm = isinstance(its, keras.layers.BatchNormalization)
        getattr(its, KERAS_NORM[leaf] if norm else leaf).assign(value)


def perturbed(ours, images, rng):
    """Our variables, those that start at 0 and 1 too moved off their start."""
    return jax.tree.map(
        lambda x: np.asarray(x + 0.1 * rng.random(x.shape), np.float32), drawn(ours, images)
    )
