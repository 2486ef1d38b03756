"""What the tests of exports share: tiny networks of every family, nowhere at the identity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import tiny_resnet
from prediction_helpers import NAMES, SQUARE, apply

from flax_resnet import models
from flax_resnet.data.decode import Decoder
from flax_resnet.data.normalization import normalize
from flax_resnet.data.preprocess import KERAS_V1, Preprocessing
from flax_resnet.models import DropBlockResNet, MiniModel
from flax_resnet.weights import Pretrained

CIFAR = Preprocessing(size=16, resize=None, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
PHOTO = Preprocessing(size=32, resize=36, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
BGR = dataclasses.replace(KERAS_V1, size=32, mean=(0.4, 0.5, 0.6))
# As a run on the digits leaves it, a deviation for each pixel.
DIGITS = Preprocessing(
    size=8,
    resize=None,
    channels=1,
    mean=(0.3,),
    std=tuple(np.linspace(0.1, 0.4, 64)),
    decoder=Decoder(1),
)

named = functools.partial(models.create, num_classes=10, num_filters=8)
FAMILIES = {
    "imagenet stem": (named("resnet18", stage_sizes=(1, 1)), PHOTO),
    "v1": (named("resnet50_v1", stage_sizes=(1, 1)), PHOTO),
    "v1.5, scanned": (named("resnet50", stage_sizes=(3, 2), scan_blocks=True), PHOTO),
    "v2": (named("resnet50_v2", stage_sizes=(1, 2)), PHOTO),
    "Keras, blue first": (named("ResNet50V2", stage_sizes=(2, 2)), BGR),
    "option A": (named("resnet20", stage_sizes=(2, 2, 1)), CIFAR),
    "CIFAR v2": (named("preresnet110", stage_sizes=(1, 2)), CIFAR),
    "wide": (named("wrn_28_10", stage_sizes=(1, 1)), CIFAR),
    "plain": (named("plain20", stage_sizes=(1, 1)), CIFAR),
    "SE": (named("seresnet50", stage_sizes=(1, 1)), PHOTO),
    "ResNet-D, odd maps": (
        named("resnet50d", stage_sizes=(1, 2)),
        Preprocessing(size=37, resize=40, mean=(0.4,), std=(0.2, 0.3, 0.25)),
    ),
    "ResNeXt": (named("resnext50_32x4d", stage_sizes=(1, 1), num_filters=16), PHOTO),
    "dilated": (named("resnet50", stage_sizes=(1, 2, 2), output_stride=8), PHOTO),
    "hidden layers, biases": (
        tiny_resnet(hidden_units=(12,), norm_kind="none", stage_sizes=(1, 1)),
        CIFAR,
    ),
    "highway": (named("highway19"), CIFAR),
    "MiniModel of digits": (MiniModel(10, (1, 1), 8), DIGITS),
    "DropBlock": (DropBlockResNet(10), Preprocessing(size=32, resize=None, mean=(0.5,))),
    "remat, bfloat16": (tiny_resnet(dtype="bfloat16", remat=True), SQUARE),
}


def opened(module, prepared=SQUARE, class_names=NAMES):
    """Random weights and statistics of a network, as a weight file gives them."""
    unrolled = module.clone(scan_blocks=False) if hasattr(module, "scan_blocks") else module
    rng = np.random.default_rng(0)

    def draw(path, like):
        match path[-1].key:
            case "kernel":
                drawn = rng.normal(0, np.sqrt(2 / np.prod(like.shape[:-1])), like.shape)
            case "scale" | "var":
                drawn = rng.uniform(0.5, 1.5, like.shape)
            case _:
                drawn = rng.normal(0, 0.1, like.shape)
        return drawn.astype(like.dtype)

    images = jax.ShapeDtypeStruct((1, *prepared.shape), jnp.float32)
    shapes = models.variable_shapes(unrolled, images)
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return Pretrained(module, variables, prepared, class_names, certain=True)


def own_logits(source, images):
    """A network's logits on uint8 images, straight, in float32."""
    fields = {"dtype": "float32"}
    if hasattr(source.module, "scan_blocks"):
        fields["scan_blocks"] = False
    module = source.module.clone(**fields)
    return np.asarray(
        apply(module, source.variables, normalize(images, source.preprocessing.statistics()))
    )


def relative(got, want):
    """Largest difference, as a share of the largest value."""
    return np.max(np.abs(got - want)) / np.max(np.abs(want))


def batch(rng, source, n):
    """Images of noise as a network takes them."""
    return rng.integers(0, 256, (n, *source.preprocessing.shape), dtype=np.uint8)
