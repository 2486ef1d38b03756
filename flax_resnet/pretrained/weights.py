"""Weight files read as networks with their variables, and written from them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet import models
from flax_resnet.datasets.decode import Decoder
from flax_resnet.errors import UserError
from flax_resnet.layers import check_dtype
from flax_resnet.models import ResNet, WeightsError
from flax_resnet.preprocess import KERAS_V1, KERAS_V2, TORCH, Preprocessing
from flax_resnet.pretrained import keras_names, torch_names
from flax_resnet.pretrained.tensors import TensorFile, read_tensors
from flax_resnet.records.configs import MOVED_CLASSES, class_name, from_record, to_record
from flax_resnet.records.files import reason, replacing

Variables = Mapping[str, Any]
METADATA_KEY = "flax_resnet"
_MODULES = [c for c in vars(models).values() if isinstance(c, type) and issubclass(c, nn.Module)]
_CLASSES = {*map(class_name, (*_MODULES, Preprocessing, Decoder)), *MOVED_CLASSES.values()}
"""The classes that the description in a weight file may name."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with its weights, and what they were trained on."""

    module: nn.Module
    """The network."""
    variables: Variables
    """{"params", "batch_stats"}: numpy arrays, blocks not stacked."""
    preprocessing: Preprocessing | None
    """How images are prepared for the weights; None where it is not known."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, where they are known."""
    network: str | None = None
    """Name of the network, of published weights."""
    certain: bool = False
    """The file says what network it is of by more than its shapes."""

    @property
    def name(self) -> str:
        """What to call the network."""
        return self.network or models.network_name(self.module)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images that the network takes."""
        if self.preprocessing is not None:
            return self.preprocessing.shape
        return image_shape(self.module, self.variables)


def open_file(path: str | Path, **fields: Any) -> Pretrained:
    """Reads a weight file and infers the network from it.

    Args:
      path: .safetensors or .pth with torch's names (torchvision, timm, Hugging Face, CIFAR
        codes), Keras's .h5 or .weights.h5, or what ``write_weights`` wrote.
      **fields: of the network, over those inferred: ``stride_conv="1x1"``, ``include_top=False``.

    Raises:
      WeightsError: tensors are missing, left over, or of another shape.
      UserError: the file cannot be read, or is no residual network's.
    """
    path = Path(path).expanduser()
    file = read_tensors(path)
    try:
        return (_own if METADATA_KEY in file.metadata else _foreign)(file, fields)
    except WeightsError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _foreign(file: TensorFile, fields: Mapping[str, Any]) -> Pretrained:
    """The network that is inferred from the names and shapes of a file's tensors."""
    keras = file.format.startswith("keras")
    if keras:
        tensors = keras_names.keras_layers(file.tensors, file.format)  # type: ignore[arg-type]
        module = keras_names.infer_keras(tensors, keras_names.is_old(file.tensors), **fields)
        stem = tensors["conv1_conv/0"]
        channels = stem.shape[-2] if stem.ndim == 4 else 3
        preprocessing = KERAS_V2 if module.block_cls.preactivation else KERAS_V1
    else:
        tensors = torch_names.torchvision_names(file.tensors)
        module = torch_names.infer_resnet(tensors, **fields)
        channels, preprocessing = torch_names.input_channels(tensors), TORCH
    shape = (*models.default_shape(module)[:2], channels)
    variables = _fit(module, tensors, _naming(module, keras), shape)
    known = module.stem != "cifar" and channels == 3
    return Pretrained(module, variables, preprocessing if known else None, certain=keras)


