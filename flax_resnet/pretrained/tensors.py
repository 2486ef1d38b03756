"""Tensors from a weight file of any kind, told by its content; nothing in it is ever run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np

from flax_resnet.errors import UserError
from flax_resnet.pretrained.hdf5 import read_h5
from flax_resnet.pretrained.stored_zip import StoredZip
from flax_resnet.pretrained.torch_archive import LEGACY_START, read_torch
from flax_resnet.pretrained.untrusted import MAX_RANK, damaged, shown, too_much

MAX_HEADER = 16 * 2**20
_HDF5_START = b"\x89HDF\r\n\x1a\n"
_ZIP_START = b"PK\x03\x04"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = {np.dtype(np.float16), _BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)}
_COUNTER = "num_batches_tracked"
_SAFETENSORS = {
    **{"F16": "float16", "F32": "float32", "F64": "float64"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool"},
}


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a weight file holds."""

    format: Literal["safetensors", "torch", "keras_h5", "keras_weights"]
    """How it is written."""
    tensors: dict[str, np.ndarray]
    """Floats of 16, 32 or 64 bits by name; they may be read-only and share memory."""
    metadata: dict[str, str]
    """Texts beside the tensors; safetensors alone has them."""


def read_tensors(path: Path) -> TensorFile:
    """Reads the weights in a file that nobody need vouch for.

    Nothing in the file is executed, and memory stays within a small multiple of its size.
    Counters of batches (``*num_batches_tracked``) are left out.

    Args:
      path: safetensors, a torch state dict or a checkpoint around one, or Keras weights in HDF5.

    Returns:
      The tensors in the dtypes of the file.

    Raises:
      UserError: there is no such file, its kind is unknown, it is damaged, or it holds anything
        but weights.
    """
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; give the path of a weight file")
        if not path.is_file():
            raise UserError(f"{path} is not a regular file: give the path of a weight file")
        kind, tensors, metadata = _read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): check the file") from error
    weights = {n: _weight(path, n, a) for n, a in tensors.items() if not _is_counter(n, a)}
    if not weights:
        raise UserError(f"{path} holds no weights: expected tensors of floats")
    return TensorFile(kind, weights, metadata)


def _read(path: Path) -> tuple[Any, dict[str, np.ndarray], dict[str, str]]:
    """(format, tensors, metadata), as the first bytes say."""
    with path.open("rb") as file:
        start = file.read(16)
        size = path.stat().st_size
        if not start:
            raise UserError(f"{path} is empty: download or export it again")
        if start.startswith(_HDF5_START):
            return (*read_h5(path), {})
        if start.startswith(_ZIP_START):
            _refuse_keras(path, file)
            return "torch", read_torch(path), {}
        if start.startswith(LEGACY_START):
            return "torch", read_torch(path), {}
        length = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{":
            return ("safetensors", *_read_safetensors(path, file, length, size))
    raise UserError(
        f"{path} is no weight file that is read here (it starts with {start!r}): expected "
        ".safetensors, a state dict by torch.save (.pth, .pt), or Keras weights (.h5, .weights.h5)"
    )


def _refuse_keras(path: Path, file: BinaryIO) -> None:
    names = StoredZip(path, file).names
    if "model.weights.h5" in names and "config.json" in names:
        out = f"{path.stem}.weights.h5"
        raise UserError(
            f"{path} is a whole Keras model: save its weights alone where Keras is installed: "
            f"python -c 'import keras; keras.saving.load_model({json.dumps(str(path))})"
            f".save_weights({json.dumps(out)})'"
        )


def _is_counter(name: str, array: np.ndarray) -> bool:
    return name.endswith(_COUNTER) and array.dtype.kind in "iu"


def _weight(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    if not name.isprintable():
        raise UserError(f"{path}: the tensor name {shown(name)} is no plain text: rename it")
    if array.dtype not in _FLOATS:
        raise UserError(
            f"{path}: tensor {shown(name)} is of {array.dtype}: expected floats of 16, 32 or 64 "
            "bits; convert it, or leave it out of the file"
        )
    return array


def _no_elements(path: Path, name: str) -> UserError:
    return UserError(f"{path}: tensor {shown(name)} has no elements: expected weights")


def _read_safetensors(
    path: Path, file: BinaryIO, length: int, size: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The library checks the header; the tensors are read by it here, bfloat16 included."""
    if length > size - 8:
        raise damaged(path, f"its header of {length} bytes is longer than the file of {size}")
    if length > MAX_HEADER:
        raise too_much(path, f"its header of {length} bytes is longer than {MAX_HEADER}")
    _check_safetensors(path)
    file.seek(8)
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", None) or {}
        entries = {
            name: (str(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise damaged(path, f"its header cannot be read ({shown(str(error))})") from error
    tensors = {}
    for name, (kind, shape, begin, end) in entries.items():
        dtype = _safetensors_dtype(path, name, kind)
        count = math.prod(shape)
        if count == 0:
            raise _no_elements(path, name)
        inside = 0 <= begin <= end <= size - 8 - length
        if not inside or count * dtype.itemsize != end - begin or len(shape) > MAX_RANK:
            raise damaged(path, f"tensor {shown(name)} does not lie where its shape says")
        file.seek(8 + length + begin)
        tensors[name] = np.frombuffer(file.read(end - begin), dtype, count).reshape(shape)
    return tensors, metadata


def _check_safetensors(path: Path) -> None:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise UserError(f"{path} needs safetensors: pip install safetensors") from error
    try:
        with safe_open(path, "numpy"):
            pass
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise damaged(path, shown(str(error), 200)) from error


def _safetensors_dtype(path: Path, name: str, kind: str) -> np.dtype:
    if kind == "BF16":
        return _BFLOAT16
    if kind not in _SAFETENSORS:
        raise UserError(
            f"{path}: tensor {shown(name)} is of {shown(kind)}: expected F16, BF16, F32 or F64; "
            "convert it"
        )
    return np.dtype(_SAFETENSORS[kind])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found
