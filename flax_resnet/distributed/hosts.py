"""Several processes as one run: how they start together, agree, and end together.

``jax.distributed`` brings the processes together, and aborts them when one of them dies or falls
silent. This module adds whether there are several at all, all the GPUs of a task (JAX takes one),
errors of one line, the name of what differs between processes, and an end of all when one fails.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import socket
import sys
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_resnet.distributed.preemption import EXIT_PREEMPTED
from flax_resnet.distributed.watchdog import Watch
from flax_resnet.errors import POSITIVE, TryAgain, UserError, check_range, check_types
from flax_resnet.records.configs import varying_fields
from flax_resnet.records.provenance import source_hash, versions

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Variables that name a process where no launcher does."""
TPU_HOSTS = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints"
)
Process = tuple[str | None, int | None, int | None, tuple[int, ...]]
LAST_SECONDS = 2  # for the others to say why they end: when process 0 is gone, JAX aborts them
LOOPBACK = ("localhost:", "127.0.0.1:", "[::1]:")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Several processes as one run; found by itself under Slurm, Open MPI, on Cloud TPU and
    Kubernetes, and wherever JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say so.
    """

    coordinator: str | None = None
    """HOST:PORT on which process 0 listens; the same in all."""
    num_processes: int | None = None
    """How many processes the run has."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    start_timeout: float = 300
    """Seconds for all processes to come together."""
    heartbeat_timeout: float = 10
    """A process that is silent for so many seconds counts as dead, and all end."""
    step_timeout: float = 1800
    """Seconds without progress, or between the first that finishes and the last, after which a
    process of several ends, and all with it."""

    def __post_init__(self) -> None:
        check_types(self, "hosts.")
        for name in ("start_timeout", "heartbeat_timeout", "step_timeout"):
            check_range(f"hosts.{name}", getattr(self, name), POSITIVE)


# As JAX's own runtime: a process joins one run, and can do so once.
_joined: tuple[Hosts, str] | None = None


def find(hosts: Hosts, environ: Mapping[str, str] = os.environ) -> Process | None:
    """This process among those of its run; None for a run of one process.

    Returns:
      (coordinator, number of processes, number of this one, its GPUs or () for all that it sees);
      ``jax.distributed.initialize`` detects what is None. Fields of ``hosts`` win.

    Raises:
      UserError: a number is missing or none, or the coordinator is not HOST:PORT.
    """
    fields = zip(OURS, (hosts.coordinator, hosts.num_processes, hosts.process_id), strict=True)
    environ = {**environ, **{name: str(value) for name, value in fields if value is not None}}
    coordinator, local, tasks = environ.get(OURS[0]), 0, 1
    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise UserError(f"coordinator {coordinator!r}: expected HOST:PORT, of process 0")
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
        return coordinator, None, None, ()
    else:
        return None
    # An equal share of the GPUs for each task of a node; all where a task sees its own alone.
    share = len(visible_gpus(environ)) // tasks if tasks > 1 else 0
    gpus = tuple(range(local * share, (local + 1) * share))
    return (coordinator, count, this, gpus) if count > 1 else None


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


