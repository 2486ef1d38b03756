"""Devices as a mesh with one data axis, and arrays placed on it.

The batch is split over the axis, the state is on every device, and ``jax.jit`` puts in the
collectives. Nothing else in the library knows how many devices or processes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_resnet.errors import UserError

DATA_AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh named "data" over ``devices``, by default all of all processes."""
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array is on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Makes global arrays of this process's rows of a batch (a pytree of numpy arrays)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Places a whole copy of each array on every device, in buffers of its own.

    ``jax.device_put`` may hand back the very buffer it was given, and donating that would
    delete the caller's array too. So the leaves pass through host memory.
    """
    sharding = replicated(mesh)

    def put(x: Any) -> jax.Array:
        host = np.array(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def check_divisible(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless ``batch_size`` divides evenly over the mesh's devices."""
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        choices = f"{below} or {above}" if below > 0 else f"{max(above, devices)}"
        raise UserError(
            f"{name}={batch_size} is not divisible by the {devices} devices: use {choices}"
        )


def is_lead() -> bool:
    """True in the one process that writes logs and figures."""
    return jax.process_index() == 0
