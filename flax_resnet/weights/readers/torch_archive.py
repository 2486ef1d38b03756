"""State dicts saved by torch, as a ZIP (1.6 and later) or as the pickles of before, without torch.

``pickle._Unpickler`` is the unpickler that is written in Python: opcodes can be left out of it,
and it allocates nothing that a file merely asks for, as the one in C does. Names in a pickle are
looked up in a table here and never imported.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from flax_resnet.errors import UserError
from flax_resnet.weights.readers.untrusted import LimitedFile, open_zip, shown

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = b"\x80\x02\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")
# Where a checkpoint keeps its network's tensors when they are not at the top.
NESTED = ("state_dict", "model_state_dict", "model", "net", "params")
# Bytes of a pickle, whose objects take up to 120 times as many. A state dict takes about 120 for a
# tensor.
MAX_PICKLE = 1_500_000


class Storage(NamedTuple):
    """Numbers that lie elsewhere in the file."""

    key: str
    dtype: np.dtype
    nbytes: int


class Tensor(NamedTuple):
    """A view of a storage, in elements; it may reach beyond the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


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
        with LimitedFile(io.FileIO(path)) as file:
            root, load = (_open_zip if file.peek(2)[:2] == b"PK" else _open_legacy)(path, file)
            return _arrays(_select(path, root), load, path.stat().st_size)
    except (UserError, OSError):
        raise
    except Exception as error:  # zipfile and pickle raise a dozen kinds on damaged bytes
        reason = shown(str(error), 200) if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not read, to be safe ({reason}): it is damaged, or holds more than tensors "
            "and plain values; if you trust where it comes from, load it in torch by "
            "torch.load(..., weights_only=True) and write its tensors by safetensors' save_file"
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
        raise _big_endian(path)
    if archive.getinfo(tops[0]).file_size > MAX_PICKLE:
        raise ValueError(f"its pickle is larger than {MAX_PICKLE} bytes")
    root = _Unpickler(io.BytesIO(archive.read(tops[0]))).load()
    return root, lambda storage: archive.read(f"{prefix}data/{storage.key}")


def _open_legacy(path: Path, file: BinaryIO) -> tuple[Any, _Load]:
    stream = io.BytesIO(file.read(MAX_PICKLE))
    magic, protocol, system = (_Unpickler(stream).load() for _ in range(3))
    if (magic, protocol) != (LEGACY_MAGIC, 1001):
        raise ValueError("it does not start as torch.save starts a file")
    if system["little_endian"] is not True:
        raise _big_endian(path)
    unpickler = _Unpickler(stream)
    root, keys = unpickler.load(), _Unpickler(stream).load()
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


def _big_endian(path: Path) -> UserError:
    return UserError(f"{path} was not saved on a little-endian machine: save it again on one")


def _select(path: Path, root: Any) -> dict[str, Tensor]:
    """The tensors of the network in what a checkpoint holds."""
    if not isinstance(root, dict):
        raise UserError(f"{path} holds {shown(root)}: expected a state dict, tensors by name")
    for group in (root, *(root.get(key) for key in NESTED)):
        values = group if isinstance(group, dict) else {}
        if tensors := {str(key): v for key, v in values.items() if isinstance(v, Tensor)}:
            return tensors
    keys = ", ".join(shown(key, 30) for key in list(root)[:8]) or "nothing"
    raise UserError(
        f"{path} holds no tensors at its top or under {', '.join(NESTED)}, but {keys}: save the "
        "network's state_dict() by itself"
    )


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


class _Dict(dict):
    """A dict of a pickle, with texts and small integers as keys.

    Hashing a deeply nested tuple overflows the C stack, and long integers can be made to collide.
    """

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str and not (type(key) is int and key.bit_length() < 64):
            raise TypeError(f"{shown(key)} as a key of a dict")
        super().__setitem__(key, value)


# Untyped, for the interpreter's stubs leave out what is replaced here.
_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    """Reads one pickle, and leaves its stream behind it."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.dispatch = _HANDLERS

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _NAMES:
            raise ValueError(f"its pickle refers to {module}.{name}, which could run code")
        return _NAMES[f"{module}.{name}"]

    def persistent_load(self, identity: Any) -> Storage:
        kind, dtype, key, _, count, *view = identity
        if kind != "storage" or not isinstance(dtype, np.dtype) or view not in ([], [None]):
            raise ValueError("its pickle refers to an object that is no storage")
        if type(key) is not str or type(count) is not int:
            raise TypeError("a storage without a key or a length")
        found = Storage(key, dtype, count * dtype.itemsize)
        storage = self.storages.setdefault(key, found)
        if storage != found:
            raise ValueError(f"storage {key} has two types or lengths")
        return storage

    def load_call(self) -> None:
        """REDUCE and NEWOBJ, of the functions that ``find_class`` gives."""
        function, arguments = self.stack[-2:]
        if not callable(function) or type(arguments) is not tuple:
            raise ValueError(f"its pickle calls {shown(function)}")
        self.stack[-2:] = [function(*arguments)]

    def load_build(self) -> None:
        """BUILD: the versions of torch's modules and the flags of a parameter are passed over."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (_Dict, Tensor)):
            raise ValueError(f"its pickle sets the inner state of {shown(self.stack[-1])}")


def _refuse(unpickler: Any) -> None:
    raise ValueError("its pickle has an opcode that a state dict does not need")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *flags: Any) -> Tensor:
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise TypeError("a tensor without a storage, a size or a stride")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, size or stride is no count")
    return Tensor(storage, offset, size, stride)


_DTYPES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": ml_dtypes.bfloat16,
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_NAMES: dict[str, Any] = {
    **{f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in _DTYPES.items()},
    **{f"torch.{np.dtype(dtype)}": np.dtype(dtype) for dtype in _DTYPES.values()},
    "collections.OrderedDict": lambda: _Dict(),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *flags: tensor,
    "torch.nn.parameter.Parameter": lambda tensor, *flags: tensor,
}
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
)
_HANDLERS: dict[int, Any] = {
    **dict.fromkeys(range(256), _refuse),
    **{code[0]: _Python.dispatch[code[0]] for code in _OPCODES},
    pickle.EMPTY_DICT[0]: lambda unpickler: unpickler.append(_Dict()),
    pickle.REDUCE[0]: _Unpickler.load_call,
    pickle.NEWOBJ[0]: _Unpickler.load_call,
    pickle.BUILD[0]: _Unpickler.load_build,
}
