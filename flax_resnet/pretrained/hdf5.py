"""Keras weights in HDF5, read in a process of their own that may crash, hang or run dry."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO, Literal

import ml_dtypes
import numpy as np

from flax_resnet.errors import UserError
from flax_resnet.pretrained.untrusted import MAX_RANK, damaged, shown

Layout = Literal["keras_h5", "keras_weights"]

_CHILD = Path(__file__).with_name("_h5_child.py")
_DTYPES = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_ANSWER = 64 * 2**20
_GRACE_SECONDS = 30


def read_h5(path: Path) -> tuple[Layout, dict[str, np.ndarray]]:
    """Reads the weights that Keras saved in an HDF5 file.

    Args:
      path: a ``.h5`` file of weights or of a whole model, or Keras 3's ``.weights.h5``.

    Returns:
      ("keras_h5", tensors by "{layer}/{position among its weights}") of the first, or
      ("keras_weights", tensors by "{path of the layer}/{index}") of the last.

    Raises:
      UserError: h5py is missing, or the file is damaged, or not what Keras writes.
    """
    size = path.stat().st_size
    command = [sys.executable, "-I", "-S", str(_CHILD), str(path), str(size), *_libraries(path)]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
    ) as child:
        seconds = _GRACE_SECONDS + size / 10e6
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        try:
            assert child.stdout is not None
            layout, tensors = _receive(path, size, child.stdout)  # type: ignore[arg-type]
        except EOFError as error:
            raise damaged(path, "the HDF5 library gave up on it") from error
        finally:
            timer.cancel()
            child.kill()
    return layout, tensors


def _libraries(path: Path) -> list[str]:
    """Where h5py and numpy lie; the child looks nowhere else, so that it starts at once."""
    found = importlib.util.find_spec("h5py")
    if found is None or found.origin is None:
        raise UserError(f"{path} is an HDF5 file, which needs h5py: pip install h5py")
    return [str(Path(origin).parents[1]) for origin in (found.origin, np.__file__)]


def _environment() -> dict[str, str]:
    """This process's own without what steers HDF5: its drivers, connectors and plugins."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HDF5_")}
    # "::" keeps HDF5 from loading any; each OpenBLAS thread would reserve address space.
    return {**kept, "HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1"}


def _receive(path: Path, size: int, pipe: BinaryIO) -> tuple[Layout, dict[str, np.ndarray]]:
    """Takes the child's answer, trusting it no more than the file."""
    length = int.from_bytes(_take(pipe, 8), "little")
    if length > _MAX_ANSWER:
        raise EOFError
    try:
        answer = json.loads(bytes(_take(pipe, length)))
        if "unusable" in answer:
            why = shown(str(answer["unusable"]), 200)
            raise UserError(f"{path} needs h5py, which does not work ({why}): reinstall h5py")
        if "problem" in answer:
            raise UserError(
                f"{path} is not read: {str(answer['problem'])[:400]}; expected weights saved by "
                "Keras: save them again by model.save_weights"
            )
        layout = answer["layout"]
        if layout not in ("keras_h5", "keras_weights"):
            raise ValueError(layout)
        wanted = [_wanted(*item) for item in answer["tensors"]]
        if sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in wanted) > size:
            raise ValueError("more bytes than the file")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise EOFError from error
    tensors = {
        key: _take(pipe, math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
        for key, dtype, shape in wanted
    }
    return layout, tensors


def _wanted(key: Any, dtype: Any, shape: Any) -> tuple[str, np.dtype, tuple[int, ...]]:
    """One line of the child's list, checked."""
    if type(key) is not str or type(shape) is not list or len(shape) > MAX_RANK:
        raise ValueError(shown(key))
    if any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(shown(key))
    return key, _DTYPES[dtype], tuple(shape)


def _take(pipe: BinaryIO, count: int) -> np.ndarray:
    """Exactly so many bytes."""
    data = np.empty(count, np.uint8)
    rest = data.data
    while rest:
        got = pipe.readinto(rest)  # type: ignore[attr-defined]
        if not got:
            raise EOFError
        rest = rest[got:]
    return data
