"""Which processes a launcher's environment tells of."""

import re

import pytest

from flax_resnet.clusters import Cluster, detect, node_names
from flax_resnet.errors import UserError
from flax_resnet.hosts import Hosts, find

SLURM = {
    "SLURM_JOB_ID": "4096", "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "node[001,003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}  # fmt: skip

MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip

ORTE = "OMPI_MCA_orte_hnp_uri"

OURS = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}

TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, Cluster("Slurm", "node001:61440", 6, 5, (2, 3))),
        # One GPU is bound to each task, and is the only one it sees.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, Cluster("Slurm", "node001:61440", 6, 5)),
        # One task a node takes all.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_STEP_NUM_TASKS": "3",
                  "SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
         Cluster("Slurm", "node001:61440", 3, 2)),
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, Cluster("Slurm", "node001:77", 6, 5, (2, 3))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "h:5"}, Cluster("Slurm", "h:5", 6, 5, (2, 3))),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # In the batch script itself.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (MPI | {ORTE: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
         Cluster("Open MPI", "10.96.0.1:62624", 4, 3, (1,))),
        (MPI | {ORTE: "1314521088.0;tcp6://[fe80::b9b,2620::2]:43370"},
         Cluster("Open MPI", "[fe80::b9b]:62880", 4, 3, (1,))),
        (MPI | {"PMIX_NAMESPACE": "prterun-login-1-4096@1"},
         Cluster("Open MPI", "login-1:61440", 4, 3, (1,))),
        (MPI | {"JAX_COORDINATOR_ADDRESS": "h:5"}, Cluster("Open MPI", "h:5", 4, 3, (1,))),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (OURS | {"JAX_PROCESS_ID": "1"}, Cluster("the environment", "a:1", 2, 1)),
        (OURS | {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "k"},
         Cluster("Kubernetes", "a:1", 2, 1)),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (TPU, Cluster("Cloud TPU", "t0:8476", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (TPU | {"MEGASCALE_COORDINATOR_ADDRESS": "m"}, Cluster("Cloud TPU, several slices")),
    ],
)  # fmt: skip
def test_what_an_environment_tells_of(environ, expected):
    assert find(Hosts(), environ) == expected


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ("n:1:10.0.0.2,n:2:10.0.0.3", Cluster("Cloud TPU", "10.0.0.2:8476", 2, 1)),
        ("a,b", Cluster("Cloud TPU", "a:8476", 2, 1)),
        ("a", None),
        (None, None),
    ],
)
def test_a_tpu_machines_metadata(endpoints, expected):
    said = {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}
    assert detect({}, said.get) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES is not: set both"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not set"),
        (OURS, "JAX_PROCESS_ID is not set: expected a whole number"),
        (OURS | {"JAX_PROCESS_ID": "2"}, "process 2 of 2: expected one of 0 to 1"),
        (OURS | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x': expected a whole number"),
        (SLURM | {"SLURM_STEP_NODELIST": "n[a-b]"}, "a list of nodes has [a-b]"),
        (MPI, "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        (TPU | {"TPU_WORKER_ID": ""}, "TPU_WORKER_ID=''"),
    ],
)
def test_an_unclear_environment(environ, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find(Hosts(), environ)


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("node001", ["node001"]),
        ("node001,host2", ["node001", "host2"]),
        ("node[001-003],host2", ["node001", "node002", "node003", "host2"]),
        ("n[9-10,12]", ["n9", "n10", "n12"]),
        ("a[1-2]b[3-4],c", ["a1b3", "a1b4", "a2b3", "a2b4", "c"]),
    ],
)
def test_slurms_node_lists(nodes, names):
    assert node_names(nodes) == names
