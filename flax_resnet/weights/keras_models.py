"""What a ``.keras`` file says beside its weights: the model's layers, and how it takes images."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError, is_number
from flax_resnet.weights.keras_names import ALONE

# Layers of a ResNet with a dense head, and those that preprocess_input makes.
_KNOWN = {"Functional", "Sequential", "InputLayer", "Conv2D", "BatchNormalization", "Add",
          "ZeroPadding2D", "MaxPooling2D", "GlobalAveragePooling2D", "Flatten", "Dense", "ReLU",
          "Activation", "Softmax", "Dropout", "Rescaling",
          "GetItem", "Stack", "BiasAdd", "SlicingOpLambda", "TFOpLambda"}  # fmt: skip
# Beginnings of the classes of layers that change nothing in evaluation.
_TRAINING_ONLY = ("Random", "Gaussian", "SpatialDropout")
_ACTIVATIONS = {None, "relu", "linear", "softmax", "sigmoid"}


def described(config: str, usual: Preprocessing) -> tuple[Preprocessing, tuple[str, ...]]:
    """How the model of a config.json takes images, and what it computes that is left out.

    Args:
      config: the text of the file.
      usual: how images are prepared for Keras's own weights of this network.

    Returns:
      (preprocessing, notes); without a Rescaling layer the first is ``usual`` at the model's size.
      UserError where the model computes more than a ResNet with a dense head.
    """
    try:
        layers = list(_layers(json.loads(config)))
        shape = next(layer["batch_shape"] for kind, layer in layers if kind == "InputLayer")
        other = [f"{layer['name']} ({kind})" for kind, layer in layers if not _fits(kind, layer)]
        other += _other_hidden(layers)
        if not any(layer["name"] == "conv2_block1_1_conv" for _, layer in layers):
            other = ["no layer conv2_block1_1_conv"]
        scales = [(layer["scale"], layer["offset"]) for k, layer in layers if k == "Rescaling"]
        if scales[1:]:
            other.append(f"{len(scales)} layers Rescaling")
    except Exception as error:  # a config of anyone's may fail in any way
        raise UserError(f"its config.json is not a Keras model's ({error!r:.200})") from error
    if other:
        raise UserError(
            f"the model has {', '.join(other[:8]):.300}: expected a ResNet of keras.applications, "
            f"its global average, and dense layers with ReLU; {ALONE}"
        )
    sigmoid = any(layer.get("activation") == "sigmoid" for _, layer in layers)
    notes = ("its last sigmoid is left out: probabilities here are a softmax",) if sigmoid else ()
    if shape[1] == shape[2] and isinstance(shape[1], int):
        usual = dataclasses.replace(usual, size=shape[1])
    for scale, offset in scales:  # x scale + offset, of x from 0 to 255
        std = 1 / (255 * scale)
        usual = dataclasses.replace(usual, mean=(-offset * std,), std=(std,) * 3, bgr=False)
    return usual, notes


def _layers(model: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(class, config) of every layer, those of the networks inside it in their place."""
    for layer in model["config"]["layers"]:
        yield layer["class_name"], {"name": "", **layer["config"]}
        if "layers" in layer["config"]:
            yield from _layers(layer)


def _fits(kind: str, layer: Mapping[str, Any]) -> bool:
    if kind == "Rescaling":
        return is_number(layer["scale"]) and is_number(layer["offset"]) and layer["scale"] > 0
    known = kind in _KNOWN or kind.startswith(_TRAINING_ONLY)
    return known and layer.get("activation") in _ACTIVATIONS


def _other_hidden(layers: list[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Dense layers before the last that have no ReLU, of their own or as the next layer."""
    dense = [i for i, (kind, _) in enumerate(layers) if kind == "Dense"]
    found = []
    for i in dense[:-1]:
        (_, layer), (kind, after) = layers[i], layers[i + 1]
        is_relu = kind == "ReLU" or (kind, after.get("activation")) == ("Activation", "relu")
        if layer["activation"] != "relu" and (layer["activation"] != "linear" or not is_relu):
            found.append(f"{layer['name']} (Dense without ReLU before another)")
    return found
