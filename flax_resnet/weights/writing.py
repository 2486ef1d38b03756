"""Weight files written from networks with their variables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from flax_resnet import models
from flax_resnet.data.preprocess import Preprocessing
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet
from flax_resnet.records.configs import to_record
from flax_resnet.records.files import os_error_as_one_line, replacing
from flax_resnet.weights import keras_names
from flax_resnet.weights.pretrained import Variables, image_shape
from flax_resnet.weights.reading import METADATA_KEY, naming_of


def write_weights(
    path: str | Path,
    module: nn.Module,
    variables: Variables,
    *,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
) -> None:
    """Writes a network's variables; reading them back gives the same bits.

    Args:
      path: ".safetensors" has torchvision's names and torch's layout, and says in its metadata
        what network it is; ".weights.h5" is Keras 3's, for networks of ``keras_resnet``.
      module: the network; one that is no ResNet is written under its own names.
      variables: its variables, of blocks stacked or not.
      preprocessing: how images are prepared for the weights.
      class_names: name of each class.
      input_shape: (H, W, C) of the images; by default the network's own size, and its stem's
        channels.

    Raises:
      UserError: another ending, a network that Keras has not, or a path that cannot be written.
    """
    path = Path(path).expanduser()
    if not path.name.endswith((".safetensors", ".weights.h5")):
        raise UserError(f"{path}: expected a name that ends in .safetensors or .weights.h5")
    if isinstance(module, ResNet):
        variables = models.unstack_blocks(module, variables)
    kinds = {kind: variables[kind] for kind in ("params", "batch_stats") if kind in variables}
    flat = {path_: np.asarray(value) for path_, value in flatten_dict(kinds).items()}
    about = {
        "module": to_record(module),
        "preprocessing": None if preprocessing is None else to_record(preprocessing),
        "class_names": None if class_names is None else list(class_names),
        "input_shape": models.check_shape(input_shape or image_shape(module, variables)),
    }
    with os_error_as_one_line(path), replacing(path) as partial:
        if path.suffix == ".h5":
            _write_keras(partial, module, flat)
        else:
            _write_safetensors(partial, module, flat, about)


def _write_safetensors(
    path: Path, module: Any, flat: Mapping[Any, np.ndarray], about: Mapping[str, Any]
) -> None:
    from safetensors.numpy import save

    naming = naming_of(module)
    tensors = {naming.name(p): np.ascontiguousarray(naming.write(p, v)) for p, v in flat.items()}
    # "format" is what torch's loaders look for.
    data = save(tensors, {"format": "pt", METADATA_KEY: json.dumps(about)})
    # The library writes the metadata in an order that changes: the same weights, the same bytes.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(data)[start:])


def _write_keras(path: Path, module: Any, flat: Mapping[Any, np.ndarray]) -> None:
    import h5py

    keras = None
    if isinstance(module, ResNet) and not module.hidden_units:
        version = keras_names.version_of(module)
        sizes = {"stage_sizes": module.stage_sizes, "num_filters": module.num_filters}
        keras = models.keras_resnet(50, version, **sizes)
    if keras is None or models.architecture(module) != models.architecture(keras):
        raise UserError(
            "the network is not one of Keras's (its biases, strides and epsilon): write "
            ".safetensors, or train a keras_resnet such as ResNet50"
        )
    if wide := {str(v.dtype) for v in flat.values()} - {"float16", "float32", "float64"}:
        raise UserError(f"Keras's format with {', '.join(sorted(wide))}: write .safetensors")
    groups = keras_names.weights_groups(keras_names.layer_order(module.stage_sizes, version))
    with h5py.File(path, "w") as file:
        file.create_group("vars")
        for layer, group in groups.items():
            if layer != "predictions" or module.include_top:
                file.create_group(f"layers/{group}/vars").attrs["name"] = layer
        for variable, value in flat.items():
            layer, _, position = keras_names.keras_name(module, variable).partition("/")
            file[f"layers/{groups[layer]}/vars"].create_dataset(position, data=value)
