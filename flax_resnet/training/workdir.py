"""A run's working directory: whether a run fits in it, claiming it, and its record config.json."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import operator
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from flax_resnet.data.config import contents
from flax_resnet.data.decode import PACKAGES
from flax_resnet.data.folders import Contents, changes
from flax_resnet.distributed import sharding
from flax_resnet.errors import TryAgain, UserError
from flax_resnet.records.configs import flatten, to_record, varying_fields
from flax_resnet.records.files import FULL
from flax_resnet.records.provenance import git_state, versions
from flax_resnet.records.run_dir import CONFIG, read_record, write_json
from flax_resnet.training.config import TrainConfig

# Fields of a network that say how it is computed and not what: a resumed run may change them.
FREE_MODEL_FIELDS = ("model.remat",)
RECORDED_PACKAGES = ("flax_resnet", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain",
                     "tensorflow-datasets", "numpy", *PACKAGES)  # fmt: skip
SHARED_SECONDS = 90.0
"""NFS remembers for up to 60 s that a directory held no such file."""


def free_fields(config: Any, prefix: str = "", free: bool = False) -> set[str]:
    """Dotted names of the fields that a resumed run may change."""
    names = {prefix} if free else set()
    if dataclasses.is_dataclass(config) and not isinstance(config, nn.Module):
        for field in dataclasses.fields(config):
            name = f"{prefix}.{field.name}" if prefix else field.name
            inner = free or field.metadata.get("free", False)
            names |= free_fields(getattr(config, field.name), name, inner)
    return names


def as_begun(there: Mapping[str, Any], config: TrainConfig) -> TrainConfig:
    """A config that reads images as the run of a record does, which may be older than a field."""
    old, data = there.get("data", {}), config.data
    if "as_displayed" in old:
        return config
    split = data.eval_split or old.get("eval_split")
    data = dataclasses.replace(data, as_displayed=False, eval_split=split)
    return dataclasses.replace(config, data=data)


def differences(there: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What a recorded run and a config disagree on, as ``field: there X, here Y``."""
    old, new = flatten(there), flatten(to_record(as_begun(there, config)))
    old.setdefault("data.as_displayed", False)
    free = {*free_fields(config), *FREE_MODEL_FIELDS}
    absent = "not a field"
    return [
        f"{name}: there {old.get(name, absent)}, here {new.get(name, absent)}"
        for name in sorted(varying_fields([old, new]))
        if not any(name == field or name.startswith(f"{field}.") for field in free)
        # A field that came after the run was begun stands for what was done before.
        if name in old or not _is_default(config, name)
    ]


def check_same_run(what: str, record: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises UserError where a recorded run is not one of ``config``.

    Its images may be in another folder now; ``record`` has "config" and "contents" of the folder.
    """
    there, recorded, folder = record["config"], record.get("contents"), config.data.folder
    old = there["data"]["folder"]
    if recorded is not None and folder not in (None, old):
        if changed := changes(recorded, contents(config.data)):
            raise UserError(
                f"the run was trained on images in {old}, and {folder} holds other ones "
                f"({changed}): choose another --workdir"
            )
        there = {**there, "data": {**there["data"], "folder": folder}}
    if fields := differences(there, config):
        more = f"; and {len(fields) - 3} more" if len(fields) > 3 else ""
        raise UserError(
            f"{what} of another config ({'; '.join(fields[:3])}{more}): choose another --workdir, "
            "or the same config to resume"
        )


def _is_default(config: Any, name: str) -> bool:
    """Whether the field of a dotted name has the value that it has by itself."""
    outer, _, last = name.rpartition(".")
    with contextlib.suppress(AttributeError, KeyError):
        owner = operator.attrgetter(outer)(config) if outer else config
        return bool(getattr(owner, last) == type(owner).__dataclass_fields__[last].default)
    return False


def check_workdir(workdir: Path, config: TrainConfig) -> TrainConfig:
    """The config, as the run in ``workdir`` was begun if there is one; writes nothing.

    Raises:
      UserError: another config's run is there, or it cannot be written.
    """
    existing = workdir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"--workdir {workdir} cannot be written ({existing} is "
            f"{'not writable' if existing.is_dir() else 'not a directory'}): choose another"
        )
    path = workdir / CONFIG
    if not path.exists():
        if (workdir / "checkpoints").exists():
            raise UserError(
                f"--workdir {workdir} holds checkpoints and no config.json: choose another"
            )
        return config
    record = read_record(workdir)
    check_same_run(f"--workdir {workdir} holds a run", record, config)
    return as_begun(record["config"], config)


@contextlib.contextmanager
def claimed(workdir: Path, config: TrainConfig, found: Contents | None = None) -> Iterator[None]:
    """Makes the workdir, writes the record, and keeps other runs of this machine out of it.

    Raises:
      UserError: it cannot be written, or its disk is full when the block is left.
      TryAgain: another process is running in it, or not all processes see it.
    """
    is_claimed = False
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                directory = os.open(workdir, os.O_RDONLY)
                stack.callback(os.close, directory)
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a dead process lets go
                write_record(workdir, config, found)
            _check_shared(workdir)
            is_claimed = True
            yield
        except OSError as error:
            if is_claimed and error.errno not in FULL:
                raise
            if isinstance(error, BlockingIOError):
                raise TryAgain(
                    f"--workdir {workdir} is in use by another process: wait for it, or choose "
                    "another"
                ) from error
            raise UserError(
                f"--workdir {workdir} cannot be written ({error}): make room, and the same command "
                "goes on from the last checkpoint, or choose another"
            ) from error


def _check_shared(workdir: Path) -> None:
    """Raises TryAgain in a process that does not see the record that the lead has written."""
    if jax.process_count() == 1:
        return

    def starts() -> int:
        try:
            return len(read_record(workdir)["starts"])
        except UserError:
            return 0

    written = sharding.same_everywhere(starts())
    for _ in range(int(SHARED_SECONDS / 0.5)):
        if starts() == written:
            return
        time.sleep(0.5)
    raise TryAgain(
        f"--workdir {workdir} is not the same directory in process {jax.process_index()} as in "
        "process 0: put it on a file system that all hosts share"
    )


def write_record(workdir: Path, config: TrainConfig, found: Contents | None = None) -> None:
    """Writes config.json: the config, a folder's contents, and for each start what it ran on."""
    path = workdir / CONFIG
    starts = read_record(workdir)["starts"] if path.exists() else []
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": sys.argv,
        "git": git_state(),
        "python": sys.version.split()[0],
        "packages": versions(RECORDED_PACKAGES),
        "devices": [d.device_kind for d in jax.devices()],
        "platform": jax.default_backend(),
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
    }
    record = {"config": to_record(config), "starts": [*starts, start]}
    write_json(path, record if found is None else {**record, "contents": found})