def _own(file: TensorFile, fields: Mapping[str, Any]) -> Pretrained:
    """The network that is described in a file of ``write_weights``, with ``fields`` over it."""
    count = len(file.tensors)
    try:
        about = json.loads(file.metadata[METADATA_KEY])
        record = {name: value for name, value in about["module"].items() if name not in fields}
        layers, hidden = sum(record.get("stage_sizes", ())), len(record.get("hidden_units", ()))
        if torch_names.too_many(layers, count) or hidden > count:  # they would take long to trace
            raise ValueError(f"it describes more layers than there are tensors, {count}")
        for name in ("dtype", "param_dtype"):
            check_dtype(record.get(name, "float32"))
        module = _built(record, nn.Module).clone(**fields)
        preprocessing = _built(about.get("preprocessing"), Preprocessing | None)
        names = about.get("class_names")
        if names is not None:  # without what a terminal would act on
            names = tuple("".join(c if c.isprintable() else "?" for c in name) for name in names)
        shape = models.check_shape(about["input_shape"])
    except Exception as error:  # a description of anyone's may fail in any way
        raise UserError(
            f"its description of the network cannot be read ({error}): write it again, or remove "
            f"the metadata {METADATA_KEY!r} to have the network inferred"
        ) from error
    variables = _fit(module, file.tensors, _naming(module), shape)
    return Pretrained(module, variables, preprocessing, names, certain=True)


def _built(record: Any, kind: Any) -> Any:
    """``from_record``, of classes of this library only: a weight file may come from anyone."""

    def check(part: dict[str, Any]) -> dict[str, Any]:
        for name in (part[key] for key in ("class", "class_itself") if key in part):
            if MOVED_CLASSES.get(name, name) not in _CLASSES:
                raise ValueError(
                    f"{name!r:.80} is no network or block of flax_resnet.models; a block class of "
                    "your own has to be given, as block_cls"
                )
        return part

    value = from_record(json.loads(json.dumps(record), object_hook=check))
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} is in the place of another class")
    return value


def _naming(module: nn.Module, keras: bool = False) -> models.Naming:
    """How files name and lay out a network's variables; one that is no ResNet has its own names."""
    if not isinstance(module, ResNet):
        return models.Naming(".".join)
    if keras:
        return models.Naming(functools.partial(keras_names.keras_name, module))
    name = functools.partial(torch_names.torch_name, module)
    return models.Naming(name, torch_names.from_torch, torch_names.to_torch)


def _fit(
    module: Any,
    tensors: Mapping[str, np.ndarray],
    naming: models.Naming,
    shape: tuple[int, int, int],
) -> dict[str, Any]:
    """A file's tensors as the variables of ``module`` on images of ``shape``, in its dtypes."""
    unrolled = module.clone(scan_blocks=False) if isinstance(module, ResNet) else module
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    what = f"a {type(module).__name__} of stages {getattr(module, 'stage_sizes', None)}"
    try:
        need = flatten_dict(dict(models.variable_shapes(unrolled, images)))
    except Exception as error:  # a network as a file describes it may fail in any way
        raise UserError(f"the weights' shapes do not make {what}: {reason(error)}") from error
    if not getattr(module, "include_top", True):
        top = ("fc.", "predictions/", "head", "hidden")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(top)}
    values = models.match(f"the weights do not make {what}", need, tensors, naming)
    return unflatten_dict({p: np.ascontiguousarray(x, need[p].dtype) for p, x in values.items()})


def read_weights(path: str | Path, **fields: Any) -> tuple[nn.Module, Variables]:
    """The network in a weight file, inferred, and its variables: (module, variables).

    Arguments and errors are those of ``open_file``.
    """
    opened = open_file(path, **fields)
    return opened.module, jax.tree.map(jnp.asarray, opened.variables)


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
    try:
        with replacing(path) as partial:
            if path.suffix == ".h5":
                _write_keras(partial, module, flat)
            else:
                _write_safetensors(partial, module, flat, about)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def image_shape(module: nn.Module, variables: Variables | None = None) -> tuple[int, int, int]:
    """(H, W, C): the size that a network was made for, the channels that its variables take."""
    height, width, channels = models.default_shape(module)
    params = {} if variables is None else variables["params"]
    for stem in ("stem_conv1", "stem_conv"):
        if stem in params:
            return height, width, params[stem]["kernel"].shape[2]
    return height, width, channels


def _write_safetensors(
    path: Path, module: Any, flat: Mapping[Any, np.ndarray], about: Mapping[str, Any]
) -> None:
    from safetensors.numpy import save

    naming = _naming(module)
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
