"""What predict, evaluate and export share: weights opened, and a network on the device."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_resnet import models
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet
from flax_resnet.weights import Pretrained, check_same, image_shape, open_weights
from flax_resnet.weights.imagenet import class_name

FLAGS = "--size, --resize, --interpolation, --mean and --std"


def open_network(weights: str | Path, model: str | None = None) -> Pretrained:
    """Weights with their network; weights of another network than ``model`` are a UserError.

    Args:
      weights: a tag, a weight file, a run's working directory or hf://OWNER/NAME[@REVISION].
      model: a name of ``names()``, which a tag needs; of others the network is inferred.
    """
    if model is None:
        return open_weights(weights)
    named = models.create(model)
    opened = open_weights(weights, model)
    if opened.network is not None:
        return opened
    kept = ("num_classes", "include_top", "pooling")
    both = [name for name in kept if hasattr(opened.module, name) and hasattr(named, name)]
    named = named.clone(**{name: getattr(opened.module, name) for name in both})
    check_same(opened, named, model)
    if opened.certain:
        return opened
    shape = image_shape(named, opened.variables)
    want = models.variable_shapes(named, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    variables = models.match_variables(named, want, opened.variables)
    return dataclasses.replace(opened, module=named, variables=variables)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network on the device, with what its images go through before."""

    module: nn.Module
    variables: Any
    stats: Any
    preprocessing: Preprocessing
    num_classes: int
    class_names: tuple[str, ...] | None

    @classmethod
    def of(cls, opened: Pretrained) -> Classifier:
        """Puts weights on the device; those that give no logits for an image are a UserError."""
        prepared, module = opened.preprocessing, opened.module
        if prepared is None:
            raise UserError(
                "the weights do not say how images are prepared for them: give --size, --mean and "
                f"--std (the flags are {FLAGS}; in Python Pretrained.preprocessing)"
            )
        if isinstance(module, ResNet):
            module = module.clone(scan_blocks=False)  # opened variables are not stacked
        stats = prepared.statistics()
        decoder = prepared.decoder
        if decoder is not None and decoder.size is None:
            # A run on images of one size decodes them as they are; others have to get that size.
            decoder = dataclasses.replace(decoder, size=prepared.size - 2 * decoder.pad)
            prepared = dataclasses.replace(prepared, decoder=decoder)
        images = jax.ShapeDtypeStruct((1, *prepared.shape), jnp.float32)
        try:
            out = jax.eval_shape(functools.partial(module.apply, opened.variables), images)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise UserError(
                f"the network does not take images of {images.shape[1:]}: {error}"
            ) from error
        shape: tuple[int, ...] = getattr(out, "shape", ())
        if len(shape) != 2 or not getattr(module, "include_top", True):
            raise UserError(
                "the network has no head and gives no classes: take weights that have one "
                "(include_top=True)"
            )
        variables, stats = jax.device_put((opened.variables, stats))
        return cls(module, variables, stats, prepared, shape[1], opened.class_names)

    def name(self, index: int) -> str:
        """What to call a class."""
        return class_name(self.class_names, index)


def not_finite(what: str = "the network's outputs") -> UserError:
    """The error of outputs (``what``, in the plural) that are not finite."""
    return UserError(
        f"{what} are not finite: the weights are damaged, or --mean and --std are not theirs"
    )


def padded(values: Any, size: int) -> np.ndarray:
    """Arrays of one shape, or an array, as a batch of ``size``: the last ones are zeros."""
    batch = np.asarray(values)
    return np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
