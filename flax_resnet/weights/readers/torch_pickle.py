"""The pickle in a torch file, read without torch: tensors, plain values, and inert ones.

``pickle._Unpickler`` is the unpickler that is written in Python: opcodes can be left out of it,
and it allocates nothing that a file merely asks for, as the one in C does. Names in a pickle are
looked up in a table here and never imported: what is not in the table becomes an ``Inert`` value.
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from flax_resnet.weights.readers.untrusted import shown


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


class _Dict(dict):
    """A dict of a pickle; entries whose keys are no texts or small integers are left out.

    Hashing a deeply nested tuple overflows the C stack, and long integers can be made to collide.
    """

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is str or (type(key) is int and key.bit_length() < 64):
            super().__setitem__(key, value)


class Inert(_Dict):
    """What stands for a class or function that is not in the table, and for what it makes.

    Its items are kept: it may be a dict.
    """

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def append(self, *items: Any) -> None:
        """Items that have no name are passed over."""

    extend = append


# Untyped, for the interpreter's stubs leave out what is replaced here.
_Python: Any = pickle._Unpickler


class Unpickler(_Python):
    """Reads one pickle, and leaves its stream behind it."""

    def __init__(self, stream: BinaryIO):
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self.dispatch = _HANDLERS

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for in the table."""
        full = f"{module}.{name}"
        return _NAMES[full] if full in _NAMES else Inert(full)

    def persistent_load(self, identity: Any) -> Any:
        """A storage, by its place in the file."""
        kind, dtype, key, *rest = identity
        if isinstance(dtype, Inert):  # or a class with its source, in the files of before 1.6
            return dtype
        types = (isinstance(dtype, np.dtype), type(key), type(rest[1]))
        if kind != "storage" or types != (True, str, int) or rest[2:] not in ([], [None]):
            raise ValueError("its pickle refers to an object that is no storage")
        found = Storage(key, dtype, rest[1] * dtype.itemsize)
        storage = self.storages.setdefault(key, found)
        if storage != found:
            raise ValueError(f"storage {key} has two types or lengths")
        return storage

    def load_call(self) -> None:
        """REDUCE and NEWOBJ: a call of a function in the table, else an inert value."""
        function, arguments = self.stack[-2:]
        if isinstance(function, Inert):
            self.stack[-2:] = [Inert(function.name)]
        elif callable(function) and type(arguments) is tuple:
            self.stack[-2:] = [function(*arguments)]
        else:
            raise ValueError(f"its pickle calls {shown(function)}")

    def load_call_by_name(self) -> None:
        """NEWOBJ_EX, whose arguments by name are passed over."""
        self.stack.pop()
        self.load_call()

    def load_build(self) -> None:
        """BUILD: the inner state of an object is passed over."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (_Dict, Tensor)):
            raise ValueError(f"its pickle sets the inner state of {shown(self.stack[-1])}")

    def load_frozenset(self) -> None:
        """FROZENSET: a set and what is in it are passed over."""
        self.pop_mark()
        self.append(None)


def _refuse(unpickler: Any) -> None:
    raise ValueError("its pickle has an opcode that a state dict does not need")


def _ordered(items: Any = ()) -> _Dict:
    """An OrderedDict; Python 2 gives it its items."""
    found = _Dict()
    for key, value in items:
        found[key] = value
    return found


def _typed(function: Any, kind: Any, arguments: Any, *state: Any) -> Any:
    """A tensor with attributes; one of another class is inert."""
    return function(*arguments) if kind.name == "torch.Tensor" and function is _tensor else kind


def _same(tensor: Any, *flags: Any) -> Any:
    """A parameter: its tensor."""
    return tensor


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *flags: Any) -> Any:
    if isinstance(storage, Inert):
        return storage
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
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.nn.parameter.Parameter": _same,
}
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.POP, pickle.POP_MARK),
)
_HANDLERS: dict[int, Any] = {
    **dict.fromkeys(range(256), _refuse),
    **{code[0]: _Python.dispatch[code[0]] for code in _OPCODES},
    pickle.EMPTY_DICT[0]: lambda unpickler: unpickler.append(_Dict()),
    pickle.REDUCE[0]: Unpickler.load_call,
    pickle.NEWOBJ[0]: Unpickler.load_call,
    pickle.NEWOBJ_EX[0]: Unpickler.load_call_by_name,
    pickle.EMPTY_SET[0]: _Python.dispatch[pickle.NONE[0]],
    pickle.ADDITEMS[0]: Unpickler.pop_mark,
    pickle.FROZENSET[0]: Unpickler.load_frozenset,
    pickle.BUILD[0]: Unpickler.load_build,
}
