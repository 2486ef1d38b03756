"""Weights opened with their network, and images classified by them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from flax_resnet import models
from flax_resnet.data.decode import DECODE_ERRORS, reason
from flax_resnet.data.folders import find_images
from flax_resnet.data.normalization import normalize
from flax_resnet.data.order import ahead
from flax_resnet.errors import UserError, check_range
from flax_resnet.inference.prediction import (
    OnError,
    Prediction,
    encoded,
    every_image,
    image_title,
    is_one_image,
    is_path,
)
from flax_resnet.models import ResNet
from flax_resnet.training import metrics
from flax_resnet.weights import Pretrained, check_same, image_shape, open_weights
from flax_resnet.weights.imagenet import class_name
from flax_resnet.xla import backend

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


class Classifier:
    """A trained network that names what is in images: the way into a program or a service.

    It runs on the first device; threads may share one. On a CPU each image is computed by itself:
    it gets the same bits alone, among others and from ``flax-resnet predict``, and nothing is
    compiled after the first call. Accelerators take batches of 1, 8 or ``batch_size`` images, the
    last ones padded, and compile once for each.

    Attributes:
      preprocessing: what an image goes through before.
      class_names: name of each class, where they are known.
      num_classes: how many the network tells apart.
    """

    def __init__(
        self, weights: str | Path | Pretrained, model: str | None = None, *, batch_size: int = 32
    ):
        """Opens weights and puts them on the device.

        Args:
          weights: a run's working directory (its best checkpoint), a weight file, a tag,
            "hf://OWNER/NAME[@REVISION]", or opened weights.
          model: a name of ``names()``, which a tag needs.
          batch_size: most images in one step of an accelerator.

        Raises:
          UserError: weights that cannot be had, or give no classes of an image.
        """
        check_range("batch_size", batch_size, 1)
        opened = weights if isinstance(weights, Pretrained) else open_network(weights, model)
        prepared, module = opened.preprocessing, opened.module
        if prepared is None:
            raise unprepared("the network")
        if isinstance(module, ResNet):
            module = module.clone(scan_blocks=False)  # opened variables are not stacked
        decoder = prepared.decoder
        if decoder is not None and decoder.size is None:
            # A run on images of one size decodes them as they are; others have to get that size.
            decoder = dataclasses.replace(decoder, size=prepared.size - 2 * decoder.pad)
            prepared = dataclasses.replace(prepared, decoder=decoder)
        self.module, self.preprocessing = module, prepared
        self.num_classes = _num_classes(module, opened.variables, prepared.shape)
        self.class_names = opened.class_names
        stats = prepared.statistics()
        self.variables, self.stats = jax.device_put((opened.variables, stats))
        self.batch_sizes = [1] if backend.is_cpu() else sorted({1, min(8, batch_size), batch_size})

    def __call__(self, images: Any, *, top: int = 5) -> Prediction | list[Prediction]:
        """The most probable classes of images.

        Args:
          images: one image or several, each a path, the bytes of an image file, a PIL image, or an
            array, uint8 or floats of 0 to 1, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). A folder
            stands for the image files in and below it, an array (N, H, W, C) for N images.
          top: how many classes an image; at most all.

        Returns:
          A Prediction of one image; a list of them, in order, of several.

        Raises:
          UserError: an image that cannot be read, or outputs that are not finite.
        """
        check_range("top", top, 1)
        one = is_one_image(images)
        predictions = list(self.predictions(every_image([images] if one else images), top))
        return predictions[0] if one else predictions

    def predictions(
        self, images: Iterable[Any], top: int, on_error: OnError | None = None
    ) -> Iterator[Prediction]:
        """Predictions of images, in order, while later images are still decoded.

        ``on_error`` is called with an image that cannot be read and why, and the image is skipped;
        without it the first such image ends it all.
        """
        decoded = self._decoded(images, on_error)
        groups = iter(lambda: list(itertools.islice(decoded, self.batch_sizes[-1])), [])

        def step(group: Sequence[tuple[Any, np.ndarray]]) -> Any:
            size = next(size for size in self.batch_sizes if size >= len(group))
            return self.outputs(padded([pixels for _, pixels in group], size))

        for group, outputs in metrics.outputs(step, groups):
            # The last batch may be padded: zip leaves its padding out.
            for (image, _), logits, shares in zip(group, *outputs, strict=False):
                if not np.isfinite(shares).all():
                    raise not_finite(f"the network's outputs for {image_title(image)}")
                classes = tuple(np.argsort(-logits, kind="stable")[:top].tolist())
                yield Prediction(
                    Path(image) if is_path(image) else None,
                    classes,
                    tuple(class_name(self.class_names, index) for index in classes),
                    tuple(shares[list(classes)].tolist()),
                )

    def prepare(self, image: Any) -> np.ndarray:
        """An image as the network takes it: uint8 (H, W, C), not normalised."""
        return self.preprocessing(encoded(image))

    def outputs(self, images: Any) -> tuple[jax.Array, jax.Array]:
        """Logits and probabilities, (N, classes) each, of prepared images (N, H, W, C)."""
        return _outputs(self.module, self.variables, self.stats, images)

    def _decoded(
        self, images: Iterable[Any], on_error: OnError | None
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """The images that can be read, two batches of an accelerator decoded ahead."""
        work = ahead(self.prepare, images, 2 * max(32, self.batch_sizes[-1]))
        for number, (image, pixels) in enumerate(work, 1):
            try:
                yield image, pixels.result()
            except DECODE_ERRORS as error:
                if on_error is None:
                    what = f"unreadable image {number}, {image_title(image)}"
                    raise UserError(f"{what} ({reason(error)})") from error
                on_error(image, error)


def predict_images(
    opened: Pretrained,
    paths: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    on_error: OnError | None = None,
) -> Iterator[Prediction]:
    """The most probable classes of image files, as ``Classifier`` gives them, one by one.

    Args:
      opened: a network with its weights, as ``open_weights`` gives it.
      paths: image files, and folders of them.
      top, batch_size: as of ``Classifier``.
      on_error: called with an image that cannot be read and why, and the image is skipped; by
        default the first such image ends it all.

    Raises:
      UserError: a path that is not there, weights that cannot classify, or, from the iterator,
        an image that cannot be read or outputs that are not finite.
    """
    check_range("top", top, 1)
    files = find_images(paths)
    return Classifier(opened, batch_size=batch_size).predictions(files, top, on_error)


@functools.partial(jax.jit, static_argnames="module")
def _outputs(
    module: nn.Module, variables: Any, stats: Any, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits: Any = module.apply(variables, normalize(images, stats))
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits, jax.nn.softmax(logits)


def _num_classes(module: nn.Module, variables: Any, shape: tuple[int, ...]) -> int:
    """The network's outputs; a network that gives no logits for an image is a UserError."""
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        out = jax.eval_shape(functools.partial(module.apply, variables), images)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"the network does not take images of {shape}: {error}") from error
    logits: tuple[int, ...] = getattr(out, "shape", ())
    if len(logits) != 2 or not getattr(module, "include_top", True):
        raise UserError(
            "the network has no head and gives no classes: take weights that have one "
            "(include_top=True)"
        )
    return logits[1]


def unprepared(weights: str) -> UserError:
    """The error of weights without a preprocessing."""
    return UserError(
        f"{weights} does not say how images are prepared for it: give --size, --mean and --std "
        f"(the flags are {FLAGS}; in Python Pretrained.preprocessing)"
    )


def not_finite(what: str = "the network's outputs") -> UserError:
    """The error of outputs (``what``, in the plural) that are not finite."""
    return UserError(
        f"{what} are not finite: the weights are damaged, or --mean and --std are not theirs"
    )


def padded(values: Any, size: int) -> np.ndarray:
    """Arrays of one shape, or an array, as a batch of ``size``: the last ones are zeros."""
    batch = np.asarray(values)
    return np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * (batch.ndim - 1)])
