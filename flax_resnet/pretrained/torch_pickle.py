"""What a pickle of a state dict says, worked out without running any of it.

``pickletools.genops`` splits the bytes into opcodes; the machine here knows the few that plain
containers, numbers, strings and tensors need. Tensors and storages become inert records. The
names in a pickle are compared with a list and never imported.
"""

from __future__ import annotations

import dataclasses
import json
import pickletools
import shlex
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from flax_resnet.errors import UserError
from flax_resnet.pretrained.untrusted import MAX_RANK, damaged, shown, too_much

MAX_BYTES = 64 * 2**20
# A state dict takes about 35 for a tensor; each may cost about a hundred bytes and 2 us.
MAX_OPCODES = 500_000

STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
    "torch ComplexFloatStorage": "complex64",
    "torch ComplexDoubleStorage": "complex128",
}
_ORDERED_DICT = "collections OrderedDict"
_PARAMETER = "torch.nn.parameter Parameter"
# How many arguments each function takes that makes a tensor.
_REBUILD = {
    "torch._utils _rebuild_tensor": (4,),
    "torch._utils _rebuild_tensor_v2": (6, 7),
    "torch._utils _rebuild_parameter": (3,),
}
_DTYPES = {f"torch {name}" for name in [*STORAGES.values(), "half", "float", "double", "long"]}
_GLOBALS = {_ORDERED_DICT, _PARAMETER, *_REBUILD, *STORAGES, *_DTYPES}


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A run of numbers kept elsewhere in the file."""

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage, in elements; nothing here is checked against the storage yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Global(str):
    """A name that the pickle refers to."""


class _Ordered(dict):
    """What was an OrderedDict; torch hangs the versions of its modules on one."""


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


def unpickle(stream: BinaryIO, path: Path, opcodes: int = MAX_OPCODES) -> Any:
    """Reads one pickle from where ``stream`` stands, and leaves it behind the last opcode.

    Args:
      stream: holds no more than ``MAX_BYTES``.
      path: the file to name in an error.
      opcodes: how many it may have.

    Returns:
      Dicts, lists, tuples, numbers, strings, ``Storage`` and ``Tensor``. Containers may contain
      themselves.

    Raises:
      UserError: the pickle is damaged, or holds anything else.
    """
    machine = _Machine(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in texts
            for position, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if position >= opcodes:
                    raise too_much(path, f"its pickle has more than {opcodes} opcodes")
                machine.step(opcode.name, argument)
        return machine.result()
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        reason = shown(str(error)) if str(error) else type(error).__name__
        raise damaged(path, f"its pickle breaks off or makes no sense ({reason})") from error


class _Machine:
    """The stack, the marks on it and the memo of a pickle."""

    def __init__(self, path: Path):
        self._path = path
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self._copied = 0
        self._handlers: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(_PUSHED, self._push),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self._get),
            **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _: None),
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True),
            "NEWFALSE": lambda _: self._push(False),
            "EMPTY_LIST": lambda _: self._push([]),
            "EMPTY_DICT": lambda _: self._push({}),
            "EMPTY_TUPLE": lambda _: self._push(()),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "MARK": self._mark,
            "TUPLE1": lambda _: self._push(tuple(self._pop(1))),
            "TUPLE2": lambda _: self._push(tuple(self._pop(2))),
            "TUPLE3": lambda _: self._push(tuple(self._pop(3))),
            "TUPLE": lambda _: self._push(tuple(self._pop_mark())),
            "LIST": lambda _: self._push(self._pop_mark()),
            "DICT": lambda _: self._push(self._fill({}, self._pop_mark())),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_mark()),
            "SETITEM": lambda _: self._set(self._pop(2)),
            "SETITEMS": lambda _: self._set(self._pop_mark()),
            "GLOBAL": self._global,
            "STACK_GLOBAL": lambda _: self._stack_global(),
            "BINPERSID": lambda _: self._storage(),
            "REDUCE": lambda _: self._reduce(),
            "NEWOBJ": lambda _: self._parameter(),
            "BUILD": lambda _: self._build(),
        }

    def step(self, name: str, argument: Any) -> None:
        """Carries out one opcode."""
        handler = self._handlers.get(name)
        if handler is None:
            raise refused(self._path, f"its pickle uses {name}, which a state dict does not need")
        handler(argument)

    def result(self) -> Any:
        """What is left when the pickle is through."""
        if self._below or len(self._stack) != 1:
            raise ValueError(f"{len(self._stack)} values left at the end")
        return self._stack[0]

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("a value is missing")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._below.pop()
        return values

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _append(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError(f"append to {shown(self._stack[-1])}")
        self._stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        if type(self._stack[-1]) not in (dict, _Ordered):
            raise TypeError(f"set an item of {shown(self._stack[-1])}")
        self._fill(self._stack[-1], values)

    def _fill(self, target: dict, values: list[Any]) -> dict:
        if len(values) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing a deep tuple overflows the C stack, and long numbers can be made to collide.
            if not (type(key) is str or (type(key) is int and key.bit_length() < 64)):
                raise refused(self._path, f"its pickle has {shown(key)} as a key in a dict")
            target[key] = value
        return target

    def _global(self, name: str) -> None:
        if name not in _GLOBALS:
            dotted = shown(name.replace(" ", ".", 1))
            raise refused(self._path, f"its pickle refers to {dotted}, which could run code")
        self._push(_Global(name))

    def _stack_global(self) -> None:
        module, name = self._pop(2)
        if type(module) is not str or type(name) is not str:
            raise TypeError("a global's name is no text")
        self._global(f"{module} {name}")

    def _storage(self) -> None:
        (identity,) = self._pop(1)
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise refused(self._path, "its pickle refers to an object that is no storage")
        _, kind, key, location, count, *view = identity
        if type(kind) is not _Global or kind not in STORAGES:
            raise refused(self._path, f"its pickle has a storage of type {shown(kind)}")
        if view not in ([], [None]):
            raise refused(self._path, "its pickle has a storage inside another, of torch < 0.4")
        if type(key) is not str or type(location) is not str or type(count) is not int:
            raise TypeError("a storage without a key, a place or a length")
        self._push(Storage(key, STORAGES[kind], count))

    def _reduce(self) -> None:
        function, arguments = self._pop(2)
        if type(function) is not _Global or type(arguments) is not tuple:
            raise refused(self._path, f"its pickle calls {shown(function)}")
        if function == _ORDERED_DICT:
            self._push(self._ordered_dict(arguments))
        elif len(arguments) not in _REBUILD.get(function, ()):
            raise refused(self._path, f"its pickle calls {shown(function)} in an unknown way")
        elif len(arguments) == 3:
            if type(arguments[0]) is not Tensor:
                raise TypeError("a parameter without a tensor")
            self._push(arguments[0])
        else:
            self._push(_tensor(*arguments[:4]))

    def _ordered_dict(self, arguments: tuple) -> _Ordered:
        if not arguments:
            return _Ordered()
        (pairs,) = arguments
        if type(pairs) is not list or any(type(p) not in (list, tuple) for p in pairs):
            raise TypeError("an OrderedDict of something else than pairs")
        # One list in the memo could be copied by each of the opcodes that follow.
        self._copied += len(pairs)
        if self._copied > MAX_OPCODES:
            raise too_much(self._path, f"its pickle copies more than {MAX_OPCODES} values")
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("an OrderedDict of something else than pairs")
        return _Ordered(self._fill({}, [value for pair in pairs for value in pair]))

    def _parameter(self) -> None:
        """What torch < 0.4 made of a parameter: an object, then its flags as a state."""
        kind, arguments = self._pop(2)
        known = type(kind) is _Global and kind == _PARAMETER and type(arguments) is tuple
        if not known or len(arguments) not in (1, 2) or type(arguments[0]) is not Tensor:
            raise refused(self._path, f"its pickle makes an object of {shown(kind)}")
        self._push(arguments[0])

    def _build(self) -> None:
        (state,) = self._pop(1)
        target = self._stack[-1]
        versions = type(target) is _Ordered and type(state) in (dict, _Ordered)
        flags = type(target) is Tensor and type(state) is tuple and len(state) <= 4
        plain = flags and all(type(value) in (bool, type(None), _Ordered) for value in state)
        if not versions and not plain:
            raise refused(self._path, f"its pickle sets the inner state of {shown(target)}")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
        raise TypeError("a tensor without a storage, a size or a stride")
    if len(size) != len(stride) or len(size) > MAX_RANK:
        raise ValueError(f"a tensor of {len(size)} dimensions and {len(stride)} strides")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise ValueError("a tensor whose offset, size or stride is no count")
    return Tensor(storage, offset, size, stride)


_PUSHED = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
