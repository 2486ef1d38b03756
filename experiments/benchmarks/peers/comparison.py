"""Our training step beside PyTorch's, Keras's and a textbook Flax one, in turns in one run.

Each peer is a process of its own with its own defaults: it builds the network and compiles its
step, and is then told to do some steps, in turn with the others (A B C A B C ...), so that only one
computes at a time and whatever slows the machine slows all. All have the same cores, batch, dtype,
optimizer and loss (cross-entropy), and as many parameters: another number is an error.

ours            the step that a run compiles, its state donated; it normalises uint8 images
flax            nn.Conv, nn.BatchNorm, TrainState, optax and jax.jit, with nothing of this library
keras           Keras 3 on jax: the compiled function that `fit` calls, its state left on the device
torch           PyTorch eager, channels last, fused optimizer
torch_compiled  the same through torch.compile

A turn begins with a step that is not timed: as in a run, the timed ones follow others.

With GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the environment all have huge pages.

All but ours are handed float32 images that are normalised already. bfloat16 is by the layers' dtype
(ours, flax), by policy (keras) and by autocast (torch). DropBlock is the paper's algorithm; ours
solves for the rate exactly. No data pipeline.

The ratio is a peer's seconds over ours in the same round: above 1, ours is faster. A peer that
cannot run has a row that says why. The machine's peak is the best of jax and torch in the same run
(the steps module); operations are counted as in train_step. A process's peak memory is of its whole
life, compilation included. CPU seconds are of all threads: on a busy machine compare those.

Standard output has one line of JSON for each network and peer, standard error the table.

Claim: none; it measures.

Command: python -m experiments.benchmarks.peers
  (on a GPU: --device gpu --models resnet50 --batch-size 256 --torch-compile-mode max-autotune)

Hardware: any.

Published: none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax

from experiments.benchmarks import common, driver, steps, workers
from experiments.benchmarks.driver import Columns, Row, note, timing_cell
from experiments.benchmarks.peers import worker
from experiments.benchmarks.peers.specs import NETWORKS
from flax_resnet import UserError, models
from flax_resnet.errors import POSITIVE, check_types
from flax_resnet.xla.backend import usable_cores

OURS, *OTHERS = worker.PEERS
COLUMNS: Columns = {
    "network": lambda row: row["network"],
    "peer": lambda row: row["peer"],
    "step s": timing_cell("step_seconds"),
    "CPU s": lambda row: f"{row['step_cpu_seconds']['median']:.3g}",
    "images/s": lambda row: f"{row['images_per_second']:,.0f}",
    "x ours": timing_cell("ratio_to_ours"),
    "% of peak": lambda row: f"{100 * row['peak_share']:.0f}",
    "process MB": lambda row: steps.megabytes(row["peak_rss_bytes"]),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compared."""

    models: tuple[str, ...] = tuple(NETWORKS)
    """Any of mini, resnet20, resnet50, dropblock_resnet."""
    peers: tuple[str, ...] = tuple(OTHERS)
    """Besides ours, any of flax, keras, torch, torch_compiled."""
    device: workers.Device = "cpu"
    """What all compute on."""
    cores: int | None = None
    """Of the processor, for each; None: all that this process may use."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What is computed in; parameters are float32. None: float32, on a GPU bfloat16."""
    image_size: int | None = None
    """Height and width of the images; None: 32, of resnet50 224."""
    batch_size: int | None = None
    """Images in a step; None: 128 of mini and resnet20, 8 of resnet50, 32 of dropblock_resnet."""
    optimizer: steps.OptimizerName = "sgd"
    """SGD with a momentum of 0.9, or Adam."""
    learning_rate: float = 1e-3
    """Constant; no weight decay."""
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """Of torch_compiled."""
    steps: int = 3
    """Steps of a turn, timed together."""
    rounds: int = 7
    """Turns of each peer that are timed, after one that is not."""
    limit: float = 900.0
    """Seconds that a peer may take to be built, and for a turn."""
    peak_size: int | None = None
    """Rows of the matrices that the machine's peak is measured with; None: 4096, on GPUs 16384."""

    def __post_init__(self) -> None:
        check_types(self)
        driver.check_names("--models", self.models, list(NETWORKS))
        if self.peers:
            driver.check_names("--peers", self.peers, OTHERS)
        sizes = ("image_size", "batch_size", "peak_size")
        driver.check_least(self, 1, *sizes, "steps", "rounds")
        driver.check_least(self, POSITIVE, "learning_rate", "limit")
        driver.check_cores(self.cores)
        if self.image_size is not None and self.image_size % 8:
            raise UserError(
                f"--image-size {self.image_size}: expected a multiple of 8, whose halves the "
                f"frameworks pad alike, such as {-(-self.image_size // 8) * 8}"
            )

    def task(self, network: str, peer: str) -> worker.Task:
        """What a peer is told to build."""
        known = NETWORKS[network]
        return worker.Task(
            peer=peer,
            network=network,
            image_size=self.image_size or known.image_size,
            batch_size=self.batch_size or known.batch_size,
            dtype=self.computed,
            device=self.device,
            cores=self.threads,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            compile_mode=self.torch_compile_mode,
        )

    @property
    def computed(self) -> str:
        """The dtype of the computation."""
        return self.dtype or ("bfloat16" if self.device == "gpu" else "float32")

    @property
    def threads(self) -> int:
        """Cores for each."""
        return self.cores or usable_cores()


