"""What goes on inside a network: features, maps, filters, Grad-CAM.

Networks are asked by what flax calls when they run, not by their class: a layer named "head" is
the last one, and a map is what a layer gives with two axes of pixels. ``module`` is the network,
``variables`` are its {"params", "batch_stats"}.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flax_resnet.errors import UserError
from flax_resnet.models import ResNet

HEAD = "head"
# A norm of this name is followed by a ReLU, and the map is what that gives.
FINAL_NORM = "final_norm"
Watch = Callable[[nn.Module, tuple[Any, ...], Any], Any]


def _watched(module: nn.Module, variables: Any, images: jax.Array, watch: Watch) -> Any:
    """The output, each layer's call passed through ``watch(layer, arguments, output)``."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        return watch(context.module, args, out) if context.method_name == "__call__" else out

    with nn.intercept_methods(intercept):
        return module.apply(variables, images)


def _calls(
    module: nn.Module, variables: Any, images: Any
) -> list[tuple[tuple[str, ...], type, bool]]:
    """(path, class, does it give a map) of each layer called, in order; nothing is computed."""
    calls = []

    def watch(layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        calls.append((layer.path, type(layer), _is_map(layer, out)))
        return out

    jax.eval_shape(lambda x: _watched(module, variables, x, watch), images)
    return calls


def forward(module: nn.Module, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits and features.

    Args:
      images: (N, H, W, C), normalised.

    Returns:
      (logits (N, num_classes) in at least float32, the inputs (N, F) of the layer named "head").

    Raises:
      UserError: no layer has that name.
    """
    found: list[jax.Array] = []

    def watch(layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if layer.name == HEAD:
            found.append(args[0])
        return out

    logits = _watched(module, variables, images, watch)
    if not found:
        raise UserError(
            f"{type(module).__name__} has no layer named {HEAD!r}: name the last one so"
        )
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return wide, found[-1].reshape(len(images), -1)


def stage_maps(module: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Maps of a network's stages, from the first to the last.

    Of a network that is no ResNet they are the last map of each size that a layer of its own gives.

    Args:
      images: (N, H, W, C), normalised.

    Returns:
      {name: (N, h, w, channels)}; empty where there are no maps.
    """

    @jax.jit
    def maps(variables: Any, images: jax.Array) -> OrderedDict[str, jax.Array]:
        if isinstance(module, ResNet):
            stages: Any = module.apply(variables, images, method="features")
            return OrderedDict((stage.name, stage.map) for stage in stages)
        found: dict[tuple[int, int], tuple[str, jax.Array]] = {}

        def watch(layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if len(layer.path) == 1 and _is_map(layer, out):
                shown = nn.relu(out) if layer.name == FINAL_NORM else out
                found[out.shape[1:3]] = (layer.path[0], shown)
            return out

        _watched(module, variables, images, watch)
        return OrderedDict(found.values())

    return dict(maps(variables, images))


def _is_map(layer: nn.Module, out: Any) -> bool:
    return getattr(out, "ndim", 0) == 4 and not isinstance(layer, nn.Dropout)


def grad_cam(
    module: nn.Module, variables: Any, images: jax.Array, classes: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the evidence for a class lies (Selvaraju et al. 2017, "Grad-CAM", section 3).

    The last map's channels are weighted by the means over pixels of the class logit's gradient by
    them (equation 1), summed, and cut at zero (equation 2).

    Args:
      images: (N, H, W, C), normalised.
      classes: N class numbers; by default those with the largest logits.

    Returns:
      (maps (N, h, w) of the last map's size, classes int (N,), their probabilities (N,)).

    Raises:
      UserError: the network has no map.
    """
    fixed = None if classes is None else jnp.asarray(classes, jnp.int32)
    found, chosen, p = jax.device_get(_cam(module, variables, images, fixed))
    return np.asarray(found, np.float32), chosen, p


@functools.partial(jax.jit, static_argnames="module")
def _cam(module: nn.Module, variables: Any, images: jax.Array, fixed: jax.Array | None) -> Any:
    """(maps, classes, probabilities); compiled once for a network and a shape of images."""
    calls = _calls(module, variables, images)
    paths = [path for path, _, is_map in calls if path and is_map]
    if not paths:
        raise UserError(f"{type(module).__name__} has no maps (N, h, w, channels) for Grad-CAM")
    path = paths[-1]

    def logit(added: jax.Array | None) -> Any:
        seen: list[jax.Array] = []

        def watch(layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            if layer.path != path:
                return out
            if layer.name == FINAL_NORM:
                # The ReLU to come leaves this as it is, and passes the gradient at zero too.
                out = nn.relu(out) + jnp.finfo(out.dtype).tiny
            seen.append(out)
            return out if added is None else out + added

        logits = _watched(module, variables, images, watch).astype(jnp.float32)
        chosen = jnp.argmax(logits, axis=-1) if fixed is None else fixed
        own = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
        p = jnp.take_along_axis(jax.nn.softmax(logits), chosen[:, None], axis=-1)[:, 0]
        return jnp.sum(own), (seen[-1], chosen, p)

    like = jax.eval_shape(lambda: logit(None)[1][0])
    by, (values, chosen, p) = jax.grad(logit, has_aux=True)(jnp.zeros(like.shape, like.dtype))
    weights = jnp.mean(by, axis=(1, 2))
    return nn.relu(jnp.einsum("nhwc,nc->nhw", values, weights)), chosen, p


def heat(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Maps (N, h, w) over images: (N, height, width), bilinear, in shares of each one's largest."""
    large = np.asarray(jax.image.resize(maps, (len(maps), height, width), "bilinear"))
    peaks = large.max(axis=(1, 2), keepdims=True)
    return np.clip(large / np.where(peaks > 0, peaks, 1), 0, 1)


def first_filters(
    module: nn.Module, variables: Any, image_shape: tuple[int, int, int]
) -> tuple[str, np.ndarray]:
    """(name, kernel (h, w, C, filters)) of the first convolution.

    Raises:
      UserError: the network has none.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    for path, layer, _ in _calls(module, variables, images):
        if issubclass(layer, nn.Conv):
            name = "/".join(path)
            kernel = flatten_dict(variables["params"], sep="/")[f"{name}/kernel"]
            return name, np.asarray(kernel, np.float32)
    raise UserError(f"{type(module).__name__} has no convolution: there are no filters to draw")
