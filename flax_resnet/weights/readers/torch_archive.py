"""Checkpoints saved by torch, as a ZIP (1.6 and later) or as the pickles before, without torch."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flax_resnet.errors import UserError, first_few
from flax_resnet.weights.architectures import check_name
from flax_resnet.weights.readers.torch_pickle import Inert, Storage, Tensor, Unpickler
from flax_resnet.weights.readers.untrusted import Info, LimitedFile, Select, open_zip, shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
# Entries of a list that is looked into for tensors, and characters of all dotted names.
MAX_LIST, MAX_NAMES = 100, 2 * 10**7
# Bytes of a pickle, whose objects take up to 120 times as many. A state dict takes about 120 for a
# tensor.
MAX_PICKLE = 1_500_000
SAVE = (
    'in the program that made it `torch.save(net.state_dict(), "net.pth")` writes one that is read'
)

_Load = Callable[[Storage], bytes]


def read_torch(path: Path, select: Select) -> dict[str, np.ndarray]:
    """The tensors that ``select`` chooses, by the names that it gives them.

    "state_dict.fc.bias" is the entry "fc.bias" of the entry "state_dict". UserError for a file
    that is damaged or holds no tensors by name.
    """
    try:
        with LimitedFile(io.FileIO(path)) as file:
            root, load = (_open_zip if file.peek(2)[:2] == b"PK" else _open_legacy)(path, file)
            if isinstance(arch := root.get("arch") if isinstance(root, dict) else None, str):
                check_name(arch)  # timm's and torchvision's training say it
            tensors, unread = _flatten(path, root)
            infos = {name: Info(x.size, str(x.storage.dtype)) for name, x in tensors.items()}
            chosen = select(infos, unread)
            named = {new: tensors[name] for name, new in chosen.items()}
            return _arrays(named, load, path.stat().st_size)
    except (UserError, OSError):
        raise
    except Exception as error:  # zipfile and pickle raise a dozen kinds on damaged bytes
        reason = shown(str(error), 200) if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not read, to be safe ({reason}): it is damaged, or no checkpoint as "
            f"torch.save writes it; copy it again, or {SAVE}"
        ) from error


def _open_zip(path: Path, file: LimitedFile) -> tuple[Any, _Load]:
    archive = open_zip(file)
    names, members = archive.namelist(), archive.infolist()
    tops = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    prefix = tops[0].removesuffix("data.pkl") if tops else ""
    if len(tops) != 1 or f"{prefix}constants.pkl" in names:
        raise UserError(
            f"{path} is a ZIP, but no state dict by torch.save: of a Keras model give what its "
            "save_weights() writes, of a TorchScript program torch.save its state_dict()"
        )
    # So all that is read is no larger than the file, also where members overlap.
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    if not stored or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are compressed, overlap, or are larger than the file")
    if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
        raise ValueError("it was not saved on a little-endian machine")
    if archive.getinfo(tops[0]).file_size > MAX_PICKLE:
        raise ValueError(f"its pickle is larger than {MAX_PICKLE} bytes")
    root = Unpickler(io.BytesIO(archive.read(tops[0]))).load()
    return root, lambda storage: archive.read(f"{prefix}data/{storage.key}")


def _open_legacy(path: Path, file: BinaryIO) -> tuple[Any, _Load]:
    stream = io.BytesIO(file.read(MAX_PICKLE))
    magic, protocol, system = (Unpickler(stream).load() for _ in range(3))
    if (magic, protocol) != (LEGACY_MAGIC, 1001):
        raise ValueError("it does not start as torch.save starts a file")
    if system["little_endian"] is not True:
        raise ValueError("it was not saved on a little-endian machine")
    unpickler = Unpickler(stream)
    root, keys = unpickler.load(), Unpickler(stream).load()
    at, total = stream.tell(), path.stat().st_size
    starts: dict[str, int] = {}
    for key in keys:  # the storages follow one another, each behind its length
        storage = unpickler.storages[key]
        file.seek(at)
        count = struct.unpack("<q", file.read(8))[0]
        starts[key] = at + 8
        at += 8 + storage.nbytes
        if count * storage.dtype.itemsize != storage.nbytes or not starts[key] <= at <= total:
            raise ValueError(f"storage {key} is not as long as its tensors say")

    def load(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return root, load


def _flatten(path: Path, root: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors in what a checkpoint holds, by dotted names; classes of what is inert there)."""
    tensors: dict[str, Tensor] = {}
    unread: dict[str, str] = {}
    queue, visited, length = [("", root)], set[int](), 0
    for prefix, node in queue:  # it grows
        is_list = type(node) in (list, tuple) and len(node) < MAX_LIST
        if id(node) in visited or not (isinstance(node, dict) or is_list):
            continue
        visited.add(id(node))
        for key, value in enumerate(node) if is_list else node.items():
            if not isinstance(value, (dict, list, tuple)):  # a Tensor is a tuple
                continue
            name = f"{prefix}{key}"
            length += len(name)
            if length > MAX_NAMES:
                raise ValueError("the names in it are too long")
            if isinstance(value, Tensor):
                tensors[name] = value
            elif isinstance(value, Inert) and not value:
                unread[name] = value.name
            else:
                queue.append((f"{name}.", value))
    if not tensors:
        some = [f"{shown(name, 30)}, a {shown(kind)[1:-1]}" for name, kind in unread.items()]
        if isinstance(root, Inert):
            some.append(f"a {shown(root.name)[1:-1]}")
        elif not some:
            some = [shown(key, 30) for key in root] if isinstance(root, dict) else [shown(root)]
        raise UserError(
            f"{path} holds no tensors by name, but {first_few(some) or 'nothing'}: {SAVE}"
        )
    return tensors, unread


def _arrays(tensors: dict[str, Tensor], load: _Load, left: int) -> dict[str, np.ndarray]:
    """Arrays of the tensors, which may share storages, of no more than ``left`` bytes."""
    storages: dict[str, bytes] = {}
    arrays = {}
    for name, (storage, offset, size, stride) in tensors.items():
        itemsize = storage.dtype.itemsize
        left -= math.prod(size) * itemsize
        if left < 0:
            raise ValueError("its tensors share storages and are larger than the file")
        steps = list(zip(size, stride, strict=True))
        last = offset + sum((length - 1) * step for length, step in steps)
        if (last + 1) * itemsize > storage.nbytes:  # numpy's own check would overflow
            raise ValueError(f"tensor {name} reaches beyond its storage")
        if storage.key not in storages:
            storages[storage.key] = load(storage)
        if len(storages[storage.key]) != storage.nbytes:
            raise ValueError(f"storage {storage.key} is not as long as its tensors say")
        # The stride of a dimension of 1 means nothing, and may be out of numpy's range.
        strides = [0 if length == 1 else step * itemsize for length, step in steps]
        data = storages[storage.key]
        view: np.ndarray = np.ndarray(size, storage.dtype, data, offset * itemsize, strides)
        arrays[name] = np.asarray(view, order="C")
    return arrays
