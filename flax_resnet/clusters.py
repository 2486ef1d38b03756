"""The processes of a run, as the environment names them: Slurm, Open MPI, Cloud TPU, or variables.

``jax.distributed.initialize`` detects these launchers too. But it gives a task of Slurm or Open MPI
one GPU, however many the task has, it starts no run where JAX_NUM_PROCESSES is all there is, and it
crashes where two steps of a Slurm job take the same port: so the port is named here, and tried.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flax_resnet.errors import UserError

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Variables that name a process where no launcher does."""
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


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


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """This process as its environment describes it; None for a run of one process.

    Args:
      environ: environment variables. JAX_COORDINATOR_ADDRESS wins over a launcher's address.

    Raises:
      UserError: a variable is missing or is no whole number.
    """
    coordinator, local, tasks = environ.get(OURS[0]), 0, 1
    if OURS[1] in environ:
        count = _number(environ, OURS[1])
        this = _number(environ, OURS[2], "JOB_COMPLETION_INDEX") if count > 1 else 0
    elif "SLURM_STEP_NODELIST" in environ:  # srun has started it; a batch script has it not
        count = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        tasks = -(-count // _number(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES"))
        this, local = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])
        if coordinator is None and first is not None:  # as JAX has it
            port = 61440 + _number(environ, "SLURM_JOB_ID") % 4096
            coordinator = f"{first[1]}{first[2] or ''}:{environ.get('JAX_COORDINATOR_PORT', port)}"
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
        count, this, local, tasks = (_number(environ, f"OMPI_COMM_WORLD_{n}") for n in names)
    elif OURS[0] in environ or OURS[2] in environ or _tpu_hosts(environ) > 1:
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
    if not environ.get(name, "").strip().isdecimal():
        said = f"{name}={environ[name]!r}" if name in environ else f"{name} is not set"
        raise UserError(f"{said}: expected a whole number")
    return int(environ[name])


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """Names of the NVIDIA GPUs that a process with this environment sees."""
    if (named := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def is_tpu_machine() -> bool:
    """True on a machine with TPUs: their library is installed, and a device is there."""
    devices = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*"))
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def _tpu_hosts(environ: Mapping[str, str]) -> int:
    """Number of hosts of this machine's TPU slice, 2 where there are several slices."""
    if "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return 2
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if not hosts and is_tpu_machine():
        name = METADATA + "worker-network-endpoints"
        request = urllib.request.Request(name, headers={"Metadata-Flavor": "Google"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            hosts = answer.read().decode()
    return len(hosts.split(","))
