"""Weight files read as networks with their variables."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet import models
from flax_resnet.data.decode import Decoder
from flax_resnet.data.preprocess import KERAS_V1, KERAS_V2, TORCH, Preprocessing
from flax_resnet.errors import Note, UserError, first_few
from flax_resnet.models import ResNet
from flax_resnet.models.arguments import check_dtype
from flax_resnet.records.configs import MOVED_CLASSES, class_name, from_record, todays_name
from flax_resnet.records.files import reason
from flax_resnet.weights import (
    architectures,
    config_files,
    keras_models,
    keras_names,
    torch_names,
    trees,
)
from flax_resnet.weights.pretrained import Pretrained, Variables
from flax_resnet.weights.readers.tensors import KERAS_CONFIG, METADATA_KEY, TensorFile, read_tensors

AS_TORCH = "torchvision's first (shorter side to 256, centre 224, ImageNet's mean and deviation)"
USUAL = {
    "v1": (KERAS_V1, "keras.applications.resnet's (squeezed, blue first, less ImageNet's mean)"),
    "v2": (KERAS_V2, "keras.applications.resnet_v2's (squeezed, scaled to -1..1)"),
}
"""Preprocessing of Keras's weights by their version, and its name."""
_MODULES = [c for c in vars(models).values() if isinstance(c, type) and issubclass(c, nn.Module)]
_MOVED = {today for old, today in MOVED_CLASSES.items() if old.startswith("flax_resnet.models.")}
_CLASSES = {*map(class_name, (*_MODULES, Preprocessing, Decoder)), *_MOVED}
"""Today's names of the classes that the description in a weight file may name."""


def open_file(path: str | Path, **fields: Any) -> Pretrained:
    """Reads a weight file and infers the network from it.

    What is left out of the file, and how what it does not say was read, is a ``Note``.

    Args:
      path: .safetensors or .pth with torch's names (torchvision, timm, Hugging Face, CIFAR
        codes), also of a checkpoint around them; PATH#NAME of one with several networks, NAME a
        part of the prefix of one; Keras's .keras, .h5 or .weights.h5, or what ``write_weights``
        wrote.
      **fields: of the network, over those inferred: ``stride_conv="1x1"``, ``include_top=False``.

    Raises:
      WeightsError: tensors are missing, left over, or of another shape.
      UserError: the file cannot be read, or is no residual network's.
    """
    text, network = trees.split(path)
    path, notes = Path(text).expanduser(), list[str]()

    def choose(shapes: trees.Shapes, unread: Mapping[str, str]) -> dict[str, str]:
        if some := [f"{name!r:.80} is {kind:.80}" for name, kind in unread.items()]:
            notes.append(f"not read: {first_few(some)}")
        names, more = trees.find(shapes, text, network)
        notes.extend(more)
        return names

    try:
        file = read_tensors(path, choose)
        is_own = METADATA_KEY in file.metadata
        if network is not None and (is_own or file.format.startswith("keras")):
            raise UserError(f"it holds one network: give the path without #{network}")
        opened = _own(file, fields) if is_own else _inferred(path, file, fields, notes)
    except UserError as error:
        start = "" if str(error).startswith(str(path)) else f"{path}: "
        error.args = ("; ".join([f"{start}{error}", *notes]),)
        raise
    if notes:
        warnings.warn(f"{text}: {'; '.join(notes)}", Note, stacklevel=2)
    return opened


def _inferred(
    path: Path, file: TensorFile, fields: Mapping[str, Any], notes: list[str]
) -> Pretrained:
    """The network of a file by its tensors, its name and the files beside it; adds to ``notes``."""
    beside = config_files.read(path.parent)
    for name in (path.name, path.absolute().parent.name, beside.architecture):
        architectures.check_name(name)
    caffe = architectures.fields_of(path.name)
    fields = {**caffe, **beside.fields, **fields}
    preprocessing: Preprocessing | None
    if keras := file.format.startswith("keras"):
        tensors = keras_names.keras_layers(file.tensors, file.format)  # type: ignore[arg-type]
        module = keras_names.infer_keras(tensors, file.tensors, **fields)
        stem = tensors["conv1_conv/0"]
        channels = stem.shape[-2] if stem.ndim == 4 else 3
        usual, assumed = USUAL[keras_names.version_of(module)]
        preprocessing = usual
        if (config := file.metadata.get(KERAS_CONFIG)) is not None:
            preprocessing, more = keras_models.described(config, usual)
            notes += more
            assumed = assumed if preprocessing.mean == usual.mean else ""  # its Rescaling says it
        elif module.hidden_units:
            notes.append("its dense layers are taken to have ReLU between them")
    else:
        tensors = torch_names.with_biases(file.tensors)
        module = torch_names.infer_resnet(tensors, **fields)
        channels, preprocessing, assumed = torch_names.input_channels(tensors), TORCH, AS_TORCH
    names = beside.class_names
    if names is not None and module.include_top and len(names) != module.num_classes:
        raise UserError(
            f"the {config_files.CONFIG} beside it names {len(names)} classes, and its head has "
            f"{module.num_classes}: correct the names, or move the weights to another folder"
        )
    if caffe or beside.preprocessing is not None:  # Caffe's are fed otherwise than torchvision's
        preprocessing, assumed = beside.preprocessing, ""
    elif module.stem == "cifar" or channels != 3:
        preprocessing, assumed = None, ""
    if assumed and preprocessing is not None:  # no publisher says to take them as stored
        preprocessing = dataclasses.replace(preprocessing, as_displayed=True)
    shape = (*models.default_shape(module)[:2], channels)
    variables = _fit(module, tensors, naming_of(module, keras), shape)
    return Pretrained(module, variables, preprocessing, names, certain=keras, assumed=assumed)


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
            names = tuple(map(config_files.printable, names))
        shape = models.check_shape(about["input_shape"])
    except Exception as error:  # a description of anyone's may fail in any way
        raise UserError(
            f"its description of the network cannot be read ({error}): write it again, or remove "
            f"the metadata {METADATA_KEY!r} to have the network inferred"
        ) from error
    variables = _fit(module, file.tensors, naming_of(module), shape)
    return Pretrained(module, variables, preprocessing, names, certain=True)


def _built(record: Any, kind: Any) -> Any:
    """``from_record``, of classes of this library only: a weight file may come from anyone."""

    def check(part: dict[str, Any]) -> dict[str, Any]:
        for name in (part[key] for key in ("class", "class_itself") if key in part):
            if todays_name(name) not in _CLASSES:
                raise ValueError(
                    f"{name!r:.80} is no network or block of flax_resnet.models; a block class of "
                    "your own has to be given, as block_cls"
                )
        return part

    value = from_record(json.loads(json.dumps(record), object_hook=check))
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} is in the place of another class")
    return value


def naming_of(module: nn.Module, keras: bool = False) -> models.Naming:
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
