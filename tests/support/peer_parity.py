"""Our variables in the peers' networks, for tests that compare both."""

import jax
import numpy as np
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
