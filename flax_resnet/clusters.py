"""What a launcher's environment says of the processes of a run: Slurm, Open MPI, Cloud TPU, ours.

``jax.distributed.initialize`` finds some of it by itself, but takes one GPU a task under Slurm and
Open MPI however many there are, asks Kubernetes' API, and does not say what it has found. So it is
told: where process 0 listens, how many there are, which one this is, and which GPUs are its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from flax_resnet.errors import UserError

TPU_PORT = 8476
LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
"""Names of this machine for itself: what listens there for them, no other machine reaches."""
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""What a manifest or a launcher of our own sets; Kubernetes gives the id of an indexed Job."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run.

    Attributes:
      source: who said so.
      coordinator: HOST:PORT of process 0; None leaves all to jax.distributed.initialize().
      num_processes: how many; None likewise.
      process_id: which of them this is; None likewise.
      local_device_ids: this process's accelerators; None takes all that it sees.
    """

    source: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        address(self.coordinator)
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"{self.source}: process {self.process_id} of {self.num_processes}: "
                f"expected one of 0 to {self.num_processes - 1}"
            )


def address(coordinator: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT".

    Raises:
      UserError: it is no such text.
    """
    host, _, port = coordinator.rpartition(":")
    if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"coordinator {coordinator!r}: expected HOST:PORT, of process 0")
    return host.strip("[]"), int(port)


def detect(
    environ: Mapping[str, str], metadata: Callable[[str], str | None] | None = None
) -> Cluster | None:
    """The processes that the environment tells of; None where it tells of this one alone.

    JAX_COORDINATOR_ADDRESS goes before what a launcher gives, and JAX_COORDINATOR_PORT before its
    port, as in JAX itself.

    Args:
      environ: environment variables.
      metadata: gives a value of a Google Cloud machine's metadata; by default asks for it.

    Raises:
      UserError: what is there cannot be understood.
    """
    given = environ.get(OURS[0])
    for found in (_ours, _slurm, _open_mpi, lambda env: _tpu(env, metadata)):
        if (cluster := found(environ)) is not None:
            if cluster.num_processes is None:
                return cluster
            if cluster.num_processes == 1:
                return None
            return dataclasses.replace(cluster, coordinator=given or cluster.coordinator)
    if given:
        raise UserError(
            f"{OURS[0]}={given} is set, and {OURS[1]} is not: set both, and {OURS[2]} in each "
            "process (an indexed Kubernetes Job has JOB_COMPLETION_INDEX)"
        )
    return None


def _number(environ: Mapping[str, str], *names: str, default: int | None = None) -> int:
    """The first of some variables that is set, or else ``default``.

    Raises:
      UserError: there is neither, or it is no whole number.
    """
    name = next((name for name in names if name in environ), None)
    if name is None and default is not None:
        return default
    if name is None:
        raise UserError(f"{names[0]} is not set: expected a whole number")
    if not environ[name].strip().isdecimal():
        raise UserError(f"{name}={environ[name]!r}: expected a whole number")
    return int(environ[name])


def _port(environ: Mapping[str, str], job: int) -> int:
    """A port that the processes of a job agree on, among the highest 4096, as JAX does."""
    if "JAX_COORDINATOR_PORT" in environ:
        return _number(environ, "JAX_COORDINATOR_PORT")
    return job % 2**12 + (65535 - 2**12 + 1)


def _ours(environ: Mapping[str, str]) -> Cluster | None:
    if OURS[1] not in environ:
        return None
    count = _number(environ, OURS[1])
    if count > 1 and OURS[0] not in environ:
        raise UserError(f"{OURS[1]}={count} and {OURS[0]} is not set: expected HOST:PORT")
    this = _number(environ, OURS[2], "JOB_COMPLETION_INDEX") if count > 1 else 0
    where = "Kubernetes" if "KUBERNETES_SERVICE_HOST" in environ else "the environment"
    return Cluster(where, environ.get(OURS[0]), count, this)


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    # A batch script itself, or a shell, is no step: it sees the job's tasks, and is alone.
    if not {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environ.keys():
        return None
    count = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if count < 2:
        return None
    nodes = node_names(environ["SLURM_STEP_NODELIST"])
    port = _port(environ, _number(environ, "SLURM_JOB_ID"))
    each = _tasks_per_node(
        environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    )
    node = _number(environ, "SLURM_NODEID", default=0)
    tasks = each[node] if node < len(each) else -(-count // len(nodes))
    devices = _share(environ, _number(environ, "SLURM_LOCALID"), tasks) if tasks > 1 else None
    this = _number(environ, "SLURM_PROCID")
    return Cluster("Slurm", f"{nodes[0]}:{port}", count, this, devices)


def node_names(nodes: str) -> list[str]:
    """Slurm's list of nodes one by one: "node[001,003-005],login" is five."""
    names = []
    for part in re.findall(r"(?:[^,\[]+(?:\[[^\]]*\])?)+", nodes):
        found = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            found = [head + tail for head in found for tail in ([plain] if plain else _all(ranges))]
        names += found
    if not names:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r}: expected names of nodes")
    return names


