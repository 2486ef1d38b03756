"""State dicts saved by torch, as a ZIP (1.6 and later) or as the pickles of before."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from flax_resnet.errors import UserError
from flax_resnet.pretrained.torch_pickle import Storage, Tensor, unpickle
from flax_resnet.pretrained.untrusted import damaged, shown, too_much

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
# Where a checkpoint keeps its network's tensors when they are not at the top.
NESTED = ("state_dict", "model_state_dict", "model", "net", "params")
# Bytes of a ZIP's directory and of a pickle; objects made of them take up to 15 times as many.
MAX_DIRECTORY = 8 * 2**20
MAX_PICKLE = 16 * 2**20

_Load = Callable[[Storage], bytes]


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict, or of the checkpoint around one; runs nothing of it.

    Args:
      path: the file.

    Returns:
      The tensors by name, of any numpy dtype or bfloat16. They may be read-only and share memory.

    Raises:
      UserError: the file is damaged, or holds anything but tensors and plain values.
    """
    try:
        with _File(io.FileIO(path)) as file:
            root, load = (_open_zip if file.peek(2)[:2] == b"PK" else _open_legacy)(path, file)
            return _materialise(path, _select(path, root), load)
    except (UserError, OSError):
        raise
    except Exception as error:  # zipfile and pickle raise a dozen kinds on damaged bytes
        reason = shown(str(error), 200) if str(error) else type(error).__name__
        raise damaged(path, reason) from error


class _File(io.BufferedReader):
    """A file that is read in pieces of ``most`` bytes at the most."""

    most: float = math.inf

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise too_much(Path(self.name), f"a part of {size} bytes, over {self.most}")
        return super().read(size)


def _open_zip(path: Path, file: _File) -> tuple[Any, _Load]:
    file.most = MAX_DIRECTORY  # zipfile reads the directory in one piece
    archive = zipfile.ZipFile(file)
    file.most = math.inf
    names = archive.namelist()
    tops = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if "model.weights.h5" in names and "config.json" in names:
        out = f"{path.stem}.weights.h5"
        raise UserError(
            f"{path} is a whole Keras model: save its weights alone where Keras is installed: "
            f"python -c 'import keras; keras.saving.load_model({json.dumps(str(path))})"
            f".save_weights({json.dumps(out)})'"
        )
    if len(tops) != 1:
        raise UserError(
            f"{path} is a ZIP with {len(tops)} members .../data.pkl where torch.save writes one: "
            "expected a state dict saved by torch.save"
        )
    prefix = tops[0].removesuffix("data.pkl")
    if any(name.startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in names):
        raise UserError(
            f"{path} is a TorchScript program, not a state dict: load it by torch.jit.load and "
            "torch.save its state_dict()"
        )
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise too_much(path, "some of it is compressed, which torch never does")
    # So all that is read is no larger than the file, also where members overlap.
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise too_much(path, "its members overlap, or are larger than the file")
    if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
        raise _not_little(path)
    if archive.getinfo(tops[0]).file_size > MAX_PICKLE:
        raise too_much(path, f"its pickle is larger than {MAX_PICKLE} bytes")
    root, _ = unpickle(io.BytesIO(archive.read(tops[0])), path)
    return root, lambda storage: archive.read(f"{prefix}data/{storage.key}")


def _open_legacy(path: Path, file: BinaryIO) -> tuple[Any, _Load]:
    total = path.stat().st_size
    stream = io.BytesIO(file.read(min(total, MAX_PICKLE)))
    magic, protocol, system = (unpickle(stream, path)[0] for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != 1001 or not isinstance(system, dict):
        raise damaged(path, "it does not start as torch.save starts a file")
    if system.get("little_endian") is not True:
        raise _not_little(path)
    root, storages = unpickle(stream, path)
    keys, _ = unpickle(stream, path)
    at = stream.tell()
    starts: dict[str, int] = {}
    for key in keys:  # the storages follow one another, each behind its length
        storage = storages[key]
        file.seek(at)
        count = struct.unpack("<q", file.read(8))[0]
        starts[key] = at + 8
        at = starts[key] + count * _dtype(storage).itemsize
        if count != storage.count or not starts[key] <= at <= total:
            raise damaged(path, f"storage {shown(key)} is not as long as its tensors say")

    def load(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.count * _dtype(storage).itemsize)

    return root, load


def _not_little(path: Path) -> UserError:
    return UserError(
        f"{path} was not saved on a little-endian machine: load it there and save it again by "
        "safetensors.torch.save_file"
    )


def _select(path: Path, root: Any) -> dict[str, Tensor]:
    """The tensors of the network in what a checkpoint holds."""
    if not isinstance(root, dict):
        what = "one tensor" if isinstance(root, Tensor) else shown(root)
        raise UserError(f"{path} holds {what}: expected a state dict, names with their tensors")
    nested = [root.get(key) for key in NESTED]
    for group in [root, *(value for value in nested if isinstance(value, dict))]:
        tensors = {key: value for key, value in group.items() if isinstance(value, Tensor)}
        if odd := [key for key in tensors if not isinstance(key, str)]:
            raise UserError(f"{path} has a tensor named {shown(odd[0])}: expected a text")
        if tensors:
            return tensors
    keys = ", ".join(shown(key, 30) for key in list(root)[:8]) or "nothing"
    raise UserError(
        f"{path} holds no tensors at its top or under {', '.join(NESTED)}, but {keys}: save the "
        "network's state_dict() by itself"
    )


def _materialise(path: Path, tensors: dict[str, Tensor], load: _Load) -> dict[str, np.ndarray]:
    """Arrays of the tensors, which may share storages and are no larger than the file together."""
    left = path.stat().st_size
    storages: dict[str, bytes] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage, count = tensor.storage, math.prod(tensor.size)
        left -= count * _dtype(storage).itemsize
        if left < 0:
            raise too_much(path, "its tensors share storages and are larger than the file")
        if count == 0:
            raise UserError(f"{path}: tensor {shown(name)} has no elements: expected weights")
        steps = zip(tensor.size, tensor.stride, strict=True)
        last = tensor.offset + sum((size - 1) * stride for size, stride in steps)
        if last >= storage.count or count > storage.count:
            raise damaged(
                path,
                f"tensor {shown(name)} reaches element {shown(last)} of a storage of "
                f"{shown(storage.count)}",
            )
        if storage.key not in storages:
            storages[storage.key] = load(storage)
        if len(storages[storage.key]) != storage.count * _dtype(storage).itemsize:
            raise damaged(path, f"storage {shown(storage.key)} is not as long as its tensors say")
        arrays[name] = _view(tensor, storages[storage.key])
    return arrays


def _view(tensor: Tensor, data: bytes) -> np.ndarray:
    flat = np.frombuffer(data, _dtype(tensor.storage))[tensor.offset :]
    # The stride of a dimension of 1 means nothing, and may be out of numpy's range.
    pairs = zip(tensor.size, tensor.stride, strict=True)
    strides = [0 if size == 1 else stride * flat.itemsize for size, stride in pairs]
    view = np.lib.stride_tricks.as_strided(flat, tensor.size, strides, writeable=False)
    return np.asarray(view, order="C")


def _dtype(storage: Storage) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if storage.dtype == "bfloat16" else storage.dtype)
