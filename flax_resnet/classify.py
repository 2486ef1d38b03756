"""What predict, evaluate and convert share: weights opened by flags, a network on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from flax_resnet import models
from flax_resnet.errors import UserError, check_range
from flax_resnet.models import ResNet
from flax_resnet.preprocess import Preprocessing
from flax_resnet.records.files import replacing
from flax_resnet.weights import Pretrained, check_same, image_shape, open_weights
from flax_resnet.weights.imagenet_classes import class_name

FLAGS = "--size, --resize, --interpolation, --mean and --std"
OWN = "the weights' own"


def flag(metavar: str, default: str = "") -> Any:
    """How --help shows a flag."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default and f"(default: {default})")


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
class PreparedFlags:
    """Which network, and how its images are prepared.

    Of a run, size, resize and interpolation take the place of how its data were decoded.
    """

    model: Annotated[str | None, flag("NAME")] = None
    """Network, one that the command "names" lists; a tag needs it, else it is inferred."""
    size: Annotated[int | None, flag("PIXELS", OWN)] = None
    """Height and width of what the network sees."""
    resize: Annotated[int | None, flag("PIXELS", OWN)] = None
    """Shorter side before the centre crop; 0 squeezes the whole image to --size."""
    interpolation: Annotated[
        Literal["nearest", "bilinear", "bicubic"] | None, flag("{nearest,bilinear,bicubic}", OWN)
    ] = None
    """Interpolation used when resizing."""
    mean: Annotated[tuple[float, ...] | None, flag("X [X ...]", OWN)] = None
    """Subtracted from pixels scaled to 0..1: one number, or one for each channel of the network."""
    std: Annotated[tuple[float, ...] | None, flag("X [X ...]", OWN)] = None
    """Divisor after that: one number, or one for each channel of the network."""

    def __post_init__(self) -> None:
        check_range("--size", self.size, 1)
        check_range("--resize", self.resize, 0)

    def open(self, weights: str) -> Pretrained:
        """A network with weights, and their preprocessing changed as the flags say."""
        opened = open_network(weights, self.model)
        return dataclasses.replace(opened, preprocessing=self._prepared(opened, weights))

    def _prepared(self, opened: Pretrained, weights: str) -> Preprocessing | None:
        names = ("size", "resize", "interpolation", "mean", "std")
        given: dict[str, Any] = {n: v for n in names if (v := getattr(self, n)) is not None}
        channels, old = opened.input_shape[2], opened.preprocessing
        if not given:
            return old
        if given.get("resize") == 0:
            given["resize"] = None
        if len(given.get("std", ())) == 1:
            given["std"] *= channels
        if old is None:
            if missing := [f"--{name}" for name in ("size", "mean", "std") if name not in given]:
                raise UserError(
                    f"{weights} does not say how images are prepared for it: give "
                    f"{' and '.join(missing)} too"
                )
            old = Preprocessing(1, None, channels=channels, mean=(0.0,), std=(1.0,) * channels)
        elif given.keys() & {"size", "resize", "interpolation"}:
            given["decoder"] = None
        try:
            return dataclasses.replace(old, **given)
        except UserError as error:
            raise UserError(f"{error}; the flags are {FLAGS} (--resize 0: None)") from None


@dataclasses.dataclass(frozen=True)
class WeightFlags(PreparedFlags):
    """Which weights classify."""

    weights: Annotated[str, flag("TAG|PATH", "imagenet")] = "imagenet"
    """A tag such as "imagenet" or "tv_v2", a weight file, a run's working directory, or
    hf://OWNER/NAME[@REVISION] of the Hugging Face hub."""


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


@contextlib.contextmanager
def writing(output: str | None) -> Iterator[TextIO]:
    """The standard output, or a file that is written whole or not at all."""
    if output is None:
        yield sys.stdout
        return
    path = Path(output).expanduser()
    if path.is_dir():
        raise UserError(f"--output {output} is a directory: name a file")
    try:
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            yield file
    except OSError as error:
        why = error.strerror or error  # not the name of the unfinished file
        raise UserError(f"--output {output} cannot be written: {why}") from error
