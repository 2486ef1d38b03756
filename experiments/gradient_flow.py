"""Gradients by depth at initialisation, of plain, residual and highway networks.

Claim: without normalisation, from Glorot's initialisation, the gradient vanishes on its way down a
plain network of 110 layers: by the first block's output it is 4e-18 of that by the last block's. In
a residual network it grows, 200 times; in a highway network it falls to 7e-4. With BatchNorm and
He's initialisation, as the residual papers train, it does not vanish in the plain network (He et
al. 2016, section 4.1, say so): it explodes, 3e7 times, and so it does in a highway network, 2e6
times. In a residual network it grows 40 times.

A kernel's gradient is that signal times the activations from below. In the plain network without
normalisation the activations vanish upwards as the signal does downwards, so the gradients of all
its kernels are alike, and next to nothing: 1e-20 to 1e-19 at 110 layers. Their ratio of first to
last shows no vanishing, their size does.

All this is at initialisation, on digits enlarged to 32x32 in batches of 32: geometric means of 3
seeds, each within some 3 times of them. It says nothing of how well a network trains.

Command: python -m experiments.gradient_flow
Hardware: a 2-core CPU.
Published: none; He et al. (2016, section 4.1) say that in their plain networks it does not vanish.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy.stats import gmean

from experiments.benchmarks import common
from flax_resnet import Block, ResNet, UserError, cifar_resnet, unstack_blocks
from flax_resnet.cli import flags
from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.data.normalization import normalize, statistics
from flax_resnet.data.sklearn_digits import load_digits
from flax_resnet.errors import check_range
from flax_resnet.figures import canvas
from flax_resnet.models.blocks import Connection
from flax_resnet.records.files import replacing
from flax_resnet.records.run_dir import RESULT, write_json
from flax_resnet.training import metrics

CONNECTIONS: tuple[Connection, ...] = ("plain", "residual", "highway")
INITS = {"batch": "he_normal", "none": "glorot_uniform"}
"""Initialisation that goes with each norm."""
QUANTITIES = {"kernel": "loss by kernel", "output": "loss by block output"}
"""End of a norm's name: what the gradient is taken by."""
DIGITS_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    workdir: str = "runs/gradient_flow"
    """Where the figure, the table and all single norms go."""
    depths: tuple[int, ...] = (20, 56, 110)
    """Depths of the networks, each 6n + 2."""
    seeds: int = 3
    """Initialisations, each with a batch of its own."""
    batch_size: int = 32
    """Digits in a batch."""
    image_size: int = 32
    """Height and width, a multiple of 8: pixels of the 8x8 digits are repeated."""

    def __post_init__(self) -> None:
        if not self.depths:
            raise UserError("--depths: expected one or more")
        if self.image_size < DIGITS_SIZE or self.image_size % DIGITS_SIZE:
            raise UserError(f"--image-size {self.image_size}: expected a multiple of 8")
        for name in ("seeds", "batch_size"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), 1)


def gradient_norms(
    module: ResNet, variables: Mapping[str, Any], batch: Mapping[str, Any]
) -> list[tuple[str, float]]:
    """L2 norms of the gradient of the mean cross-entropy, in training mode, from first to last.

    The batch is "image" float (N, H, W, C) and "label" int (N,); blocks may be stacked.

    Returns:
      (name, norm) of each block's convolutions, "stage1_block1/conv1/kernel", and of its output,
      "stage1_block1/output". The latter is the signal that backpropagation hands down. Gates
      and projections are left out.
    """
    variables = unstack_blocks(module, dict(variables))
    module = module.clone(scan_blocks=False)
    kernels, outputs = jax.device_get(_gradients(module, variables, batch["image"], batch["label"]))
    norms = []
    for block in sorted(outputs, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        convs = sorted(name for name in kernels[block] if re.fullmatch(r"conv\d+", name))
        norms += [(f"{block}/{c}/kernel", _norm(kernels[block][c]["kernel"])) for c in convs]
        norms.append((f"{block}/output", _norm(outputs[block])))
    return norms


@functools.partial(jax.jit, static_argnums=0)
def _gradients(module: ResNet, variables: Any, images: jax.Array, labels: jax.Array) -> Any:
    """(gradient by parameters, {block: gradient by its output})."""
    fixed = {name: tree for name, tree in variables.items() if name != "params"}
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def loss(params: Any, added: Mapping[str, jax.Array] | None) -> jax.Array:
        def add(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out, name = call(*args, **kwargs), context.module.name
            if not isinstance(context.module, Block) or context.method_name != "__call__":
                return out
            shapes[name] = jax.ShapeDtypeStruct(out.shape, out.dtype)
            return out if added is None else out + added[name]

        with nn.intercept_methods(add):
            logits, _ = module.apply(
                {"params": params, **fixed}, images, train=True, mutable=["batch_stats"]
            )
        return jnp.mean(metrics.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])))

    # The gradient by an output is that by zeros added to it, whose shapes a first pass finds.
    jax.eval_shape(functools.partial(loss, added=None), variables["params"])
    zeros = {name: jnp.zeros(s.shape, s.dtype) for name, s in shapes.items()}
    return jax.grad(loss, argnums=(0, 1))(variables["params"], zeros)