def started(settings: Settings, network: str, stack: contextlib.ExitStack) -> list[workers.Entrant]:
    """The peers of a network, built one after another."""
    peers = []
    for name in (OURS, *settings.peers):
        note(f"{network}: builds {name}")
        task = dataclasses.asdict(settings.task(network, name))
        of_peer = (worker.__name__, task, settings.device, settings.threads, settings.limit)
        peers.append(workers.Entrant.start(stack, name, *of_peer))
    check_parameters({p.name: p.about["parameters"] for p in peers if p.worker})
    return peers


def check_parameters(counts: Mapping[str, int]) -> None:
    """Raises AssertionError unless all peers have as many parameters."""
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise AssertionError(f"the peers train networks of different sizes: {found} parameters")


def rows(
    peers: Sequence[workers.Entrant], task: worker.Task, gflop: float, best: steps.Peak
) -> list[Row]:
    """A row for each peer: its figures, or why it has none."""
    ours = next(peer for peer in peers if peer.name == OURS)
    found = []
    for peer in peers:
        row = {"network": task.network, "peer": peer.name, **peer.about}
        if peer.error is None:
            seconds = peer.values("seconds")
            timing, cpu = map(common.Timing.of, (seconds, peer.values("cpu_seconds")))
            ratio = None if ours.error else common.ratio(seconds, ours.values("seconds"))
            row |= {
                "step_seconds": dataclasses.asdict(timing),
                "step_cpu_seconds": dataclasses.asdict(cpu),
                "ratio_to_ours": ratio,
                **steps.speed(timing.median, gflop, task.batch_size, best),
                **{name: peer.answers[-1][name] for name in workers.MEMORY},
            }
        found.append({**row, "error": peer.error})
    return found


def measure(settings: Settings, network: str, gflop: float, best: steps.Peak) -> list[Row]:
    """Builds and times the peers of one network."""
    with contextlib.ExitStack() as stack:
        peers = started(settings, network, stack)
        note(f"{network}: takes turns")
        workers.take_turns([(p, settings.steps) for p in peers], settings.rounds, settings.limit)
        return rows(peers, settings.task(network, OURS), gflop, best)


def measured(settings: Settings) -> Iterator[Row]:
    """Measures the peak, then every network's peers."""
    jax.config.update("jax_platforms", "cpu")  # a GPU is for the workers
    work = {}
    for name in settings.models:  # what is wrong is said before anything is measured
        task = settings.task(name, OURS)
        size, images = task.image_size, task.batch_size
        work[name] = steps.gflop(models.create(name), size, images, "train")
    note("measures the machine's peak")
    best = steps.machine_peak(
        settings.device, settings.computed, settings.threads, settings.peak_size
    )
    facts = {
        "settings": dataclasses.asdict(settings),
        "peak": dataclasses.asdict(best),
        "hardware": common.machine(),
    }
    for network in settings.models:
        for row in measure(settings, network, work[network], best):
            task = settings.task(network, row["peer"])
            yield {**dataclasses.asdict(task), **row, **facts}


def report(rows: Sequence[Row]) -> str:
    """The table for people, with the peak."""
    return f"{steps.show_peak(rows[0]['peak'])}\n{driver.table(COLUMNS, rows, keys=2)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the peak and every network's peers; prints lines of JSON, then the table."""
    driver.run("peers", Settings, __doc__ or "", argv, measured, report)