def _all(ranges: str) -> list[str]:
    """ "001,003-005" as "001", "003", "004", "005"."""
    found = []
    for one in ranges.split(","):
        first, _, last = one.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise UserError(f"a list of nodes has [{ranges}]: expected numbers and ranges")
        found += [f"{i:0{len(first)}d}" for i in range(int(first), int(last or first) + 1)]
    return found


def _tasks_per_node(counts: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    if not {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"} <= environ.keys():
        return None
    count, this = (_number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if count < 2:
        return None
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    tasks = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1)
    devices = _share(environ, local, tasks) if tasks > 1 else None
    # Open MPI 4: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"; 5: "prterun-HOST-1234@1".
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    name = re.fullmatch(r"prterun-(.+)-(\d+)@\d+", environ.get("PMIX_NAMESPACE", ""))
    if found := re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri):
        host, job = found[2] or f"[{found[3]}]", int(found[1]) // 2**12
    elif name:
        host, job = name[1], int(name[2])
    elif OURS[0] in environ:
        host, job = "localhost", 0  # the caller puts what is given in its place
    else:
        raise UserError(
            f"Open MPI started {count} processes and does not say where process 0 is: "
            f"mpirun -x {OURS[0]}=HOST:PORT"
        )
    host = "localhost" if tasks == count else host
    return Cluster("Open MPI", f"{host}:{_port(environ, job)}", count, this, devices)


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """Names of the NVIDIA GPUs that a process with this environment sees."""
    if (named := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _share(environ: Mapping[str, str], local: int, tasks: int) -> tuple[int, ...] | None:
    """One task's GPUs of those that all tasks of a node see; None where it sees its own alone."""
    each = len(visible_gpus(environ)) // tasks
    return tuple(range(local * each, (local + 1) * each)) or None


def _tpu(
    environ: Mapping[str, str], metadata: Callable[[str], str | None] | None
) -> Cluster | None:
    if "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return Cluster("Cloud TPU, several slices")
    named = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if named is not None:
        workers: Sequence[str] = [name.strip() for name in named.split(",") if name.strip()]
        number = environ.get("TPU_WORKER_ID", "")
    elif metadata is not None or _on_a_tpu():
        ask = metadata or _ask
        # "HOST,..." or, older, "NAME:ID:HOST,..."
        found = ask("worker-network-endpoints") or ""
        workers = [one.split(":")[-1] for one in found.split(",")]
        number = ask("agent-worker-number") or "" if len(workers) > 1 else ""
    else:
        return None
    if len(workers) < 2:
        return None
    if not number.isdecimal():
        raise UserError(f"a TPU slice of {len(workers)} hosts, and TPU_WORKER_ID={number!r}")
    port = _number(environ, "JAX_COORDINATOR_PORT", default=TPU_PORT)
    host = workers[0].partition(":")[0]
    return Cluster("Cloud TPU", f"{host}:{port}", len(workers), int(number))


def _on_a_tpu() -> bool:
    """True on a Google Cloud machine with TPUs: their library is installed, and a device there."""
    devices = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*"))
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def _ask(key: str) -> str | None:
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None
