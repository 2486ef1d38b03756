"""What the tests of predict, evaluate and convert share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny_resnet
from PIL import Image

from flax_resnet import models
from flax_resnet.data.normalization import normalize
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.weights import open_weights, write_weights

SQUARE = Preprocessing(size=8, resize=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
NAMES = tuple(f"name {i}" for i in range(10))


def make_weights(path, preprocessing=SQUARE, class_names=NAMES, channels=3, **fields):
    """Writes a tiny network whose classes differ; returns it and its variables."""
    module = tiny_resnet(**fields)
    images, rng = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32), np.random.default_rng(0)

    def draw(path, like):
        """No initialiser: none has to be compiled."""
        if path[-1].key == "kernel":
            return rng.normal(0, 0.3, like.shape).astype(like.dtype)
        return np.full(like.shape, path[-1].key in ("scale", "var"), like.dtype)

    variables = jax.tree_util.tree_map_with_path(draw, models.variable_shapes(module, images))
    write_weights(
        path, module, variables, preprocessing=preprocessing, class_names=class_names,
        input_shape=(8, 8, channels),
    )  # fmt: skip
    return module, variables


def paint(rng, height, width):
    """A noisy image of one colour: means differ more from image to image than those of noise."""
    noise = rng.normal(0, 40, (height, width, 3))
    return Image.fromarray(np.clip(rng.uniform(0, 255, 3) + noise, 0, 255).astype(np.uint8))


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, images):
    """Compiled as a whole: one operation at a time takes longer."""
    return module.apply(variables, images)


def probabilities(opened, paths):
    """What the network says of files, computed straight."""
    prepared = opened.preprocessing
    pixels = np.stack([prepared(path.read_bytes()) for path in paths])
    logits = apply(opened.module, opened.variables, normalize(pixels, prepared.statistics()))
    return np.asarray(jax.nn.softmax(logits))


def damaged(weights):
    """A copy of a weight file, its head's biases no numbers."""
    opened, path = open_weights(weights), weights.with_name("damaged.safetensors")
    variables = jax.tree.map(np.copy, opened.variables)
    variables["params"]["head"]["bias"][:] = np.nan
    write_weights(path, opened.module, variables, preprocessing=SQUARE)
    return path
