"""What this machine can do at best: a large matrix product, and memory read and written.

Both by jax and by torch, where that is installed, one after the other, each in a process of its
own with its own defaults; the larger figure counts. Shares of it are what benchmarks call "share of
the machine's measured peak".
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.benchmarks import workers

TRIES = 7
FRAMEWORKS = ("jax", "torch")
SIZES: Mapping[workers.Device, int] = {"cpu": 4096, "gpu": 16384}
"""Rows of the matrices; memory is measured with four times as many values."""
LIMIT = 300.0
"""Seconds for one framework."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """The machine's best.

    Attributes:
      gflops: 10^9 floating-point operations a second, of a square matrix product.
      gb_per_second: 10^9 bytes a second, read and written.
      dtype: of the product.
      size: rows of its matrices.
      by: {framework: its two figures, or why it has none}.
    """

    gflops: float
    gb_per_second: float
    dtype: str
    size: int
    by: Mapping[str, Any]

    def share(self, gflops: float) -> float:
        """``gflops`` as a share of the best."""
        return gflops / self.gflops


def measured(device: workers.Device, dtype: str, cores: int, size: int | None = None) -> Peak:
    """Measures it.

    Raises:
      workers.WorkerError: neither framework can.
    """
    size = size or SIZES[device]
    by: dict[str, Any] = {}
    for framework in FRAMEWORKS:
        task = {"framework": framework, "device": device, "dtype": dtype, "size": size}
        try:
            worker = workers.Worker(__name__, {**task, "cores": cores}, device, cores, LIMIT)
        except workers.WorkerError as error:
            by[framework] = {"error": str(error)}
            continue
        worker.close()
        by[framework] = {name: worker.about[name] for name in ("gflops", "gb_per_second")}
    found = [each for each in by.values() if "error" not in each]
    if not found:
        raise workers.WorkerError("; ".join(f"{name}: {by[name]['error']}" for name in by))
    best = {name: max(each[name] for each in found) for name in ("gflops", "gb_per_second")}
    return Peak(**best, dtype=dtype, size=size, by=by)


def least_seconds(function: Callable[[], Any], tries: int = TRIES) -> float:
    """Seconds of the quickest call, after one that is not counted."""
    function()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def build(task: Mapping[str, Any]) -> workers.Built:
    """In a worker: measures one framework."""
    size = task["size"]
    multiply, move = {"jax": jax_calls, "torch": torch_calls}[task["framework"]](task)
    about = {
        "gflops": 2 * size**3 / least_seconds(multiply) / 1e9,
        "gb_per_second": 2 * 4 * 4 * size**2 / least_seconds(move) / 1e9,
    }
    return workers.Built(about, lambda steps: 0.0)


def jax_calls(task: Mapping[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(a product, a read and a write of 4 size^2 floats), each until it is done."""
    import jax
    import jax.numpy as jnp

    size = task["size"]
    matrix = jax.random.normal(jax.random.key(0), (size, size)).astype(task["dtype"])
    product = jax.jit(jnp.matmul)
    # In place: a new array would cost the pages that it lies on.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    held = jax.block_until_ready(jnp.zeros(4 * size**2, jnp.float32))

    def move() -> None:
        nonlocal held
        held = jax.block_until_ready(add(held))

    return lambda: jax.block_until_ready(product(matrix, matrix)), move


def torch_calls(task: Mapping[str, Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same in torch."""
    import torch

    size, gpu = task["size"], task["device"] == "gpu"
    torch.set_num_threads(task["cores"])
    if gpu:
        torch.set_float32_matmul_precision("high")  # as jax does by itself
    device = torch.device("cuda" if gpu else "cpu")
    matrix = torch.randn(size, size, device=device).to(getattr(torch, task["dtype"]))
    product = torch.empty_like(matrix)
    held = torch.zeros(4 * size**2, device=device)

    def until_done(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            function()
            if gpu:
                torch.cuda.synchronize()

        return call

    return (
        until_done(lambda: torch.matmul(matrix, matrix, out=product)),
        until_done(lambda: held.add_(1)),
    )


if __name__ == "__main__":
    workers.serve(build)
