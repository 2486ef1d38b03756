"""Pickles of state dicts, read by Python's unpickler with all that could run code taken out.

``pickle._Unpickler`` is the unpickler that is written in Python. Its handler of each opcode can be
left out or replaced, and its memo is a dict; the one in C allocates the memo that a file asks for.
Names in a pickle are looked up in a table here and never imported. Tensors and storages become
inert records.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from flax_resnet.errors import UserError
from flax_resnet.pretrained.untrusted import MAX_RANK, damaged, shown, too_much

# A state dict takes about 35 opcodes for a tensor; an opcode makes up to 100 bytes of objects.
MAX_OPCODES = 500_000


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Numbers that lie elsewhere in the file: their key, dtype and count."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage, in elements; it may reach beyond the storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Dict(dict):
    """A dict or an OrderedDict of a pickle, with texts and small integers as keys.

    Hashing a deeply nested tuple overflows the C stack, and long integers can be made to collide.
    """

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is not str and not (type(key) is int and key.bit_length() < 64):
            raise TypeError(f"{shown(key)} as a key of a dict")
        super().__setitem__(key, value)


def refused(path: Path, what: str) -> UserError:
    """The error for a pickle with more in it than tensors and plain values."""
    out = path.with_suffix(".safetensors")
    code = (
        "import torch, safetensors.torch as s; "
        f'd = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=True); '
        'd = d.get("state_dict", d); '
        "s.save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
        f"{json.dumps(str(out))})"
    )
    return UserError(
        f"{path} is not read, to be safe: {what}; if you trust where it comes from, convert it "
        f"in an environment with torch: python -c {shlex.quote(code)}"
    )


def unpickle(stream: BinaryIO, path: Path) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle from where ``stream`` stands, and leaves it behind the last opcode.

    Args:
      stream: the pickle.
      path: the file to name in an error.

    Returns:
      (dicts, lists, tuples, numbers, texts and tensors, which may contain themselves; every
      storage that they mention, by key).

    Raises:
      UserError: the pickle holds anything else.
      Exception: of any kind, where the pickle is damaged.
    """
    unpickler = _Unpickler(stream, path)
    return unpickler.load(), unpickler.storages


# Untyped, for the interpreter's stubs leave out what is replaced here.
_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    """The unpickler of one pickle."""

    def __init__(self, stream: BinaryIO, path: Path):
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.path = path
        self.dispatch = _Handlers(path)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if f"{module}.{name}" == "collections.OrderedDict":
            return self.ordered_dict
        if f"{module}.{name}" not in _FUNCTIONS:
            dotted = shown(f"{module}.{name}")
            raise refused(self.path, f"its pickle refers to {dotted}, which could run code")
        return _FUNCTIONS[f"{module}.{name}"]

    def persistent_load(self, identity: Any) -> Storage:
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise refused(self.path, "its pickle refers to an object that is no storage")
        _, dtype, key, _, count, *view = identity
        if type(dtype) is not str or dtype not in _DTYPES.values():
            raise refused(self.path, f"its pickle has a storage of type {shown(dtype)}")
        if view not in ([], [None]):
            raise refused(self.path, "its pickle has a storage inside another, of torch < 0.4")
        if type(key) is not str or type(count) is not int:
            raise TypeError("a storage without a key or a length")
        storage = self.storages.setdefault(key, Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise damaged(self.path, f"storage {shown(key)} has two types or lengths")
        return storage

    def ordered_dict(self, pairs: Any = ()) -> _Dict:
        """An OrderedDict, of a list of pairs where Python 2 wrote it."""
        self.dispatch.count(len(pairs))  # one list may be copied by many opcodes
        filled = _Dict()
        for key, value in pairs:
            filled[key] = value
        return filled

    def load_call(self) -> None:
        """REDUCE and NEWOBJ, of the functions that ``find_class`` gives."""
        function, arguments = self.stack[-2:]
        if not callable(function) or type(arguments) is not tuple:
            raise refused(self.path, f"its pickle calls {shown(function)}")
        self.stack[-2:] = [function(*arguments)]

    def load_build(self) -> None:
        """BUILD: the versions of torch's modules and the flags of a parameter are passed over."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (_Dict, Tensor)):
            what = shown(self.stack[-1])
            raise refused(self.path, f"its pickle sets the inner state of {what}")


class _Handlers(dict[int, Callable[[Any], None]]):
    """The unpickler's methods by opcode; no more than ``MAX_OPCODES`` of them may be taken."""

    def __init__(self, path: Path):
        super().__init__(_HANDLERS)
        self._path, self._left = path, MAX_OPCODES

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.count(1)
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Any:
        what = f"its pickle uses the opcode {bytes([code])!r}, which a state dict does not need"
        raise refused(self._path, what)

    def count(self, opcodes: int) -> None:
        """Raises UserError where so many are too many."""
        self._left -= opcodes
        if self._left < 0:
            raise too_much(self._path, f"its pickle has more than {MAX_OPCODES} opcodes")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *flags: Any) -> Tensor:
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise TypeError("a tensor without a storage, a size or a stride")
    if len(size) != len(stride) or len(size) > MAX_RANK:
        raise ValueError(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, size or stride is no count")
    return Tensor(storage, offset, size, stride)


def _parameter(tensor: Any, *flags: Any) -> Any:
    return tensor


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
}
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
# torch's classes of storages, and its dtypes, of which a checkpoint may mention one.
_DTYPES = {
    **{f"{kind}Storage": dtype for kind, dtype in _STORAGES.items()},
    **{dtype: dtype for dtype in _STORAGES.values()},
    **{"half": "float16", "float": "float32", "double": "float64", "long": "int64"},
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
_HANDLERS = {
    **{opcode[0]: _Python.dispatch[opcode[0]] for opcode in _OPCODES},
    pickle.EMPTY_DICT[0]: lambda unpickler: unpickler.append(_Dict()),
    pickle.REDUCE[0]: _Unpickler.load_call,
    pickle.NEWOBJ[0]: _Unpickler.load_call,
    pickle.BUILD[0]: _Unpickler.load_build,
}
