"""Several processes as one run: how they start together, agree, and end together.

``jax.distributed`` brings the processes together, and aborts them when one of them dies or falls
silent. This module adds what it does not do: one line in place of a C++ stack trace when the
processes cannot come together, the name of what differs between them, and an end of all of them
when one of them fails.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import platform
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_resnet.clusters import OURS, Cluster, detect
from flax_resnet.errors import POSITIVE, TryAgain, UserError, check_range
from flax_resnet.preemption import EXIT_PREEMPTED
from flax_resnet.provenance import source_hash, versions
from flax_resnet.record import varying_fields
from flax_resnet.watch import Watch

COMMON_ENDS = (None, 0, EXIT_PREEMPTED)
"""Exit statuses with which all processes end together."""
EXIT_INTERRUPTED = 130
LAST_SECONDS = 2
"""Seconds for the others to say why they end: when process 0 is gone, JAX aborts them."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_BYTES = 2**16
"""Length of a config as JSON."""
MOST_DIFFERENCES = 3
COMPUTING = ("jax", "jaxlib", "flax", "optax", "numpy")
"""Packages that must have the same version in all processes."""


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
    heartbeat_timeout: float = 60
    """A process that is silent for so many seconds counts as dead, and all end."""
    step_timeout: float = 1800
    """Seconds without progress, or between the first that finishes and the last, after which a
    process of several ends, and all with it."""

    def __post_init__(self) -> None:
        check_range("hosts.num_processes", self.num_processes, 1)
        check_range("hosts.process_id", self.process_id, 0)
        check_range("hosts.start_timeout", self.start_timeout, POSITIVE)
        check_range("hosts.heartbeat_timeout", self.heartbeat_timeout, 1)
        check_range("hosts.step_timeout", self.step_timeout, POSITIVE)


# As JAX's own runtime: a process joins one run, and can do so once.
_joined: tuple[Hosts, Cluster] | None = None


