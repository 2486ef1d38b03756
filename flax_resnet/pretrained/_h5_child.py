"""Reads one HDF5 weight file in a process of its own, and writes the tensors to its output.

The HDF5 library crashes, hangs or takes gigabytes on some damaged files. This script is run for
one file, under limits, and imports nothing of this package:

    python _h5_child.py FILE BYTES [DIRECTORY_OF_A_LIBRARY ...]

The answer is an 8-byte length, so much JSON, then the bytes of the tensors, one after another.
The JSON is {"layout": ..., "tensors": [[key, dtype, shape], ...]} or {"problem": why},
or {"unusable": why} where h5py is not to be had.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_OBJECTS = 100_000
MAX_DEPTH = 32
MAX_RANK = 8
MAX_KEY = 1024
SPARE_MEMORY = 512 * 2**20
# Groups of Keras 3 that hold no weights: a dropout's random state lies beside its layer.
NO_WEIGHTS = {b"seed_generator"}


class Problem(Exception):
    """What is wrong with the file, as a part of a sentence."""


def main(path: str, size: int, output: BinaryIO) -> None:
    """Answers for one file of ``size`` bytes."""
    try:
        import h5py
    except ImportError as error:
        _answer(output, {"unusable": str(error)})
        return
    _limit(size)
    try:
        with h5py.File(path, "r", locking=False) as file:
            layout, found = survey(file.id, size)
            tensors = [[key, dtype, shape] for key, dtype, shape, _ in found]
            _answer(output, {"layout": layout, "tensors": tensors})
            for _, dtype, shape, dataset in found:
                output.write(read(dataset, dtype, shape))
    except Problem as problem:
        _answer(output, {"problem": str(problem)})
    output.flush()


def survey(root: Any, size: int) -> tuple[str, list[tuple[str, str, tuple[int, ...], Any]]]:
    """Finds the tensors of a file of ``size`` bytes, and reads none.

    Returns:
      (layout, [(key, dtype, shape, dataset), ...]).
    """
    if root.links.exists(b"model_weights"):
        root = _child(root, b"model_weights", "model_weights")
    names = _texts(root, "layer_names", size)
    if names is not None:
        layout, datasets = "keras_h5", _legacy(root, names, size)
    elif root.links.exists(b"layers"):
        layout, datasets = "keras_weights", _keras3(root)
    else:
        raise Problem(
            "it has neither an attribute layer_names nor a group layers, as Keras files do"
        )
    found = []
    seen: set[str] = set()
    left = size
    for key, dataset in datasets:
        if key in seen or len(key) > MAX_KEY or len(seen) >= MAX_OBJECTS:
            raise Problem(f"tensor {_shown(key)} is there twice, or one of too many")
        seen.add(key)
        dtype, shape, count = _describe(key, dataset, left)
        left -= count
        found.append((key, dtype, shape, dataset))
    if not found:
        raise Problem("no layer in it has weights")
    return layout, found


def read(dataset: Any, dtype: str, shape: tuple[int, ...]) -> memoryview:
    """The little-endian bytes of a dataset that ``survey`` has found."""
    import h5py
    import numpy as np

    # bfloat16 lies there as opaque pairs of bytes.
    kind = np.dtype("V2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")
    array = np.empty(shape, kind)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, array)
    return array.reshape(-1).view(np.uint8).data


def _legacy(root: Any, layers: list[str], size: int) -> Iterator[tuple[str, Any]]:
    """{layer}/{position} of the layers that the attribute lists."""
    for layer in layers:
        group = _walk(root, layer)
        for position, name in enumerate(_texts(group, "weight_names", size) or []):
            yield f"{layer}/{position}", _walk(group, name)


def _keras3(root: Any) -> Iterator[tuple[str, Any]]:
    """{path of the layer}/{index} of what lies in a group vars below layers."""
    import h5py

    if root.links.exists(b"vars") and len(_child(root, b"vars", "vars")):
        raise Problem("the model has weights of its own, outside its layers")
    seen: set[int] = set()
    waiting = [("", _child(root, b"layers", "layers"), 0)]
    while waiting:
        path, group, depth = waiting.pop()
        address = h5py.h5o.get_info(group).addr
        if depth > MAX_DEPTH or address in seen or len(seen) >= MAX_OBJECTS:
            raise Problem(f"group {_shown(path)} contains itself, or one of too many lies in it")
        seen.add(address)
        below = []
        for name in list(group):
            text = name.decode()
            where = f"{path}/{text}".lstrip("/")
            if name in NO_WEIGHTS:
                continue
            item = _child(group, name, where)
            if isinstance(item, h5py.h5g.GroupID):
                below.append((where, item, depth + 1))
            elif f"/{path}".endswith("/vars") and text.isdecimal():
                yield f"{path.removesuffix('vars').rstrip('/')}/{text}", item
            else:
                raise Problem(f"{_shown(where)} is no variable of a layer (LAYER/vars/NUMBER)")
        waiting += reversed(below)


def _walk(group: Any, path: str) -> Any:
    """What lies at a path below a group."""
    for part in path.split("/"):
        group = _child(group, part.encode(), path)
    return group


def _child(group: Any, name: bytes, where: str) -> Any:
    """A member of a group: a group or a dataset that lies in this file, never a mere link."""
    import h5py

    if not isinstance(group, h5py.h5g.GroupID):
        raise Problem(f"there is no group around {_shown(where)}")
    if name in (b"", b".") or not group.links.exists(name):
        raise Problem(f"{_shown(where)} is missing")
    if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise Problem(f"{_shown(where)} is a link to another place, which Keras never writes")
    item = h5py.h5o.open(group, name)
    if not isinstance(item, (h5py.h5g.GroupID, h5py.h5d.DatasetID)):
        raise Problem(f"{_shown(where)} is neither a group nor a dataset")
    return item


def _texts(group: Any, name: str, size: int) -> list[str] | None:
    """An attribute that lists names, in one piece or in name0, name1, ...; None without one."""
    import h5py

    if not isinstance(group, h5py.h5g.GroupID):
        raise Problem(f"a layer with {name} is a dataset, not a group")
    if h5py.h5a.exists(group, name.encode()):
        return _list_of_texts(group, name, size)
    texts: list[str] = []
    piece = 0
    while h5py.h5a.exists(group, f"{name}{piece}".encode()):
        texts += _list_of_texts(group, f"{name}{piece}", size)
        piece += 1
        if len(texts) > MAX_OBJECTS or piece > MAX_OBJECTS:
            raise Problem(f"{name} lists more than {MAX_OBJECTS} names")
    return texts if piece else None


def _list_of_texts(group: Any, name: str, size: int) -> list[str]:
    import h5py

    attribute = h5py.h5a.open(group, name.encode())
    shape = attribute.shape
    if shape is None or len(shape) != 1 or shape[0] > MAX_OBJECTS:
        raise Problem(f"attribute {name} is no list of names (its shape is {shape})")
    if shape[0] == 0:
        return []
    kind = attribute.get_type()
    if not isinstance(kind, h5py.h5t.TypeStringID) or attribute.get_storage_size() > size:
        raise Problem(f"attribute {name} holds something else than names")
    values = h5py.Group(group).attrs[name].tolist()
    texts = [value.decode() if isinstance(value, bytes) else value for value in values]
    if any(not isinstance(text, str) for text in texts):
        raise Problem(f"attribute {name} holds something else than names")
    return texts


def _describe(key: str, dataset: Any, left: int) -> tuple[str, tuple[int, ...], int]:
    """(dtype, shape, bytes) of a dataset that lies in the file as plain numbers."""
    import h5py

    what = f"tensor {_shown(key)}"
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise Problem(f"{what} is a group, not a dataset")
    plan = dataset.get_create_plist()
    layout = plan.get_layout()
    if layout == h5py.h5d.VIRTUAL or plan.get_external_count():
        raise Problem(f"{what} is stored in another file, which Keras never does")
    if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or plan.get_nfilters():
        raise Problem(f"{what} is stored in chunks or compressed, which Keras never does")
    dtype = _dtype(what, dataset)
    shape = dataset.get_space().get_simple_extent_dims()
    if dataset.get_space().get_simple_extent_type() == h5py.h5s.NULL or 0 in shape:
        raise Problem(f"{what} has no elements")
    if len(shape) > MAX_RANK:
        raise Problem(f"{what} has {len(shape)} dimensions, at most {MAX_RANK} are expected")
    count = math.prod(shape) * dataset.get_type().get_size()
    stored = dataset.get_storage_size()
    if count != stored or count > left:
        raise Problem(
            f"{what} of shape {shape} needs {count} bytes, the file holds {min(stored, left)}"
        )
    return dtype, shape, count


def _dtype(what: str, dataset: Any) -> str:
    import h5py

    kind, h5t = dataset.get_type(), h5py.h5t
    for name, same in {
        "float16": (h5t.IEEE_F16LE, h5t.IEEE_F16BE),
        "float32": (h5t.IEEE_F32LE, h5t.IEEE_F32BE),
        "float64": (h5t.IEEE_F64LE, h5t.IEEE_F64BE),
    }.items():
        if any(kind.equal(other) for other in same):
            return name
    marked = h5py.h5a.exists(dataset, b"dtype")
    if isinstance(kind, h5t.TypeOpaqueID) and kind.get_size() == 2 and marked:
        return "bfloat16"
    classes = {h5t.INTEGER: "integers", h5t.FLOAT: "unusual floats", h5t.STRING: "texts"}
    have = classes.get(kind.get_class(), "something else than numbers")
    raise Problem(f"{what} holds {have}, expected floats of 16, 32 or 64 bits")


def _shown(text: str) -> str:
    return ascii(text[:80])


def _answer(output: BinaryIO, answer: dict[str, Any]) -> None:
    text = json.dumps(answer).encode()
    output.write(struct.pack("<Q", len(text)) + text)


def _limit(size: int) -> None:
    """Bounds memory and CPU time by the file's size, where the platform can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = 2**30
    with contextlib.suppress(OSError):
        pages = Path("/proc/self/statm").read_text().split()[0]
        used = int(pages) * resource.getpagesize()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = usage.ru_utime + usage.ru_stime + size / 50e6
    for what, most in (
        (resource.RLIMIT_AS, used + 4 * size + SPARE_MEMORY),
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # macOS refuses some limits; the parent's timeout is left.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    sys.path += sys.argv[3:]
    main(sys.argv[1], int(sys.argv[2]), sys.stdout.buffer)
