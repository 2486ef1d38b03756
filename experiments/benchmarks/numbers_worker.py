"""The process of the numbers benchmark: computes a network on one device, leaves its arrays."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

import flax_resnet
from experiments.benchmarks import steps, workers
from flax_resnet.augment import normalize


def outputs(task: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{part/name: array} of a network on this process's first device."""
    config = flax_resnet.TrainConfig(
        model=flax_resnet.create(task["network"], dtype=task["dtype"]),
        batch_size=task["batch_size"],
        optimizer=steps.optimizer("sgd", 1e-3),
    )
    ready, batch = steps.noise_run(config, steps.one_device(), task["image_size"])
    state = ready.state

    @jax.jit
    def logits(state: Any, images: Any) -> Any:
        return state.apply_fn(state.variables(), normalize(images, state.normalization))

    found = {"logits": np.asarray(logits(state, batch["image"]), np.float32)}
    after, sums = jax.jit(functools.partial(ready.steps()[0]))(state, batch)
    found["loss"] = np.asarray(sums["loss"] / sums["count"])
    trees = {
        "gradient": optax.tree.get(after.opt_state, "trace"),
        "batch_stats": after.batch_stats,
    }
    for part, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[part + jax.tree_util.keystr(path)] = np.asarray(leaf, np.float32)
    return found


def build(task: Mapping[str, Any]) -> workers.Built:
    """In a worker: computes, and leaves the arrays at the task's path."""
    jax.config.update("jax_default_matmul_precision", "highest")
    arrays: Any = outputs(task)
    np.savez(task["path"], **arrays)
    return workers.Built({"device_kind": jax.devices()[0].device_kind}, lambda steps: 0.0)


if __name__ == "__main__":
    workers.serve(build)
