"""Several processes as one run: how they find each other, agree, and end together.

``joined`` is around everything that a command does. In a run of one process it does nothing. In one
of several it starts JAX's runtime; whatever ends one process early then ends all of them, each
with one line on stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from flax_resnet.clusters import LOOPBACK, Cluster, address, detect
from flax_resnet.errors import POSITIVE, UserError, check_range
from flax_resnet.lifeline import Lifeline
from flax_resnet.meeting import meet
from flax_resnet.preemption import EXIT_PREEMPTED
from flax_resnet.provenance import git_state, source_hash, versions
from flax_resnet.watch import Watch, end_now

EXIT_INTERRUPTED = 130
COMMON_ENDS = (None, 0, EXIT_PREEMPTED)
"""Exit statuses that all processes end with together."""
SHUTDOWN_SECONDS = 60
"""For JAX's runtime to end, once all processes have come to their end."""
CAUSE_SECONDS = 1.0
"""An error is often another process's death, seen by a collective first: wait for its cause."""
MOST_DIFFERENCES = 3
COMPUTING = ("jax", "jaxlib", "flax", "optax", "numpy")
"""Packages that have to be the same in all processes."""


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


@dataclasses.dataclass
class _Joined:
    """This process as one of several."""

    hosts: Hosts
    cluster: Cluster
    lifeline: Lifeline | None = None
    ending: Any = dataclasses.field(default_factory=threading.Lock)

    def who(self) -> str:
        """What this process is called."""
        if self.cluster.num_processes is None:
            return f"process {jax.process_index()} of {jax.process_count()}"
        return f"process {self.cluster.process_id} of {self.cluster.num_processes}"

    def end(self, line: str, status: int, told: bool = False) -> NoReturn:
        """Prints a line and ends this process, and the others by it; the first call counts."""
        self.ending.acquire()
        if self.lifeline is not None and not told:
            self.lifeline.last_words(line.removeprefix(f"{self.who()}: "), status)
        end_now(line, status)
        raise AssertionError


# As JAX's runtime itself: a process joins one run, and can do so once.
_joined: _Joined | None = None


