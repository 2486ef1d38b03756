"""What the parity tests share. Importing it skips a module without the [parity] extra."""

import os

import numpy as np
import pytest

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras", reason="keras is not installed (the [parity] extra)")
torch = pytest.importorskip("torch", reason="torch is not installed (the [parity] extra)")
# On a busy machine its threads spend most of their time waiting for one another.
torch.set_num_threads(1)

RTOL = 1e-4
TORCH_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias",
                "mean": "running_mean", "var": "running_var"}  # fmt: skip


def assert_close(got, want, rtol=RTOL, what="difference"):
    """Relative to the largest value, as rounding errors are."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: shapes {got.shape} and {want.shape}"
    gap, largest = np.max(np.abs(got - want)), np.max(np.abs(want))
    assert gap <= rtol * largest, f"{what}: {gap:.2e}, where the largest value is {largest:.2e}"


def channels_first(x):
    """Our images as torch's."""
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def torch_layout(leaf, value):
    """(torch's name, value in torch's layout) of a variable of a flax layer."""
    value = np.asarray(value)
    if leaf == "kernel":
        value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
    return TORCH_LEAVES[leaf], value
