"""The names and layouts that files give the variables of a network."""

from __future__ import annotations

import functools

from flax import linen as nn

from flax_resnet import models
from flax_resnet.models import ResNet
from flax_resnet.weights import keras_names, torch_names

METADATA_KEY = "flax_resnet"
"""Key of the metadata in which ``write_weights`` describes the network."""


def naming_of(module: nn.Module, keras: bool = False) -> models.Naming:
    """How files name and lay out a network's variables; one that is no ResNet has its own names."""
    if not isinstance(module, ResNet):
        return models.Naming(".".join)
    if keras:
        return models.Naming(functools.partial(keras_names.keras_name, module))
    name = functools.partial(torch_names.torch_name, module)
    return models.Naming(name, torch_names.from_torch, torch_names.to_torch)
