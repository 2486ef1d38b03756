"""Tensors from a weight file of any kind, told by its content; nothing in it is ever run."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from flax_resnet.errors import UserError
from flax_resnet.weights.readers.torch_archive import LEGACY_START, read_torch
from flax_resnet.weights.readers.untrusted import MAX_RANK, LimitedFile, open_zip, shown

# Bytes of a safetensors header; objects made of it take up to 25 times as many.
MAX_HEADER = 8 * 2**20
KERAS_CONFIG = "keras_config"
"""Key of the metadata with the config.json of a ``.keras`` file."""
_HDF5_START = b"\x89HDF\r\n\x1a\n"
_ZIP_START = b"PK\x03\x04"
_FLOATS = {np.dtype(kind) for kind in ("f2", "f4", "f8", ml_dtypes.bfloat16)}
_COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """What a weight file holds."""

    format: Literal["safetensors", "torch", "keras_h5", "keras_weights"]
    """How it is written."""
    tensors: dict[str, np.ndarray]
    """Floats of 16, 32 or 64 bits by name; they may be read-only and share memory."""
    metadata: dict[str, str]
    """Texts beside the tensors, of safetensors and of ``.keras`` files."""


def read_tensors(path: Path) -> TensorFile:
    """Reads the weights in a file that nobody need vouch for.

    Nothing in the file is executed, and memory stays below twice its size plus 200 MB. Counters
    of batches (``*num_batches_tracked``) are left out.

    Args:
      path: safetensors, a torch state dict or a checkpoint around one, Keras weights in HDF5 or a
        ``.keras`` file.

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
    weights = {}
    for name, array in tensors.items():
        if name.endswith(_COUNTER) and array.dtype.kind in "iu":
            continue
        fits = array.dtype in _FLOATS and array.size and array.ndim <= MAX_RANK
        if not fits or not name.isprintable():
            raise UserError(
                f"{path}: tensor {shown(name)} is of {array.dtype} and shape {array.shape}: "
                "expected a plain name, floats of 16, 32 or 64 bits, elements, and no more than "
                f"{MAX_RANK} axes; convert it, or leave it out of the file"
            )
        weights[name] = array
    if not weights:
        raise UserError(f"{path} holds no weights: expected tensors of floats")
    return TensorFile(kind, weights, metadata)


def _read(path: Path) -> tuple[Any, dict[str, np.ndarray], dict[str, str]]:
    """(format, tensors, metadata), as the first bytes say."""
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(_HDF5_START):
        from flax_resnet.weights.readers.hdf5 import read_h5

        return (*read_h5(path), {})
    if start.startswith(_ZIP_START) and _holds_keras(path):
        from flax_resnet.weights.readers.hdf5 import read_keras

        layout, tensors, config = read_keras(path)
        return layout, tensors, {KERAS_CONFIG: config}
    if start.startswith((_ZIP_START, LEGACY_START)):
        return "torch", read_torch(path), {}
    if start[8:9] == b"{":
        return ("safetensors", *_read_safetensors(path, int.from_bytes(start[:8], "little")))
    raise UserError(
        f"{path} is no weight file that is read here (it starts with {start!r}): expected "
        ".safetensors, a state dict by torch.save (.pth, .pt), or Keras's .keras, .h5, .weights.h5"
    )


def _holds_keras(path: Path) -> bool:
    """Whether a ZIP is a ``.keras`` file; one whose index is damaged is not."""
    try:
        with LimitedFile(io.FileIO(path)) as file, open_zip(file) as archive:
            return {"config.json", "model.weights.h5"} <= set(archive.namelist())
    except Exception:  # damaged bytes raise of many kinds
        return False


def _read_safetensors(path: Path, header: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of a file whose header takes so many bytes."""
    if MAX_HEADER < header < path.stat().st_size:
        raise UserError(f"{path} is not read: its header of {header} bytes is over {MAX_HEADER}")
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust code is no Exception
        raise UserError(
            f"{path} is not read by safetensors ({shown(str(error), 200)}): it is damaged, or its "
            "tensors are not F16, BF16, F32 or F64; download or convert it again"
        ) from error