def find(hosts: Hosts, environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """This process among those of its run; None for a run of one process.

    Args:
      hosts: its coordinator, num_processes and process_id win over the environment.
      environ: environment variables.

    Raises:
      UserError: the environment is unclear, or the coordinator is not HOST:PORT.
    """
    given = zip(OURS, (hosts.coordinator, hosts.num_processes, hosts.process_id), strict=True)
    fields = {name: str(value) for name, value in given if value is not None}
    cluster = detect({**environ, **fields})
    if cluster is not None and cluster.coordinator is not None:
        _address(cluster.coordinator)
    return cluster


def _address(coordinator: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT"."""
    host, _, port = coordinator.rpartition(":")
    if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator {coordinator!r}: expected HOST:PORT, of process 0")
    return host.strip("[]"), int(port)


def _who() -> str:
    """What this process is called in messages."""
    assert _joined is not None
    _, number, this, _ = _joined[1]
    return f"process on {platform.node()}" if this is None else f"process {this} of {number}"


def start(hosts: Hosts) -> bool:
    """Brings the processes of a run together; False for a run of one process.

    Call it once, before anything that touches devices. Where the processes do not come together
    within ``hosts.start_timeout``, each prints one line and ends with status 1.

    Raises:
      UserError: the description of the processes is wrong.
      TryAgain: the coordinator's port is taken.
    """
    global _joined
    cluster = find(hosts)
    if cluster is None:
        return False
    coordinator, local = cluster.coordinator, list(cluster.local_device_ids)
    if coordinator is not None and cluster.process_id == 0:
        _check_port(coordinator)
    _joined = hosts, cluster
    inside = coordinator is not None and _address(coordinator)[0] in LOOPBACK
    is_whole = None not in cluster
    # In a thread, since it can't be interrupted, and aborts the process at its own timeout.
    starting = concurrent.futures.ThreadPoolExecutor(1).submit(
        jax.distributed.initialize,
        coordinator,
        cluster.num_processes,
        cluster.process_id,
        # [] keeps JAX from taking one GPU of a task that has several.
        local or (None if is_whole else []),
        cluster_detection_method="deactivate" if is_whole else None,
        initialization_timeout=math.ceil(hosts.start_timeout) + 60,
        heartbeat_timeout_seconds=math.ceil(hosts.heartbeat_timeout),
        shutdown_timeout_seconds=math.ceil(hosts.step_timeout),
        coordinator_bind_address=coordinator if inside else None,
    )
    try:
        starting.result(hosts.start_timeout)
    except KeyboardInterrupt as error:
        _end(error)
    except (ValueError, RuntimeError) as error:
        _joined = None
        raise UserError(
            f"jax.distributed does not start: {error}; where JAX does not find the processes by "
            f"itself, set {', '.join(OURS)} in each"
        ) from error
    except TimeoutError:
        late = (
            f"not all processes have come to {coordinator or 'process 0'} in "
            f"{hosts.start_timeout:g} s: see that all run, with the same coordinator and "
            "num_processes, and that the port is open; hosts.start_timeout gives them longer"
        )
        _end(TryAgain(late))
    return True


def _check_port(coordinator: str) -> None:
    """Raises TryAgain where process 0 cannot listen; JAX would end with a segmentation fault."""
    port = _address(coordinator)[1]
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise TryAgain(
            f"process 0 cannot listen on {coordinator} ({why}): another run may have the port; "
            "give all processes another one"
        ) from None


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """Starts the processes of a run, and ends them together.

    With one process errors pass as they are. With several none does: the process prints one line,
    after the traceback of what is unexpected, and ends with a UserError's or a SystemExit's own
    status, 130 for an interruption, and 1 for anything else; the others end with it. A
    SystemExit with 0 or 75 (preempted: start me again) is an end that all come to.

    Raises:
      UserError: as of ``start``.
    """
    global _joined
    if not start(hosts):
        yield
        return
    end: SystemExit | None = None
    try:
        try:
            yield
        except SystemExit as error:
            if error.code not in COMMON_ENDS:
                raise
            end = error
        jax.distributed.shutdown()  # waits for the others, for step_timeout at most
    except BaseException as error:
        _end(error)
    _joined = None
    if end is not None:
        raise end


def _end(error: BaseException) -> NoReturn:
    """Prints one line and ends this process; the others end with it.

    Python's own end would wait for the others, who wait for this process.
    """
    name, status = type(error).__name__, 1
    has_lost_another = "Gloo" in str(error)  # the collectives of CPUs
    if isinstance(error, UserError):
        name, status = "error", error.status
    elif isinstance(error, KeyboardInterrupt):
        status = EXIT_INTERRUPTED
    elif isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    elif not has_lost_another:
        traceback.print_exception(error)
    line = f"{_who()}: {name}: {error}".splitlines()[0]
    line += " (another process has probably died)" if has_lost_another else ""
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if _joined is None or _joined[1].process_id in (0, None):
        time.sleep(LAST_SECONDS)
    os._exit(status)


def watching(report_after: float = 60) -> Watch:
    """A watch over this process's loop; of several processes one that ends it when it is stuck.

    Args:
      report_after: seconds without progress after which stderr says so, in each process.
    """
    if _joined is None:
        return Watch(None, report_after)
    return Watch(_joined[0].step_timeout, report_after, _who())


def check_alike(facts: Mapping[str, Any]) -> None:
    """Checks that all processes run the same: devices, versions, code, and some facts.

    Collective: every process must call it. With one process there is nothing to do.

    Args:
      facts: what each process is to have alike, as JSON values: {"config.seed": 0}.

    Raises:
      UserError: processes differ; the same error in all of them.
    """
    if jax.process_count() == 1:
        return
    devices = [Counter[str]() for _ in range(jax.process_count())]
    for device in jax.devices():
        devices[device.process_index][device.device_kind] += 1
    _check_equal([{"devices": dict(kinds)} for kinds in devices])  # or collectives would hang
    own = {"python": platform.python_version(), **versions(COMPUTING), "code": source_hash()}
    _check_equal(_gather({**facts, **own}))


def _gather(value: Any) -> list[Any]:
    """The values of all processes, which pass as JSON; collective."""
    text = json.dumps(value, sort_keys=True, default=repr).encode()
    padded = np.frombuffer(text.ljust(MOST_BYTES, b" "), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def _check_equal(values: list[dict[str, Any]]) -> None:
    """Raises UserError where what a process has differs from what process 0 has."""
    differences = [
        f"{name} is {first:.60} in process 0 and {other:.60} in process {i}"
        for name in varying_fields(values)
        for first, *others in [[repr(one[name]) if name in one else "absent" for one in values]]
        for i, other in enumerate(others, 1)
        if other != first
    ]
    if differences:
        more = len(differences) - MOST_DIFFERENCES
        raise UserError(
            f"the processes differ: {'; '.join(differences[:MOST_DIFFERENCES])}"
            + (f"; and {more} more" if more > 0 else "")
            + ": start all with the same command, code and devices"
        )
