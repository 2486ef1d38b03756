"""The same numbers on one device, on eight, in two processes of four, in four of two."""

import pathlib
import sys

import numpy as np
import parity_worker
import pytest

from experiments.launch import local

pytestmark = pytest.mark.slow
SUPPORT = pathlib.Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def numbers(digits_dir, clean_environment, tmp_path_factory):
    """(processes, devices in each, ways) -> {way: {name: array}}."""
    environment = clean_environment | {"FAULTS_DATA": digits_dir}

    def trained(processes, devices, ways=tuple(parity_worker.WAYS)):
        out = tmp_path_factory.mktemp(f"{processes}x{devices}")
        command = [sys.executable, str(SUPPORT / "parity_worker.py"), str(out), *ways]
        settings = local.Settings(processes=processes, devices=devices)
        assert local.launch(command, settings, environment) == 0
        return {name: dict(np.load(out / f"{name}.npz")) for name in ways}

    return trained


@pytest.fixture(scope="module")
def one(numbers):
    return numbers(1, 1)


@pytest.mark.parametrize(
    ("processes", "devices", "ways"),
    [
        (1, 8, tuple(parity_worker.WAYS)),
        (2, 4, tuple(parity_worker.WAYS)),
        (4, 2, ("fsdp, accumulated, streamed",)),  # whatever more processes could part
    ],
)
def test_processes_and_devices_make_no_difference(numbers, one, processes, devices, ways):
    found = numbers(processes, devices, ways)
    for name in ways:
        dtype, *_ = parity_worker.WAYS[name]
        assert found[name].keys() == one[name].keys()
        limit = 1e-10 if dtype == "float64" else 1e-6
        for key, want in one[name].items():
            have = found[name][key]
            assert have.dtype == want.dtype
            gap = np.max(np.abs(have.astype(float) - want.astype(float)), initial=0)
            assert gap <= limit, (name, key, gap)
        np.testing.assert_array_equal(found[name]["confusion"], one[name]["confusion"])
        assert found[name]["confusion"].sum() == 355  # each example once, whoever read it


def test_the_ways_differ_where_they_should(one):
    kernel = "['params']['head']['kernel']"
    np.testing.assert_allclose(one["plain"][kernel].std(), one["fsdp"][kernel].std(), rtol=0.1)
    for a, b in [("plain", "plain, accumulated"), ("fsdp", "groups, zero")]:
        assert np.max(np.abs(one[a][kernel] - one[b][kernel])) > 1e-6
