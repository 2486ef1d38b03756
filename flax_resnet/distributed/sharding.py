"""Devices as a mesh with one data axis, and arrays placed on it: split over the axis or whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_resnet.errors import UserError

DATA_AXIS = "data"
StateSharding = Literal["replicated", "zero", "fsdp"]


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh named "data" over ``devices``, by default all of all processes.

    Each process's devices are neighbours in it, so that its rows of a batch are one run of rows.
    """
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def group_sharding(mesh: Mesh) -> NamedSharding:
    """Of batches behind one another: the second axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array is on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Makes global arrays of this process's rows of a batch (a pytree of numpy arrays)."""
    return put_local(batch_sharding(mesh), batch)


def put_local(sharding: NamedSharding, tree: Any) -> Any:
    """Makes global arrays of this process's part of each (numpy arrays), split as ``sharding``."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Places a whole copy of each array on every device, in buffers of its own."""
    return put(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def put(tree: Any, shardings: Any) -> Any:
    """Places a tree of arrays that every process has whole, in buffers of their own.

    ``jax.device_put`` may hand back the buffer it was given, which must not be donated.
    """

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        host = np.array(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def split_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings that split each array over the devices, for a tree of arrays or shapes.

    An array is split along its largest axis that divides evenly, of equal ones the last. Those
    of one axis (scales, offsets) stay whole: they are a thousandth of a network.
    """

    def one(x: Any) -> NamedSharding:
        even = [axis for axis, size in enumerate(x.shape) if size and size % mesh.size == 0]
        if len(x.shape) < 2 or not even:
            return replicated(mesh)
        split = max(even, key=lambda axis: (x.shape[axis], axis))
        axes = [DATA_AXIS if axis == split else None for axis in range(len(x.shape))]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(one, tree)


def gathered(mesh: Mesh, tree: Any) -> Any:
    """Inside jit: every device has the whole of each array."""
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def check_divisible(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError unless ``batch_size`` divides evenly over the mesh's devices."""
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        choices = f"{below} or {above}" if below > 0 else f"{max(above, devices)}"
        raise UserError(
            f"{name}={batch_size} is not divisible by the {devices} devices: use {choices}"
        )


def same_everywhere(value: int) -> int:
    """Process 0's number, in every process. Collective: every process must call it."""
    return int(leads(np.int32(value)))


def leads(array: Any) -> np.ndarray:
    """Process 0's array, in every process. Collective, with one shape and dtype in all."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def describe(mesh: Mesh) -> dict[str, Any]:
    """What a mesh is made of, as JSON values."""
    devices = mesh.devices.flat
    return {
        "processes": len({device.process_index for device in devices}),
        "devices": mesh.size,
        "device_kind": devices[0].device_kind,
    }


def is_lead() -> bool:
    """True in the one process that writes logs and figures."""
    return jax.process_index() == 0