def find(hosts: Hosts, environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """The processes of this run; None where there is this one alone.

    Args:
      hosts: what is said explicitly goes before the environment.
      environ: environment variables.

    Raises:
      UserError: only some of the explicit three are given, or the environment is unclear.
    """
    names = ("coordinator", "num_processes", "process_id")
    missing = [name for name in names if getattr(hosts, name) is None]
    if not missing:
        alone = hosts.num_processes == 1
        said = (hosts.coordinator, hosts.num_processes, hosts.process_id)
        cluster = Cluster("--hosts", *said)
        return None if alone else cluster
    if len(missing) < 3:
        flags = [f"--hosts.{name.replace('_', '-')}" for name in missing]
        raise UserError(
            f"{' and '.join(flags)} missing: give all of --hosts.coordinator, "
            "--hosts.num-processes and --hosts.process-id, or none"
        )
    return detect(environ)


def start(hosts: Hosts) -> bool:
    """Brings the processes of a run together; False where there is one, and nothing to do.

    It comes before anything that touches devices. A process can do it once.

    Raises:
      UserError: what is said of the processes is wrong, or they disagree.
      TryAgain: the coordinator is missing or its port taken, or processes have not come.
    """
    global _joined
    cluster = find(hosts)
    if cluster is None:
        return False
    began = time.monotonic()
    joined = _Joined(hosts, cluster)
    silence, longest = hosts.heartbeat_timeout, hosts.step_timeout
    count, this = cluster.num_processes, cluster.process_id
    if cluster.coordinator is not None and count is not None and this is not None:
        peers = meet(cluster.coordinator, count, this, hosts.start_timeout)
        joined.lifeline = Lifeline(peers, this, silence, lambda *said: _other_failed(joined, *said))
        silence = 1.5 * silence + 5  # JAX's own, which aborts, is for what is left
    _joined = joined
    inside = cluster.coordinator is not None and address(cluster.coordinator)[0] in LOOPBACK
    left = hosts.start_timeout - (time.monotonic() - began)
    jax.distributed.initialize(
        cluster.coordinator,
        count,
        this,
        list(cluster.local_device_ids) if cluster.local_device_ids else None,
        # Else JAX asks Slurm or Open MPI for the devices too, and takes one.
        cluster_detection_method="deactivate" if joined.lifeline is not None else None,
        initialization_timeout=math.ceil(max(30.0, left)),
        heartbeat_timeout_seconds=math.ceil(silence),
        # JAX's barrier aborts those that wait in it, and whom they wait for too.
        shutdown_timeout_seconds=SHUTDOWN_SECONDS if joined.lifeline else math.ceil(longest),
        coordinator_bind_address=cluster.coordinator if inside else None,
    )
    return True


def _other_failed(joined: _Joined, what: str, status: int) -> None:
    joined.end(f"{joined.who()}: ends, since {what}", status, told=True)


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
    if not start(hosts):
        yield
        return
    assert _joined is not None
    status: Any = None
    try:
        yield
    except SystemExit as stop:
        if stop.code not in COMMON_ENDS:
            code = stop.code if isinstance(stop.code, int) else 1
            said = "" if isinstance(stop.code, int) else f": {stop.code}"
            _joined.end(f"{_joined.who()}: ends with status {code}{said}", code)
        status = stop.code
    except UserError as error:
        _joined.end(f"{_joined.who()}: error: {error}", error.status)
    except KeyboardInterrupt:
        _joined.end(f"{_joined.who()}: interrupted", EXIT_INTERRUPTED)
    except BaseException as error:
        _unexpected(_joined, error)
    _leave(_joined)
    if status is not None:
        sys.exit(status)


def _unexpected(joined: _Joined, error: BaseException) -> NoReturn:
    """Ends the process for an error; where another's end was the cause, that says so."""
    if joined.lifeline is not None and joined.lifeline.failing.wait(CAUSE_SECONDS):
        while True:  # its thread ends the process
            time.sleep(1)
    first = (str(error).splitlines() or [""])[0]
    traceback.print_exc()
    sys.stderr.flush()
    hint = "" if joined.lifeline is not None else _hint(error)
    joined.end(f"{joined.who()}: {type(error).__name__}: {first}{hint}", 1)


def _hint(error: BaseException) -> str:
    far = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    return " (another process has probably died)" if far else ""


def _leave(joined: _Joined) -> None:
    """Waits for the others to end as they should, for step_timeout at most."""
    global _joined
    longest = joined.hosts.step_timeout
    if joined.lifeline is not None and (waits := joined.lifeline.leave(longest)):
        others = ", ".join(map(str, waits))
        joined.end(f"{joined.who()}: has finished; for {longest:g} s process {others} has not", 1)
    leaving = threading.Thread(target=jax.distributed.shutdown, name="shutdown", daemon=True)
    leaving.start()
    leaving.join(SHUTDOWN_SECONDS + 10 if joined.lifeline is not None else longest + 10)
    if leaving.is_alive():
        joined.end(f"{joined.who()}: has finished; JAX's runtime does not end", 1)
    if joined.lifeline is not None:
        joined.lifeline.close()
    _joined = None


def watching(report_after: float = 60) -> Watch:
    """A watch over this process's loop; of several processes one that ends it when it is stuck.

    Args:
      report_after: seconds without progress after which stderr says so, in each process.
    """
    if _joined is None:
        return Watch(None, report_after=report_after)
    joined = _joined
    limit = joined.hosts.step_timeout
    return Watch(limit, report_after=report_after, who=joined.who(), end=joined.end)


def check_alike(facts: Mapping[str, Any]) -> None:
    """Checks that all processes run the same: devices, versions, code, and some facts.

    All processes have to call it. With one process there is nothing to do.

    Args:
      facts: nested mappings of what JSON holds, {"config": the config's record}.

    Raises:
      UserError: processes differ; in all of them, and the same.
    """
    if jax.process_count() == 1:
        return
    devices: dict[int, Counter[str]] = {i: Counter() for i in range(jax.process_count())}
    for device in jax.devices():
        devices[device.process_index][device.device_kind] += 1
    # First, and from what JAX knows: collectives need as many devices in each.
    _check_equal([{"devices": _counts(devices[i])} for i in sorted(devices)])
    own = {
        **facts,
        "versions": {"python": platform.python_version(), **versions(COMPUTING)},
        "code": source_hash(),
        "commit": (git_state() or {}).get("commit"),
    }
    _check_equal([_flat(one) for one in _gathered(own)])


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(found.items())) or "none"


def _gathered(own: Any) -> list[Any]:
    """Every process's value, through JSON."""
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(own, sort_keys=True, default=repr).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    rows = np.reshape(multihost_utils.process_allgather(padded), (len(lengths), -1))
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted name: value}."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: inner
        for key, below in value.items()
        for name, inner in _flat(below, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _check_equal(everyones: list[dict[str, Any]]) -> None:
    """Raises UserError where a process differs from process 0."""
    first = everyones[0]
    found = [
        f"{name} is {_short(first, name)} in process 0 and {_short(other, name)} in process {i}"
        for i, other in enumerate(everyones)
        for name in dict.fromkeys((*first, *other))
        if first.get(name, "absent") != other.get(name, "absent")
    ]
    if found:
        more = len(found) - MOST_DIFFERENCES
        raise UserError(
            f"the processes differ: {'; '.join(found[:MOST_DIFFERENCES])}"
            + (f"; and {more} more" if more > 0 else "")
            + ": start all with the same command, code and devices"
        )


def _short(facts: Mapping[str, Any], name: str) -> str:
    return f"{facts[name]!r:.60}" if name in facts else "absent"
