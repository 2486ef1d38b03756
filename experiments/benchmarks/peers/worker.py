"""The process of one peer: builds its network and training step, and times steps when asked.

Every peer trains on one batch of noise that lies on the device, with the same optimizer. Ours takes
uint8 images and normalises them in the step; the others are handed float32 images that are
normalised already. Each imports its own framework and no other's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from experiments.benchmarks import workers
from experiments.benchmarks.peers import specs

MOMENTUM = 0.9
CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Task:
    """What a peer (a key of PEERS) is to build: a network (a key of specs.NETWORKS) and its step.

    ``dtype`` is what is computed in; parameters are float32.
    """

    peer: str
    network: str
    image_size: int
    batch_size: int
    dtype: str
    device: workers.Device
    cores: int
    optimizer: Literal["sgd", "adam"]
    learning_rate: float
    compile_mode: str

    @property
    def spec(self) -> specs.Spec:
        """The network in numbers."""
        return specs.NETWORKS[self.network].spec


def ours(task: Task) -> workers.Built:
    """This library's step, as a run compiles it."""
    import flax_resnet
    from experiments.benchmarks import common, steps

    config = flax_resnet.TrainConfig(
        model=flax_resnet.create(task.network, dtype=task.dtype),
        batch_size=task.batch_size,
        optimizer=steps.optimizer(task.optimizer, task.learning_rate),
    )
    ready, batch = steps.noise_run(config, steps.one_device(), task.image_size)
    about = _about_jax(ready.state.params)
    _, turn = steps.training(ready, batch)
    return workers.Built(about, turn, common.device_peak)


def plain_flax(task: Task) -> workers.Built:
    """A textbook Flax network and step: optax, TrainState, jax.jit."""
    import jax
    import optax

    from experiments.benchmarks import common
    from experiments.benchmarks.peers import flax_nets

    net = flax_nets.build(task.spec, task.dtype)
    images, labels = _jax_noise(task)
    variables = jax.jit(net.init)(jax.random.key(0), images[:1])
    rate = task.learning_rate
    tx = optax.sgd(rate, MOMENTUM) if task.optimizer == "sgd" else optax.adam(rate)
    state = flax_nets.TrainState.create(apply_fn=net.apply, tx=tx, **variables)
    key = jax.random.key(1)

    def step(state: Any) -> Any:
        return flax_nets.train_step(state, images, labels, key)[0]

    about = _about_jax(state.params)
    return workers.Built(about, _repeated(step, state), common.device_peak)


def keras_jax(task: Task) -> workers.Built:
    """Keras 3's compiled training function on jax, which ``fit`` calls; the state stays there."""
    import keras

    from experiments.benchmarks import common
    from experiments.benchmarks.peers import keras_nets

    if task.dtype == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    net = keras_nets.build(task.spec, task.image_size)
    sgd, adam = keras.optimizers.SGD, keras.optimizers.Adam
    rate = task.learning_rate
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net.compile(sgd(rate, MOMENTUM) if task.optimizer == "sgd" else adam(rate), loss)
    images, labels = _jax_noise(task)
    net.train_on_batch(images, labels)  # makes the optimizer's variables and train_function
    batch = (images, labels, None)
    held = (
        net.trainable_variables,
        net.non_trainable_variables,
        net.optimizer.variables,
        net.metrics_variables,
    )
    state = tuple([variable.value for variable in variables] for variables in held)

    def step(state: Any) -> Any:
        return net.train_function(state, iter([batch]))[1]

    about = _about_jax(state[0])
    about["versions"]["keras"] = keras.__version__
    return workers.Built(about, _repeated(step, state), common.device_peak)


def _repeated(step: Callable[[Any], Any], state: Any) -> Callable[[int], float]:
    """What times steps of jax that are dispatched one after another."""
    import jax

    def turn(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state = step(state)  # a state is freed as soon as the next is there
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps

    return turn


def _jax_noise(task: Task) -> tuple[Any, Any]:
    """(normalised images, labels) on the device."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    shape = (task.batch_size, task.image_size, task.image_size, CHANNELS)
    images = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, task.spec.classes, task.batch_size, np.int32)
    return jax.device_put((images, labels))


def _about_jax(params: Any) -> dict[str, Any]:
    import jax

    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "device_kind": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def torch_eager(task: Task, *, compiled: bool = False) -> workers.Built:
    """PyTorch, channels last, with a fused optimizer; bfloat16 by autocast; or torch.compile's."""
    import torch

    from experiments.benchmarks.peers import torch_nets

    gpu = task.device == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_num_threads(task.cores)
    if gpu:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # as jax does by itself
    layout = torch.channels_last
    net: Any = torch_nets.build(task.spec, task.image_size).train()
    net.to(device, memory_format=layout)
    sgd, adam = functools.partial(torch.optim.SGD, momentum=MOMENTUM), torch.optim.Adam
    make: Callable[..., Any] = sgd if task.optimizer == "sgd" else adam
    optimizer = make(net.parameters(), lr=task.learning_rate, fused=True)
    shape = (task.batch_size, CHANNELS, task.image_size, task.image_size)
    images = torch.randn(shape, device=device).to(memory_format=layout)
    labels = torch.randint(task.spec.classes, shape[:1], device=device)
    forward = torch.compile(net, mode=task.compile_mode) if compiled else net

    def turn(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=task.dtype == "bfloat16"):
                loss = torch.nn.functional.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    about = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "device_kind": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": {"torch": torch.__version__},
    }
    return workers.Built(about, turn, torch.cuda.max_memory_allocated if gpu else lambda: None)


PEERS: Mapping[str, Callable[[Task], workers.Built]] = {
    "ours": ours,
    "flax": plain_flax,
    "keras": keras_jax,
    "torch": torch_eager,
    "torch_compiled": functools.partial(torch_eager, compiled=True),
}
"""By the names that the benchmark gives them."""


def build(task: Mapping[str, Any]) -> workers.Built:
    """In a worker: builds a peer."""
    found = Task(**task)
    return PEERS[found.peer](found)
