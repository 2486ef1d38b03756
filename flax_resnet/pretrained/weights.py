"""Weight files to networks and back; ``load``, which gives a network by name with its weights."""

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
from flax_resnet.files import replacing
from flax_resnet.layers import check_dtype
from flax_resnet.models import Block, ResNet, WeightsError
from flax_resnet.preprocess import KERAS_V1, KERAS_V2, TORCH, Preprocessing
from flax_resnet.pretrained import keras_names, torch_names
from flax_resnet.pretrained.tensors import TensorFile, read_tensors
from flax_resnet.record import MOVED_CLASSES, find_class, from_record, to_record

Variables = Mapping[str, Any]
Path_ = tuple[str, ...]
METADATA_KEY = "flax_resnet"
# Layers of the top: dropped, wherever a network without its top is asked for.
TOP = ("head", "hidden")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with its weights, and what they were trained on."""

    module: nn.Module
    """The network."""
    variables: Variables
    """{"params", "batch_stats"}, numpy arrays, of blocks not stacked."""
    preprocessing: Preprocessing | None
    """What the weights want done to a photograph; None where nobody said."""
    class_names: tuple[str, ...] | None = None
    """Name of each class, where they are known."""
    network: str | None = None
    """Of published weights, the name of the network."""
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


def _torch_naming(module: ResNet) -> models.Naming:
    name = functools.partial(torch_names.torch_name, module)
    return models.Naming(name, torch_names.from_torch, torch_names.to_torch)


def _keras_naming(module: ResNet) -> models.Naming:
    return models.Naming(functools.partial(keras_names.keras_name, module))


# Of networks that are no ResNet and so have no names in torch: their own.
_OWN_NAMING = models.Naming(".".join)
# Networks and blocks that the description in a file may name.
_CLASSES = {
    cls.__name__: cls
    for cls in vars(models).values()
    if isinstance(cls, type) and issubclass(cls, nn.Module)
}


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
        return _interpret(file, fields)
    except WeightsError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _interpret(file: TensorFile, fields: Mapping[str, Any]) -> Pretrained:
    """The network that a file's tensors make."""
    if METADATA_KEY in file.metadata:
        return _own(file, fields)
    if file.format == "safetensors" or file.format == "torch":
        tensors = torch_names.torchvision_names(file.tensors)
        module = torch_names.infer_resnet(tensors, **fields)
        channels, preprocessing = torch_names.input_channels(tensors), TORCH
        naming = _torch_naming(module)
    else:
        tensors = dict(keras_names.keras_layers(file.tensors, file.format))
        module = keras_names.infer_keras(tensors, **fields)
        channels = tensors["conv1_conv/0"].shape[-2] if tensors["conv1_conv/0"].ndim == 4 else 3
        preprocessing = KERAS_V2 if module.block_cls.preactivation else KERAS_V1
        naming = _keras_naming(module)
    height, width, _ = models.default_shape(module)
    variables = _fit(module, tensors, naming, (height, width, channels))
    known = module.stem != "cifar" and channels == 3
    certain = file.format.startswith("keras")
    return Pretrained(module, variables, preprocessing if known else None, certain=certain)


def _own(file: TensorFile, fields: Mapping[str, Any]) -> Pretrained:
    """A file that ``write_weights`` wrote: it says what it holds."""
    try:
        about = json.loads(file.metadata[METADATA_KEY])
        module = _described(about["module"], fields, len(file.tensors))
        preprocessing = _preprocessing(about.get("preprocessing"))
        class_names = _class_names(about.get("class_names"))
        shape = models.check_shape(about["input_shape"])
    except (
        ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError,
    ) as error:  # fmt: skip
        raise UserError(
            f"its description of the network cannot be read ({error}): write it again, or remove "
            f"the metadata {METADATA_KEY!r} to have the network inferred"
        ) from error
    naming = _torch_naming(module) if isinstance(module, ResNet) else _OWN_NAMING
    variables = _fit(module, file.tensors, naming, shape)
    return Pretrained(module, variables, preprocessing, class_names, certain=True)


def _described(record: Mapping[str, Any], fields: Mapping[str, Any], count: int) -> Any:
    """The network of a record, if it names those of this library only: a file is anyone's.

    Args:
      record: of the network.
      fields: taken in place of the record's, a block class of one's own for example.
      count: tensors in the file; a network of more blocks is not even tried.
    """
    record = {name: value for name, value in record.items() if name not in fields}
    _check_class(record["class"], nn.Module)
    for value in record.values():
        inner = value if isinstance(value, list) else ()
        if len(inner) > count or any(isinstance(v, (Mapping, list)) for v in inner):
            raise ValueError(f"it describes more than a network of {count} tensors")
        if isinstance(value, Mapping):
            _check_class(value["class_itself"], Block)
    if torch_names.too_many(sum(record.get("stage_sizes", ())), count):
        raise ValueError(f"it describes more layers than there are tensors, {count}")
    for name in ("dtype", "param_dtype"):
        check_dtype(record.get(name, "float32"))
    return from_record(record).clone(**fields)


