"""Compiled programs kept from one start of a command to the next, in the user's cache directory.

JAX has such a cache and leaves it off. What is decided here is where it lies, what is worth keeping
and how much; a program's key, and reading and writing it, are JAX's. A cached program is the one
that was compiled, so a run has the same numbers with the cache as without.

A program compiled for one processor may have instructions that another lacks, and a home directory
may be shared by many. JAX's key covers versions, flags, options and a fingerprint of the devices;
that of CPUs follows their instruction sets in jax 0.10.2 (tried with ``--xla_cpu_max_isa``), which
nobody promises, and not the number of cores, over which XLA divides loops: the same key stands for
other programs on one core and on two. So each kind of processor has a directory of its own, and
each number of cores that a process may use.

JAX's own bound, ``jax_compilation_cache_max_size``, needs the package filelock, locks every read,
and once a killed process has left an entry half written, refuses every later one. Here the entries
that were not used for longest are removed at the start of a command. Of an entry that cannot be
read JAX says so and compiles; it stays until it is removed, which is safe at any time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from flax_resnet.cpu import usable_cores
from flax_resnet.files import digest
from flax_resnet.pretrained.fetch import cache_dir

MOST_BYTES = 2**30
"""Entries beyond it go, the least recently used first."""
LEAST_COMPILE_SECONDS = 0.1
"""Of a program that is kept. ``experiments.digits`` compiles 37: at 0.1 s 6 are kept, at 0 all. Two
steps of it took 9.0 to 9.6 CPU seconds warm, either way, and 26 cold (2-core CPU, n = 2 and 1)."""
JAX_LEAST_COMPILE_SECONDS = 1.0
"""JAX's default; a fast processor compiles the step of a small network in less."""


def use_cache() -> Path | None:
    """Keeps what this process compiles from now on, and uses what is kept.

    The commands call it (experiments, ablations, ``python -m flax_resnet``), ``import`` and the
    library's functions do not. Who has set JAX's own cache is left alone
    (JAX_COMPILATION_CACHE_DIR), and who has switched it off (JAX_ENABLE_COMPILATION_CACHE=0); so
    are several processes on accelerators: there a process that finds a program, beside one that
    compiles it, may leave the other waiting, and only you know of a directory that all share.

    A cached program is trusted: whoever can write to the directory can run code as its user.

    Returns:
      The directory, as of ``default_directory``; None where nothing was changed.
    """
    config: Any = jax.config  # its attributes are made at run time
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    if jax.distributed.is_initialized() and jax.default_backend() != "cpu":
        return None
    try:
        directory = default_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _trim(directory, MOST_BYTES)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(f"{directory} is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return None
    config.update("jax_compilation_cache_dir", str(directory))
    if config.jax_persistent_cache_min_compile_time_secs == JAX_LEAST_COMPILE_SECONDS:
        config.update("jax_persistent_cache_min_compile_time_secs", LEAST_COMPILE_SECONDS)
    return directory


def default_directory() -> Path:
    """Where this processor's programs are kept: in $FLAX_RESNET_CACHE or the user's cache.

    Raises:
      RuntimeError: there is none of these, nor a home directory.
    """
    return cache_dir() / "xla" / processor()


def processor() -> str:
    """A name of this processor: equal where its model, instruction sets and usable cores are."""
    said = [platform.system(), platform.machine(), platform.processor(), str(usable_cores())]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        first = dict(reversed([_field(line) for line in lines]))  # of the first core
        said += [first.get(name, "") for name in ("model name", "CPU part")]
        # x86 has flags, ARM Features; the kernel's order means nothing.
        said += sorted(f"{first.get('flags', '')} {first.get('Features', '')}".split())
    return f"{platform.machine() or 'unknown'}-{digest(said)[:12]}"


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def _trim(directory: Path, most: int) -> None:
    """Removes empty entries, which a crash leaves, and the least recently used beyond ``most``."""
    found = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removes too
            stat = path.stat()
            if path.is_file():
                # A file system may not record when a file was read.
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if size == 0 or total > most:
            path.unlink(missing_ok=True)
            total -= size
