"""Which process of how many a launcher's environment names."""

import re

import pytest

from flax_resnet.distributed import hosts
from flax_resnet.distributed.hosts import Hosts, find
from flax_resnet.errors import UserError

SLURM = {
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[1-3]", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}  # fmt: skip
ONE_EACH = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip
OURS = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, (None, 6, 5, (2, 3))),
        # One GPU is bound to each task, and is the only one that the task sees.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0"}, (None, 6, 5, ())),
        (SLURM | ONE_EACH, (None, 3, 2, ())),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "h:5"}, ("h:5", 6, 5, (2, 3))),
        # In the batch script itself.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (MPI, (None, 4, 3, (1,))),  # JAX finds the address
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (OURS | {"JAX_PROCESS_ID": "1"}, ("a:1", 2, 1, ())),
        (OURS | {"JOB_COMPLETION_INDEX": "1"}, ("a:1", 2, 1, ())),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", None, None, ())),
        (TPU, (None, None, None, ())),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (TPU | {"MEGASCALE_COORDINATOR_ADDRESS": "m"}, (None, None, None, ())),
    ],
)
def test_what_an_environment_names(environ, expected):
    assert find(Hosts(), environ) == expected


@pytest.mark.parametrize(
    ("endpoints", "expected"), [("n:1:a,n:2:b", (None, None, None, ())), ("a", None)]
)
def test_a_tpu_machines_metadata(endpoints, expected, monkeypatch, tmp_path):
    (tmp_path / "answer").write_text(endpoints)

    def answer(request, timeout):
        assert request.full_url.endswith("/worker-network-endpoints")
        return (tmp_path / "answer").open("rb")

    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(hosts.urllib.request, "urlopen", answer)
    assert find(Hosts(), {}) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (OURS, "JAX_PROCESS_ID='': expected a whole number"),
        (OURS | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x': expected a whole number"),
        (SLURM | {"SLURM_STEP_NUM_NODES": ""}, "SLURM_STEP_NUM_NODES='': expected a whole number"),
    ],
)
def test_an_unclear_environment(environ, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find(Hosts(), environ)