def _check_class(name: str, kind: type) -> None:
    """Raises ValueError unless a class is a network or block of this library."""
    moved = name in MOVED_CLASSES or name in MOVED_CLASSES.values()
    cls = find_class(name) if moved else _CLASSES.get(name.partition(":")[2])
    if cls is None or not (moved or name.startswith("flax_resnet.models.")):
        raise ValueError(
            f"{name!r:.80} is no network or block of flax_resnet.models; a block class of your "
            "own has to be given, as block_cls"
        )
    if not issubclass(cls, kind):
        raise ValueError(f"{name!r:.80} is no {kind.__name__}")


def _class_names(names: Any) -> tuple[str, ...] | None:
    """Names of the classes; what a terminal would act on is taken out."""
    if names is None:
        return None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("the classes' names are no list of texts")
    return tuple("".join(c if c.isprintable() else "?" for c in name) for name in names)


def _preprocessing(record: Any) -> Preprocessing | None:
    if record is None:
        return None
    values = {name: value for name, value in record.items() if name != "class"}
    decoder = values.pop("decoder", None)
    if decoder is not None:
        decoder = Decoder(**{name: v for name, v in decoder.items() if name != "class"})
    lists: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Preprocessing(**lists, decoder=decoder)


def _fit(
    module: Any,
    tensors: Mapping[str, np.ndarray],
    naming: models.Naming,
    shape: tuple[int, int, int],
) -> dict[str, Any]:
    """A file's tensors as the variables of ``module`` on images of ``shape``, in its dtypes.

    Raises:
      WeightsError: with the file's names.
    """
    unrolled = module.clone(scan_blocks=False) if isinstance(module, ResNet) else module
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    what = f"a {type(module).__name__} of stages {getattr(module, 'stage_sizes', None)}"
    try:
        need = flatten_dict(dict(models.variable_shapes(unrolled, images)))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"the weights' shapes do not make {what}: {str(error).splitlines()[0]:.200}"
        ) from error
    if not getattr(module, "include_top", True):
        top = ("fc.", "predictions/", *TOP)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(top)}
    found = models.match(f"the weights do not make {what}", need, tensors, naming)
    return unflatten_dict({p: np.ascontiguousarray(x, need[p].dtype) for p, x in found.items()})


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
      preprocessing: what the weights want done to a photograph.
      class_names: name of each class.
      input_shape: (H, W, C) of the images; by default the network's own size, and its stem's
        channels.

    Raises:
      UserError: another ending, a network that Keras has not, or a path that cannot be written.
    """
    path = Path(path).expanduser()
    kinds = {".safetensors": _write_safetensors, ".weights.h5": _write_keras}
    kind = next((k for k in kinds if path.name.endswith(k)), None)
    if kind is None:
        raise UserError(f"{path}: expected a name that ends in {' or '.join(kinds)}")
    if isinstance(module, ResNet):
        variables = models.unstack_blocks(module, variables)
    flat = {
        path_: np.asarray(value)
        for path_, value in flatten_dict(dict(variables)).items()
        if path_[0] in ("params", "batch_stats")
    }
    about = {
        "module": to_record(module),
        "preprocessing": None if preprocessing is None else to_record(preprocessing),
        "class_names": None if class_names is None else list(class_names),
        "input_shape": models.check_shape(input_shape or image_shape(module, variables)),
    }
    try:
        with replacing(path) as partial:
            kinds[kind](partial, module, flat, about)
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
    path: Path, module: Any, flat: Mapping[Path_, np.ndarray], about: Mapping[str, Any]
) -> None:
    from safetensors.numpy import save

    naming = _torch_naming(module) if isinstance(module, ResNet) else _OWN_NAMING
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


def _write_keras(
    path: Path, module: Any, flat: Mapping[Path_, np.ndarray], about: Mapping[str, Any]
) -> None:
    import h5py

    version = keras_names.version_of(module) if isinstance(module, ResNet) else "v1"
    same = {name: getattr(module, name, None) for name in ("stage_sizes", "num_filters")}
    if (
        not isinstance(module, ResNet)
        or module.hidden_units
        or models.architecture(module)
        != models.architecture(models.keras_resnet(50, version, **same))
    ):
        raise UserError(
            "the network is not one of Keras's (its biases, strides and epsilon): write "
            ".safetensors, or train a keras_resnet such as ResNet50"
        )
    if wide := {str(v.dtype) for v in flat.values()} - {"float16", "float32", "float64"}:
        raise UserError(
            f"Keras's format with {', '.join(sorted(wide))}: expected float32; cast the variables, "
            "or write .safetensors"
        )
    groups = keras_names.weights_groups(keras_names.layer_order(module.stage_sizes, version))
    with h5py.File(path, "w") as file:
        file.create_group("vars")
        for layer, group in groups.items():
            if layer != "predictions" or module.include_top:
                file.create_group(f"layers/{group}/vars").attrs["name"] = layer
        for variable, value in flat.items():
            layer, _, position = keras_names.keras_name(module, variable).partition("/")
            file[f"layers/{groups[layer]}/vars"].create_dataset(position, data=value)
