"""Which process of how many this one is, as its launcher's environment variables say.

``jax.distributed.initialize`` detects Slurm, Open MPI, Cloud TPU and Kubernetes. This module adds
what it does not: whether there are several processes at all, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
and all the GPUs of a task that has several, where JAX gives each task of Slurm or Open MPI one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flax_resnet.errors import UserError

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Variables that name a process where no launcher does."""
TPU_HOSTS = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints"
)


class Cluster(NamedTuple):
    """One process of several; ``jax.distributed.initialize`` detects what is None.

    Attributes:
      coordinator: HOST:PORT on which process 0 listens.
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.
      local_device_ids: GPUs of this process; empty for all that it sees.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.process_id is None:
            return f"process on {platform.node()}"
        return f"process {self.process_id} of {self.num_processes}"


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """This process as its environment describes it; None for a run of one process.

    Raises:
      UserError: a variable is missing or is no whole number.
    """
    coordinator, local, tasks = environ.get(OURS[0]), 0, 1
    if OURS[1] in environ:
        count = _number(environ, OURS[1])
        this = _number(environ, OURS[2], "JOB_COMPLETION_INDEX") if count > 1 else 0
    elif "SLURM_STEP_NODELIST" in environ:  # set by srun; a batch script does not have it
        names = ("STEP_NUM_TASKS", "STEP_NUM_NODES", "PROCID", "LOCALID")
        count, nodes, this, local = (_number(environ, f"SLURM_{name}") for name in names)
        tasks = -(-count // nodes)
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
        count, this, local, tasks = (_number(environ, f"OMPI_COMM_WORLD_{n}") for n in names)
    elif OURS[0] in environ or OURS[2] in environ or _has_several_tpu_hosts(environ):
        return Cluster(coordinator)
    else:
        return None
    # An equal share of the GPUs for each task of a node; all where a task sees its own alone.
    share = len(visible_gpus(environ)) // tasks if tasks > 1 else 0
    devices = tuple(range(local * share, (local + 1) * share))
    return Cluster(coordinator, count, this, devices) if count > 1 else None


def _number(environ: Mapping[str, str], *names: str) -> int:
    """The first of several variables that is set."""
    name = next((name for name in names if name in environ), names[0])
    text = environ.get(name, "")
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}: expected a whole number")
    return int(text)


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """Names of the NVIDIA GPUs that a process with this environment sees."""
    if (named := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def is_tpu_machine() -> bool:
    """True on a machine with TPUs: their library is installed, and a device is there."""
    devices = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*"))
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def _has_several_tpu_hosts(environ: Mapping[str, str]) -> bool:
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if not hosts and is_tpu_machine():
        request = urllib.request.Request(TPU_HOSTS, headers={"Metadata-Flavor": "Google"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            hosts = answer.read().decode()
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environ
