"""What tests of weight files share."""

import h5py
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from flax_resnet.models import variable_shapes
from flax_resnet.weights.keras_names import keras_name, layer_order
from flax_resnet.weights.writing import write_weights

# What timm 1.0 writes; the test size counts.
TIMM = {
    "tag": "a1_in1k",
    "input_size": [3, 224, 224],
    "test_input_size": [3, 288, 288],
    "interpolation": "bicubic",
    "crop_pct": 0.95,
    "test_crop_pct": 1.0,
    "crop_mode": "center",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "num_classes": 1000,
}


def random_variables(module, shape=(64, 64, 3)):
    """Positive noise in the shapes of a network's variables."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: rng.uniform(0.5, 1.5, s.shape).astype(s.dtype), variable_shapes(module, images)
    )


SMALL = {"num_filters": 8, "num_classes": 7}


def saved(tmp_path, module, **options):
    """(the file of a network with random variables, these)."""
    variables = random_variables(module)
    path = tmp_path / "net.safetensors"
    write_weights(path, module, variables, **options)
    return path, variables


def without_description(path):
    """The same tensors, as torch would have written them."""
    save_file(load_file(path), path)
    return path


KERAS_WEIGHTS = {
    "conv": ("kernel", "bias"),
    "bn": ("gamma", "beta", "moving_mean", "moving_variance"),
}


def keras_h5(path, module, variables, rename=lambda layer: layer, below="/"):
    """The layout of the published files: layer_names, weight_names."""
    layers = {}
    for variable, value in flatten_dict(variables).items():
        layer, position = keras_name(module, variable).split("/")
        layers.setdefault(layer, {})[int(position)] = value
    order = [layer for layer in layer_order(module.stage_sizes, "v1") if layer in layers]
    order += [layer for layer in layers if layer not in order]
    with h5py.File(path, "w") as file:
        root = file.require_group(below)
        root.attrs["layer_names"] = [rename(layer).encode() for layer in ("input_1", *order)]
        root.create_group(rename("input_1")).attrs["weight_names"] = np.array([], "S1")
        for layer in order:
            group = root.create_group(rename(layer))
            kinds = KERAS_WEIGHTS["bn" if layer.endswith("bn") else "conv"]
            names = [f"{rename(layer)}/{kinds[i]}:0" for i in sorted(layers[layer])]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for i, name in enumerate(names):
                group.create_dataset(name, data=layers[layer][i])
    return path
