"""Tensors from a weight file of any kind, told by its content; nothing in it is ever run."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flax_resnet.errors import UserError, first_few
from flax_resnet.weights.readers.torch_archive import LEGACY_START, read_torch
from flax_resnet.weights.readers.untrusted import MAX_RANK, Info, LimitedFile, open_zip, shown

METADATA_KEY = "flax_resnet"
"""Key of the metadata in which ``write_weights`` describes the network."""
# Bytes of a safetensors header; objects made of it take up to 25 times as many.
MAX_HEADER = 8 * 2**20
KERAS_CONFIG = "keras_config"
"""Key of the metadata with the config.json of a ``.keras`` file."""
_HDF5_START = b"\x89HDF\r\n\x1a\n"
_ZIP_START = b"PK\x03\x04"
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_SAFETENSORS = {"F": "float", "I": "int", "U": "uint", "BF": "bfloat"}
_LEAVES = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a weight file holds."""

    format: Literal["safetensors", "torch", "keras_h5", "keras_weights"]
    """How it is written."""
    tensors: dict[str, np.ndarray]
    """Floats of 16, 32 or 64 bits by name; they may be read-only and share memory."""
    metadata: dict[str, str]
    """Texts beside the tensors, of safetensors and of ``.keras`` files."""


Choose = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, str]], Mapping[str, str]]
"""Shapes by name, and the kind of what else has the name of a weight, to new names of the tensors
to read."""


def read_tensors(path: Path, choose: Choose | None = None) -> TensorFile:
    """Reads the floats in a file that nobody need vouch for, in its dtypes.

    Nothing in the file is executed, and memory stays below twice its size plus 200 MB.

    Args:
      path: safetensors, a torch state dict or a checkpoint around one, Keras's HDF5 or ``.keras``.
      choose: of torch's names, the tensors to read and how to call them; by default all.

    Raises:
      UserError: there is no such file, its kind is unknown, it is damaged, or it holds no weights.
    """
    select = functools.partial(_select, path, choose)
    try:
        if not path.is_file():
            why = "is not a regular file" if path.exists() else "is not there: no such file"
            raise UserError(f"{path} {why}; give the path of a weight file")
        return TensorFile(*_read(path, select))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): check the file") from error


def _select(
    path: Path,
    choose: Choose | None,
    infos: Mapping[str, Info],
    others: Mapping[str, str] = {},
    known: bool = False,
) -> Mapping[str, str]:
    """New names of the tensors to read; with ``known`` all weights, as they are called."""
    weights, odd = {}, {**others}
    for name, (shape, dtype) in infos.items():
        fits = dtype in _FLOATS and 0 not in shape and len(shape) <= MAX_RANK
        if fits and name.isprintable():
            weights[name] = shape
        else:
            odd[name] = f"{dtype} of shape {shape}"
    if not weights:
        some = first_few([f"{shown(name)} is {shown(kind)[1:-1]}" for name, kind in odd.items()])
        raise UserError(
            f"{path} holds no weights ({some:.500}): expected plain names, floats of 16, 32 or 64 "
            f"bits, elements, and no more than {MAX_RANK} axes; convert them"
        )
    if known or choose is None:
        return {name: name for name in weights}
    return choose(weights, {n: w for n, w in odd.items() if n.rpartition(".")[2] in _LEAVES})


def _read(path: Path, select: Any) -> tuple[Any, dict[str, np.ndarray], dict[str, str]]:
    """(format, tensors, metadata), as the first bytes say."""
    with path.open("rb") as file:
        start = file.read(16)
    metadata: dict[str, str] = {}
    if start.startswith(_HDF5_START):
        from flax_resnet.weights.readers.hdf5 import read_h5

        kind, tensors = read_h5(path)
    elif start.startswith(_ZIP_START) and _holds_keras(path):
        from flax_resnet.weights.readers.hdf5 import read_keras

        kind, tensors, config = read_keras(path)
        metadata[KERAS_CONFIG] = config
    elif start.startswith((_ZIP_START, LEGACY_START)):
        return "torch", read_torch(path, select), metadata
    elif start[8:9] == b"{":
        header = int.from_bytes(start[:8], "little")
        return ("safetensors", *_read_safetensors(path, header, select))
    else:
        raise UserError(
            f"{path} is no weight file that is read here (it starts with {start!r}): expected "
            ".safetensors, torch.save's state dict (.pth, .pt), or Keras's .keras, .h5, .weights.h5"
        )
    infos = {name: Info(x.shape, str(x.dtype)) for name, x in tensors.items()}
    return kind, {name: tensors[name] for name in select(infos, known=True)}, metadata


def _holds_keras(path: Path) -> bool:
    """Whether a ZIP is a ``.keras`` file; one whose index is damaged is not."""
    try:
        with LimitedFile(io.FileIO(path)) as file, open_zip(file) as archive:
            return {"config.json", "model.weights.h5"} <= set(archive.namelist())
    except Exception:  # damaged bytes raise of many kinds
        return False


def _read_safetensors(
    path: Path, header: int, select: Any
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of a file whose header takes so many bytes."""
    if MAX_HEADER < header < path.stat().st_size:
        raise UserError(f"{path} is not read: its header of {header} bytes is over {MAX_HEADER}")
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            infos = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                kind = part.get_dtype().rstrip("0123456789")
                dtype = _SAFETENSORS.get(kind, kind) + part.get_dtype().removeprefix(kind)
                infos[name] = Info(tuple(part.get_shape()), dtype)
            chosen = select(infos, known=METADATA_KEY in metadata)
            return {new: file.get_tensor(name) for name, new in chosen.items()}, metadata
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise UserError(
            f"{path} is not read by safetensors ({shown(str(error), 200)}): it is damaged, or its "
            "tensors are not F16, BF16, F32 or F64; download or convert it again"
        ) from error
