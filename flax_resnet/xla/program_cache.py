"""Compiled programs kept between starts of a command: JAX's cache, in the user's cache directory.

A compiled program fits one kind of machine and one number of cores, over which XLA divides loops:
each kind and number has a directory of its own.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from flax_resnet.records.files import cache_dir
from flax_resnet.xla.backend import usable_cores

SETTINGS = {
    "jax_compilation_cache_max_size": (-1, 2**30),
    "jax_persistent_cache_min_compile_time_secs": (1.0, 0.1),
}
"""JAX's settings of the cache: (its default, ours). Bytes, beyond which JAX removes the least
recently used programs; seconds of compilation from which a program is kept."""


def use_cache() -> Path | None:
    """Keeps what this process compiles from now on, and uses what is kept.

    The commands call it; the library's functions do not. JAX's own settings go first. Several
    processes on accelerators keep nothing: where one of them finds a program and another compiles
    it, one may wait for ever. Whoever can write to the directory can run code as its user.

    Returns:
      The directory of this kind of machine; None where nothing was changed.
    """
    config: Any = jax.config  # its attributes are made at run time
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    if jax.distributed.is_initialized() and jax.default_backend() != "cpu":
        return None
    try:
        kind = f"{platform.machine() or 'unknown'}-{usable_cores()}-cores"
        directory = cache_dir() / "xla" / kind
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(f"{directory} is not writable")
        for entry in directory.glob("*-cache"):  # jax 0.10 writes none beside half of one
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return None
    config.update("jax_compilation_cache_dir", str(directory))
    for name, (default, ours) in SETTINGS.items():
        if getattr(config, name) == default:
            config.update(name, ours)
    return directory