def _norm(x: np.ndarray) -> float:
    # In float64: the square of 1e-25 is nothing in float32.
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def digits_batch(seed: int, size: int, image_size: int) -> dict[str, np.ndarray]:
    """Digits drawn by ``seed``, normalised, each pixel repeated up to ``image_size``."""
    images, labels = load_digits()
    rows = np.random.default_rng(seed).choice(len(images), size, replace=size > len(images))
    stats = statistics("channel", images.shape[1:], [images])
    floats = np.asarray(normalize(jnp.asarray(images[rows]), jax.tree.map(jnp.asarray, stats)))
    repeats = image_size // DIGITS_SIZE
    return {"image": floats.repeat(repeats, 1).repeat(repeats, 2), "label": labels[rows]}


def networks(depths: Sequence[int]) -> Iterator[tuple[dict[str, Any], ResNet]]:
    """(its description, the network) for each setting, connection and depth."""
    for norm, init in INITS.items():
        for connection in CONNECTIONS:
            for depth in depths:
                module = cifar_resnet(
                    depth, connection=connection, norm_kind=norm, kernel_init=init
                )
                about = {"norm": norm, "init": init, "connection": connection, "depth": depth}
                yield about, module


def measure(module: ResNet, settings: Settings) -> list[list[tuple[str, float]]]:
    """``gradient_norms`` of each seed."""
    found = []
    for seed in range(settings.seeds):
        batch = digits_batch(seed, settings.batch_size, settings.image_size)
        # Not compiled: many blocks are alike, and each operation is compiled once for all.
        variables = module.init(jax.random.key(seed), batch["image"][:1])
        found.append(gradient_norms(module, variables, batch))
    return found


def profile(runs: Sequence[Sequence[tuple[str, float]]], quantity: str) -> np.ndarray:
    """Norms of one quantity: (seeds, layers)."""
    return np.array([[x for name, x in run if name.endswith(quantity)] for run in runs])


def summary(norms: np.ndarray) -> dict[str, float]:
    """Geometric means over seeds (rows) at the first, middle and last layer, and first / last."""
    names, ratio = ("first", "middle", "last"), norms[:, 0] / norms[:, -1]
    means = gmean(norms[:, [0, norms.shape[1] // 2, -1]]).tolist()
    return {
        **dict(zip(names, means, strict=True)),
        "first_over_last": float(gmean(ratio)),
        "least_ratio": float(ratio.min()),
        "most_ratio": float(ratio.max()),
        "n": len(norms),
    }


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws norms against depth: a column for each setting, a row for each quantity."""
    from matplotlib.lines import Line2D

    figure = canvas.new_figure(11, 8)
    depths = sorted({result["depth"] for result in results})
    colors = dict(zip(CONNECTIONS, ("tab:red", "tab:blue", "tab:green"), strict=False))
    # The deeper, the longer the dashes; the deepest is drawn through.
    styles: dict[int, Any] = {d: (0, (1 + 3 * i, 1.5)) for i, d in enumerate(depths[:-1])}
    styles[depths[-1]] = "-"
    grid = figure.subplots(len(QUANTITIES), len(INITS), sharex=True)
    for row, (quantity, meaning) in zip(grid, QUANTITIES.items(), strict=True):
        for axes, (norm, init) in zip(row, INITS.items(), strict=True):
            for result in (r for r in results if r["norm"] == norm):
                norms = profile(result["runs"], quantity)
                x = np.linspace(0, 1, norms.shape[1])
                color = colors[result["connection"]]
                axes.plot(x, gmean(norms), color=color, ls=styles[result["depth"]], lw=1.3)
                axes.fill_between(x, norms.min(axis=0), norms.max(axis=0), color=color, alpha=0.15)
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.set_title(f"{'BatchNorm' if norm == 'batch' else 'no norm'}, {init}", fontsize=10)
            axes.set_ylabel(f"|gradient of {meaning}|")
    for axes in grid[-1]:
        axes.set_xlabel("place in the network: 0 the first block, 1 the last")
    seeds = len(results[0]["runs"])
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles += [Line2D([], [], color="black", ls=styles[d], label=f"depth {d}") for d in depths]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(f"Gradients at initialisation, on digits; band: least to most of {seeds} seeds")
    canvas.save(figure, path)


def write_norms(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes every norm: one line of CSV for each network, seed and layer."""
    about = ("norm", "init", "connection", "depth")
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*about, "seed", "name", "gradient_norm"])
        for result in results:
            for seed, run in enumerate(result["runs"]):
                writer.writerows([*(result[k] for k in about), seed, *pair] for pair in run)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every network; writes the figure, the norms and their summary."""
    with one_line_errors():
        settings = flags.cli(Settings, argv, __doc__ or "", "python -m experiments.gradient_flow")
        workdir = Path(settings.workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir {workdir}: cannot be made: {error.strerror}") from error
        results: list[dict[str, Any]] = []
        for about, module in networks(settings.depths):
            runs, seconds = common.timed(measure, module, settings)
            summaries = {q: summary(profile(runs, q)) for q in QUANTITIES}
            ratios = [f"{q} {found['first_over_last']:.1e}" for q, found in summaries.items()]
            print(*about.values(), "first/last by", *ratios, f"({seconds:.1f} s)", flush=True)
            results.append({**about, **summaries, "runs": runs})
        write_norms(results, workdir / "gradient_norms.csv")
        record = {
            "settings": dataclasses.asdict(settings),
            "hardware": common.hardware(),
            "networks": [{k: v for k, v in r.items() if k != "runs"} for r in results],
        }
        write_json(workdir / RESULT, record)
        draw(results, workdir / "gradient_flow.png")
        print(f"figure: {workdir / 'gradient_flow.png'}")


if __name__ == "__main__":
    main()
