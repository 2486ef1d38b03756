"""Keras weights in HDF5, alone or inside a ``.keras`` file.

A file in this format can name other files and places: links, external storage and virtual datasets
are refused before anything behind them is opened. No attribute is read, for damaged texts in them
make the library take gigabytes, and a damaged heap of names, which it would follow for ever, is
looked for first.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import h5py
import ml_dtypes
import numpy as np

from flax_resnet.records.files import error_as_one_line
from flax_resnet.weights.readers.untrusted import MAX_RANK, LimitedFile, open_zip, shown

Layout = Literal["keras_h5", "keras_weights"]

MAX_OBJECTS = 100_000
MAX_DEPTH = 32
KERAS_WEIGHTS = "model.weights.h5"
"""Name of the weights inside a ``.keras`` file."""
MAX_CONFIG = 8 * 2**20
"""Bytes of a model's config.json; the objects made of it take up to 25 times as many."""
MAX_GROWTH = 100 * 10**6
"""Bytes by which compressed weights may be larger than their ``.keras`` file."""
_FLOATS = {np.dtype(name) for name in ("float16", "float32", "float64")}
# A group of Keras 3 that holds no weights: a dropout's random state lies beside its layer.
_NO_WEIGHTS = "seed_generator"
# Place of a weight among those of its layer, by the end of its name in Keras 1, 2 and 3.
_POSITIONS = {"kernel": 0, "W": 0, "gamma": 0, "bias": 1, "b": 1, "beta": 1, "moving_mean": 2,
              "running_mean": 2, "moving_variance": 3, "running_std": 3}  # fmt: skip
_WEIGHT = re.compile(rf"(?:.*[/_])?({'|'.join(_POSITIONS)})(?:_\d+)?(?::0)?")


