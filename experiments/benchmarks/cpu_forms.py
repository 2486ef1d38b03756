"""The forms that operations have on CPUs, each beside XLA's own, in turns in one run.

max_pool        2x2, with its gradient; and 3x3 of stride 2
kernel_gradient of a 3x3 convolution, in parts of the batch
input_gradient  of a 3x3 convolution of stride 2, by phases
batch_norm      training-mode statistics, output and gradients of flax's BatchNorm: compiled with
                this library's options and without
step            a MiniModel training step as a run compiles it, and with XLA's own forms and options

Each round runs one after the other on operands that several repetitions keep out of the caches. The
ratio is XLA's seconds over ours: above 1, ours is faster.

Standard output has one line of JSON a row, standard error the table.

Claim: none; it measures.

Command: python -m experiments.benchmarks.cpu_forms

Hardware: a CPU.

Published: none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.benchmarks import common, steps
from flax_resnet import cpu, flags, models
from flax_resnet.config import TrainConfig
from flax_resnet.errors import UserError, check_range
from flax_resnet.layers import Layers, max_pool
from flax_resnet.main import one_line_errors

Row = dict[str, Any]
HEADER = ("operation", "input", "ours ms", "XLA's own ms", "ratio")
COPIES = 4
"""Operands of a kind in a program: together more than a cache holds."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared."""

    batch_size: int = 128
    """Images."""
    image_size: int = 32
    """Height and width of the first stage's maps; later stages have halves of it."""
    rounds: int = 7
    """Turns of each that are timed, after one that is not."""
    step: bool = True
    """Compare a whole training step too."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "rounds"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), 1)
        if self.image_size % 8:
            raise UserError(f"--image-size {self.image_size}: expected a multiple of 8")


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Within it layers have XLA's own operations, and programs its own options."""
    with (
        mock.patch.object(cpu, "is_backend", return_value=False),
        mock.patch.object(cpu, "compiler_options", return_value=None),
    ):
        yield


def operations() -> dict[str, Callable[[jax.Array], Any]]:
    """What is compared, functions of a map (N, H, W, C) that end in its gradients."""

    def pool(window: int) -> Callable[[jax.Array], Any]:
        return jax.grad(lambda x: jnp.sum(jnp.square(max_pool(x, window, 2, window // 3))))

    def kernel_gradient(x: jax.Array) -> Any:
        channels = x.shape[-1]
        conv = Layers().conv(channels, 3)
        kernel = jnp.zeros((3, 3, channels, channels), x.dtype)

        def loss(kernel: jax.Array) -> jax.Array:
            y = conv.apply({"params": {"kernel": kernel}}, x)
            # With a gradient of x itself: as in a network, an array that has to be read.
            return jnp.vdot(jnp.asarray(y), jax.lax.stop_gradient(jnp.roll(x, 1, 0)))

        return jax.grad(loss)(kernel)

    def input_gradient(x: jax.Array) -> Any:
        channels = x.shape[-1]
        conv = Layers().conv(channels, 3, 2)
        kernel = jnp.ones((3, 3, channels, channels), x.dtype)
        _, back = jax.vjp(lambda x: jnp.asarray(conv.apply({"params": {"kernel": kernel}}, x)), x)
        return back(x[:, ::2, ::2])

    def batch_norm(x: jax.Array) -> Any:
        norm = nn.BatchNorm(use_running_average=False)
        variables = norm.init(jax.random.key(0), x)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            y, _ = norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(jnp.square(nn.relu(jnp.asarray(y))))

        return jax.grad(loss, (0, 1))(variables["params"], x)

    return {
        "max_pool 2x2": pool(2),
        "max_pool 3x3": pool(3),
        "kernel_gradient": kernel_gradient,
        "input_gradient": input_gradient,
        "batch_norm": batch_norm,
    }


def compiled(function: Callable[[jax.Array], Any], maps: Sequence[jax.Array]) -> Any:
    """One program that does ``function`` for each of several maps."""

    def each(maps: Sequence[jax.Array]) -> list[Any]:
        return [function(x) for x in maps]

    return jax.jit(each, compiler_options=cpu.compiler_options()).lower(maps).compile()


def compare(name: str, settings: Settings, stage: int) -> Row:
    """Times an operation on the maps of a stage."""
    size, channels = settings.image_size >> stage, 32 << stage
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, size, size, channels)
    maps = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(COPIES)]
    ours = compiled(operations()[name], maps)
    with plain_forms():
        plain = compiled(operations()[name], maps)
    turns = {
        "ours": lambda: common.timed(ours, maps)[1] / COPIES,
        "xla": lambda: common.timed(plain, maps)[1] / COPIES,
    }
    return {"operation": name, "input": "x".join(map(str, shape)), **alternate(turns, settings)}


def compare_steps(settings: Settings) -> Row:
    """Times the training step of a MiniModel."""
    config = TrainConfig(
        model=models.MiniModel(),
        batch_size=settings.batch_size,
        optimizer=steps.optimizer("adam", 1e-3),
    )

    def turn() -> Callable[[], float]:
        ready, batch = steps.noise_run(config, steps.one_device(), settings.image_size)
        _, of_steps = steps.training(ready, batch)
        return lambda: of_steps(1)

    ours = turn()
    with plain_forms():
        plain = turn()
    images = f"{settings.batch_size}x{settings.image_size}x{settings.image_size}x3"
    return {
        "operation": "step",
        "input": images,
        **alternate({"ours": ours, "xla": plain}, settings),
    }


def alternate(turns: dict[str, Callable[[], float]], settings: Settings) -> Row:
    """Seconds of each, in turns; and the ratio, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(1 + settings.rounds):
        for name, turn in turns.items():
            measured = turn()
            if number:
                seconds[name].append(measured)
    ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["xla"], strict=True)]
    return {
        **{
            f"{name}_seconds": dataclasses.asdict(common.Timing.of(each))
            for name, each in seconds.items()
        },
        "ratio": dataclasses.asdict(common.Timing.of(ratios)),
    }


def report(rows: Sequence[Row]) -> str:
    """The table for people."""
    lines = [
        [
            row["operation"],
            row["input"],
            *(f"{1e3 * row[name]['median']:.1f}" for name in ("ours_seconds", "xla_seconds")),
            str(common.Timing(**row["ratio"])),
        ]
        for row in rows
    ]
    return common.table(HEADER, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Compares all; prints lines of JSON, then the table."""
    with one_line_errors(), common.no_compilation_cache():
        settings = flags.cli(
            Settings, argv, __doc__ or "", "python -m experiments.benchmarks.cpu_forms"
        )
        if not cpu.is_backend():
            raise UserError(f"the backend is {jax.default_backend()}: set JAX_PLATFORMS=cpu")
        rows = [compare(name, settings, stage) for name in operations() for stage in range(4)]
        if settings.step:
            rows.append(compare_steps(settings))
        for row in rows:
            common.print_json({"benchmark": "cpu_forms", **row, "hardware": common.hardware()})
        print(f"median (least-most)\n{report(rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
