"""State dicts saved by torch, as a ZIP (1.6 and later) or as the pickles of before."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from flax_resnet.errors import UserError
from flax_resnet.pretrained import torch_pickle
from flax_resnet.pretrained.stored_zip import StoredZip
from flax_resnet.pretrained.torch_pickle import Storage, Tensor, unpickle
from flax_resnet.pretrained.untrusted import damaged, shown, too_much

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
# Where a checkpoint keeps its network's tensors when they are not at the top.
NESTED = ("state_dict", "model_state_dict", "model", "net", "params")
# Tensors may share a storage, as tied weights do; all together are at most so many files.
MAX_COPIES = 4
_COUNT = struct.Struct("<q")

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
    with path.open("rb") as file:
        start = file.read(4)
        root, load = (_open_zip if start[:2] == b"PK" else _open_legacy)(path, file)
        return _materialise(path, _select(path, root), load)


def _open_zip(path: Path, file: BinaryIO) -> tuple[Any, _Load]:
    archive = StoredZip(path, file)
    tops = [name for name in archive.names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(tops) != 1:
        raise UserError(
            f"{path} is a ZIP archive with {len(tops)} members NAME/data.pkl where torch.save "
            "writes one: expected a state dict saved by torch.save"
        )
    prefix = tops[0].removesuffix("data.pkl")
    script = (f"{prefix}code/", f"{prefix}constants.pkl")
    if any(name.startswith(script) for name in archive.names):
        raise UserError(
            f"{path} is a TorchScript program, not a state dict: load it by torch.jit.load and "
            "torch.save its state_dict()"
        )
    order = f"{prefix}byteorder"
    if order in archive and (archive.size(order) > 16 or archive.read(order) != b"little"):
        raise UserError(
            f"{path} was not saved on a little-endian machine: load it there and save it again by "
            "safetensors.torch.save_file"
        )
    if archive.size(tops[0]) > torch_pickle.MAX_BYTES:
        raise too_much(path, f"its pickle is larger than {torch_pickle.MAX_BYTES} bytes")
    root = unpickle(io.BytesIO(archive.read(tops[0])), path)

    def load(storage: Storage) -> bytes:
        name, size = f"{prefix}data/{storage.key}", storage.count * _dtype(storage.dtype).itemsize
        if name not in archive or archive.size(name) != size:
            have = f"{archive.size(name)} bytes" if name in archive else "missing"
            raise damaged(path, f"storage {shown(storage.key)} of {shown(size)} bytes is {have}")
        return archive.read(name)

    return root, load


def _open_legacy(path: Path, file: BinaryIO) -> tuple[Any, _Load]:
    total = path.stat().st_size
    file.seek(0)
    stream = io.BytesIO(file.read(min(total, torch_pickle.MAX_BYTES)))
    magic, protocol, system = (unpickle(stream, path, 1000) for _ in range(3))
    if magic != LEGACY_MAGIC or type(protocol) is not int or protocol != 1001:
        raise damaged(path, "it does not start as torch.save starts a file")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise UserError(
            f"{path} was not saved on a little-endian machine: load it there and save it again by "
            "safetensors.torch.save_file"
        )
    root = unpickle(stream, path)
    keys = unpickle(stream, path)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise damaged(path, "the list of its storages is no list of names")
    start = stream.tell()
    ends: dict[str, tuple[int, int]] = {}

    def load(storage: Storage) -> bytes:
        if not ends:
            ends.update(_locate(path, file, total, keys, start, _storages(root)))
        if storage.key not in ends:
            raise damaged(path, f"storage {shown(storage.key)} is missing")
        begin, end = ends[storage.key]
        file.seek(begin)
        return file.read(end - begin)

    return root, load


def _storages(root: Any) -> dict[str, Storage]:
    """Every storage that tensors anywhere in ``root`` refer to, by key."""
    found: dict[str, Storage] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.setdefault(value.storage.key, value.storage)
        elif isinstance(value, Storage):
            found.setdefault(value.key, value)
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found


def _locate(
    path: Path, file: BinaryIO, total: int, keys: list[str], at: int, storages: dict[str, Storage]
) -> dict[str, tuple[int, int]]:
    """{key: (begin, end)} of the storages, which follow one another, each behind its length."""
    found: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in storages or key in found:
            raise damaged(path, f"storage {shown(key)} is in its list and not in its tensors")
        file.seek(at)
        head = file.read(_COUNT.size)
        storage = storages[key]
        if len(head) < _COUNT.size or _COUNT.unpack(head)[0] != storage.count:
            raise damaged(path, f"storage {shown(key)} is not as long as its tensors say")
        begin = at + _COUNT.size
        at = begin + storage.count * _dtype(storage.dtype).itemsize
        if at < begin or at > total:
            raise damaged(path, f"storage {shown(key)} goes beyond the end of the file")
        found[key] = begin, at
    return found


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
    budget = MAX_COPIES * path.stat().st_size
    storages: dict[str, tuple[Storage, bytes]] = {}
    arrays = {}
    for name, tensor in tensors.items():
        storage = tensor.storage
        _check_view(path, name, tensor)
        budget -= math.prod(tensor.size) * _dtype(storage.dtype).itemsize
        if budget < 0:
            raise too_much(path, f"its tensors share storages to more than {MAX_COPIES} files")
        if storage.key not in storages:
            storages[storage.key] = storage, load(storage)
        first, data = storages[storage.key]
        if (first.dtype, first.count) != (storage.dtype, storage.count):
            raise damaged(path, f"storage {shown(storage.key)} has two types or lengths")
        arrays[name] = _view(tensor, data)
    return arrays


def _check_view(path: Path, name: str, tensor: Tensor) -> None:
    """Raises UserError unless every element lies in the storage, and none is there twice."""
    storage, count = tensor.storage, math.prod(tensor.size)
    if count == 0:
        raise UserError(f"{path}: tensor {shown(name)} has no elements: expected weights")
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.size, tensor.stride, strict=True)
    )
    if last >= storage.count:
        raise damaged(
            path,
            f"tensor {shown(name)} reaches element {shown(last)} of a storage of "
            f"{shown(storage.count)}",
        )
    if count > storage.count:
        raise too_much(
            path, f"tensor {shown(name)} has {shown(count)} elements, its storage {storage.count}"
        )


def _view(tensor: Tensor, data: bytes) -> np.ndarray:
    flat = np.frombuffer(data, _dtype(tensor.storage.dtype))[tensor.offset :]
    # The stride of a dimension of 1 means nothing, and may be out of numpy's range.
    pairs = zip(tensor.size, tensor.stride, strict=True)
    strides = [0 if size == 1 else stride * flat.itemsize for size, stride in pairs]
    view = np.lib.stride_tricks.as_strided(flat, tensor.size, strides, writeable=False)
    return np.asarray(view, order="C")


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