def _has_several_tpu_hosts(environ: Mapping[str, str]) -> bool:
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if not hosts and importlib.util.find_spec("libtpu"):  # a Cloud TPU machine
        request = urllib.request.Request(TPU_HOSTS, headers={"Metadata-Flavor": "Google"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            hosts = answer.read().decode()
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environ


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """Starts the processes of a run, and ends them together.

    Enter it once, before anything that touches devices. With one process errors pass as they are.
    With several a process that fails prints one line, after the traceback of what is unexpected,
    and ends with a UserError's or a SystemExit's own status, 130 for an interruption, else 1; the
    others end with it. A SystemExit with 0 or 75 (preempted) is an end that all come to.

    Raises:
      UserError: as of ``find``.
    """
    global _joined
    process = find(hosts)
    if process is None:
        yield
        return
    _, number, this, _ = process
    who = f"process on {platform.node()}" if this is None else f"process {this} of {number}"
    _joined = hosts, who
    end: SystemExit | None = None
    try:
        _start(hosts, process)
        try:
            yield
        except SystemExit as error:
            if error.code not in (None, 0, EXIT_PREEMPTED):
                raise
            end = error
        jax.distributed.shutdown()  # waits for the others, for step_timeout at most
    except BaseException as error:
        _end(error, who, is_first=this in (0, None))
    _joined = None
    if end is not None:
        raise end


def _start(hosts: Hosts, process: Process) -> None:
    """Brings the processes together; UserError or TryAgain where they do not come."""
    coordinator, number, this, gpus = process
    if coordinator is not None and this == 0:
        _check_port(coordinator)
    is_local = coordinator is not None and coordinator.startswith(LOOPBACK)
    # In a thread, since it can't be interrupted, and aborts the process at its own timeout.
    starting = concurrent.futures.ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        coordinator,
        number,
        this,
        list(gpus),  # [] keeps JAX from taking one GPU of a task that has several
        initialization_timeout=math.ceil(hosts.start_timeout) + 60,
        heartbeat_timeout_seconds=math.ceil(hosts.heartbeat_timeout),
        shutdown_timeout_seconds=math.ceil(hosts.step_timeout),
        coordinator_bind_address=coordinator if is_local else None,
    )
    try:
        starting.result(hosts.start_timeout)
    except TimeoutError:
        raise TryAgain(
            f"not all processes have come to {coordinator or 'process 0'} in "
            f"{hosts.start_timeout:g} s: see that all run, with the same coordinator and "
            "num_processes, and that the port is open; hosts.start_timeout gives them longer"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"jax.distributed does not start: {error}; where JAX does not find the processes by "
            f"itself, set {', '.join(OURS)} in each"
        ) from error


def _check_port(coordinator: str) -> None:
    """Raises TryAgain where process 0 cannot listen; JAX may end with a segmentation fault."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise TryAgain(
            f"process 0 cannot listen on {coordinator} ({error}): another run may have the port"
        ) from None


def _end(error: BaseException, who: str, *, is_first: bool) -> NoReturn:
    """Prints one line and ends this process without waiting for the others, who wait for it."""
    name, status = type(error).__name__, 1
    try:
        if isinstance(error, UserError):
            name, status = "error", error.status
        elif isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, KeyboardInterrupt):
            status = 130
        elif "Gloo" in str(error):  # the collectives of CPUs
            name = "another process has probably died"
        else:
            traceback.print_exception(error)
        print(f"{who}: {name}: {error}".splitlines()[0], file=sys.stderr, flush=True)
        sys.stdout.flush()
        if is_first:
            time.sleep(LAST_SECONDS)
    finally:
        os._exit(status)


def watching(report_after: float = 60) -> Watch:
    """A watch over this process's loop; of several processes one that ends it when it is stuck."""
    if _joined is None:
        return Watch(None, report_after)
    return Watch(_joined[0].step_timeout, report_after, _joined[1])


def check_alike(facts: Mapping[str, Any]) -> None:
    """Raises UserError, in all processes, where their devices, versions, code or facts differ.

    Collective: every process must call it. Facts are JSON values, such as {"config.seed": 0}.
    """
    if jax.process_count() == 1:
        return
    devices = Counter(device.process_index for device in jax.devices())
    _check_equal([{"devices": devices[i]} for i in sorted(devices)])  # or a gather would hang
    own = {
        **facts,
        "device": jax.local_devices()[0].device_kind,
        "python": platform.python_version(),
        **versions(("jax", "jaxlib", "flax", "optax", "numpy")),
        "code": source_hash(),
    }
    text = json.dumps(own, default=repr).encode()
    longest = multihost_utils.process_allgather(np.int32(len(text))).max()
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    _check_equal([json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)])


def _check_equal(values: list[dict[str, Any]]) -> None:
    """Raises UserError where what a process has differs from what process 0 has."""
    if names := varying_fields(values):
        texts = [repr(value.get(names[0], "absent")) for value in values]
        other = next(i for i, text in enumerate(texts) if text != texts[0])
        also = f"; so do {', '.join(names[1:4])}" if names[1:] else ""
        raise UserError(
            f"the processes differ: {names[0]} is {texts[0]:.60} in process 0 and "
            f"{texts[other]:.60} in process {other}{also}: start all with the same command, code "
            "and devices"
        )