def read_h5(path: Path) -> tuple[Layout, dict[str, np.ndarray]]:
    """Reads the weights that Keras saved in an HDF5 file.

    Returns:
      ("keras_h5", tensors by "{layer}/{position among its weights}") of a ``.h5`` of weights or
      of a whole model, ("keras_weights", tensors by "{path of the layer}/{index}") of Keras 3's
      ``.weights.h5``.
    """
    with _one_line(path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_heaps(data)
        with h5py.File(path, "r", locking=False) as root:
            return _read(root, path.stat().st_size)


def read_keras(path: Path) -> tuple[Layout, dict[str, np.ndarray], str]:
    """Reads a whole model in Keras 3's ``.keras`` format, a ZIP around a ``.weights.h5``.

    Returns:
      What ``read_h5`` returns, and the text of config.json, which describes the model.
    """
    with _one_line(path):
        with LimitedFile(io.FileIO(path)) as zipped, open_zip(zipped) as archive:
            limits = {KERAS_WEIGHTS: path.stat().st_size + MAX_GROWTH, "config.json": MAX_CONFIG}
            for name, limit in limits.items():
                if archive.getinfo(name).file_size > limit:
                    raise _Problem(f"its {name} is over {limit} bytes")
            data, config = map(archive.read, limits)
        _check_heaps(data)
        with h5py.File(io.BytesIO(data), "r") as root:
            return (*_read(root, len(data)), config.decode())


def _one_line(path: Path) -> contextlib.AbstractContextManager[None]:
    """Turns the half a dozen kinds of errors that h5py raises on damaged bytes into a UserError."""
    return error_as_one_line(
        lambda error: (
            f"{path} is not read: "
            f"{error if isinstance(error, _Problem) else shown(str(error), 200)}; expected weights "
            "saved by Keras: download it again, or save them again by "
            "model.save_weights('net.weights.h5')"
        )
    )


def _check_heaps(data: bytes | mmap.mmap) -> None:
    """Raises ValueError where free blocks of a local heap follow one another in a circle."""
    for found in re.finditer(rb"HEAP\0.{3}(.{24})", data, re.DOTALL):
        size, free, segment = struct.unpack("<3Q", found[1])
        left = size
        while free != 1 and free + 16 <= size and segment + free + 16 <= len(data):
            free, length = struct.unpack_from("<2Q", data, segment + free)
            left -= max(length, 16)
            if left < 0:
                raise ValueError(f"the heap at byte {found.start()} has no end")


class _Problem(Exception):
    """What a file holds that Keras does not write, as a part of a sentence."""


def _read(root: h5py.Group, left: int) -> tuple[Layout, dict[str, np.ndarray]]:
    """The tensors of a file of ``left`` bytes."""
    if root.get("model_weights", getlink=True) is not None:
        root = _child(root, "model_weights")
    legacy = "layer_names" in root.attrs or "layer_names0" in root.attrs
    if not legacy:
        if root.get("layers", getlink=True) is None:
            what = "it has no attribute layer_names and no group layers, as Keras files do"
            raise _Problem(f"{what} (of a model class of your own save the ResNet alone)")
        if root.get("vars", getlink=True) is not None and len(_child(root, "vars")):
            raise _Problem("the model has weights of its own, outside its layers")
        root = _child(root, "layers")
    weights = [(_place(path, legacy), dataset) for path, dataset in _datasets(root)]
    counts = Counter((outer, position) for (outer, _, position), _ in weights)
    # A layer that has two kernels is a network that was called as a layer.
    networks = {outer for (outer, _), count in counts.items() if count > 1}
    tensors: dict[str, np.ndarray] = {}
    for (outer, inner, position), dataset in weights:
        key = f"{inner if outer in networks else outer}/{position}"
        if key in tensors or len(tensors) >= MAX_OBJECTS:
            raise _Problem(f"tensor {shown(key)} is there twice, or one of too many")
        tensors[key] = _tensor(f"tensor {shown(key)}", dataset, left)
        left -= tensors[key].nbytes
    if not tensors:
        raise _Problem("no layer in it has weights")
    return "keras_h5" if legacy else "keras_weights", tensors


def _place(path: str, legacy: bool) -> tuple[str, str, str]:
    """(layer of the model, layer that holds the weight, position) of LAYER/.../LAYER/NAME.

    In Keras 3's format, LAYER/vars/INDEX, both are the layer's whole path.
    """
    if legacy:
        outer, _, name = path.partition("/")
        if found := _WEIGHT.fullmatch(name):
            return outer, path.split("/")[-2], str(_POSITIONS[found[1]])
        raise _Problem(f"{shown(path)} is no weight of a convolution, a norm or a dense layer")
    layer, _, index = path.rpartition("/")
    if not layer.endswith("/vars") or not index.isdecimal():
        raise _Problem(f"{shown(path)} is no variable of a layer (LAYER/vars/NUMBER)")
    layer = layer.removesuffix("/vars")
    return layer, layer, index


def _datasets(root: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset below a group with its path."""
    waiting, groups = [("", root)], 0
    while waiting:
        path, group = waiting.pop()
        groups += 1
        if path.count("/") > MAX_DEPTH or groups > MAX_OBJECTS:
            raise _Problem(f"group {shown(path)} contains itself, or one of too many lies in it")
        for name in filter(_NO_WEIGHTS.__ne__, group):
            where, item = f"{path}/{name}".lstrip("/"), _child(group, name)
            if isinstance(item, h5py.Group):
                waiting.append((where, item))
            else:
                yield where, item


def _child(group: h5py.Group, name: str) -> Any:
    """A member of a group: a group or a dataset that lies in this file, never a mere link."""
    if type(group.get(name, getlink=True)) is not h5py.HardLink:
        raise _Problem(f"{shown(name)} is a link to another place, which Keras never writes")
    item = group[name]
    if not isinstance(item, (h5py.Group, h5py.Dataset)):
        raise _Problem(f"{shown(name)} is neither a group nor a dataset")
    return item


def _tensor(what: str, dataset: h5py.Dataset, left: int) -> np.ndarray:
    """The values of a dataset that lies as plain floats in the ``left`` bytes of the file."""
    if dataset.is_virtual or dataset.external or dataset.chunks is not None:
        raise _Problem(f"{what} is stored in another file, in chunks or compressed")
    dtype, shape, size = dataset.dtype, dataset.shape, dataset.nbytes
    bfloat16 = dtype == np.dtype("V2") and "dtype" in dataset.attrs  # opaque pairs of bytes
    if not bfloat16 and dtype.newbyteorder("=") not in _FLOATS:
        raise _Problem(f"{what} holds {shown(str(dtype))}, expected floats of 16, 32 or 64 bits")
    if shape is None or len(shape) > MAX_RANK:
        raise _Problem(f"{what} has no shape, or over {MAX_RANK} axes")
    if not 0 < size == dataset.id.get_storage_size() <= left:
        raise _Problem(f"{what} of shape {shape} needs {size} bytes, the file holds less or more")
    array = np.empty(shape, np.dtype("V2") if bfloat16 else dtype.newbyteorder("="))
    dataset.read_direct(array)
    return array.view(ml_dtypes.bfloat16) if bfloat16 else array
