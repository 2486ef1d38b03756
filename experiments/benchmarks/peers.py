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
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from experiments.benchmarks import common, peer_worker, steps, workers
from experiments.benchmarks.peer_nets.specs import NETWORKS
from flax_resnet import flags, models
from flax_resnet.errors import POSITIVE, UserError, check_choices, check_range, did_you_mean
from flax_resnet.main import one_line_errors

OURS, *OTHERS = peer_worker.PEERS
PAUSE = 0.1
"""Seconds before a turn: the threads of the one before may still spin."""
Row = dict[str, Any]
HEADER = ("network", "peer", "step s", "CPU s", "images/s", "x ours", "% of peak", "process MB")


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
        check_choices(self)
        for flag, words, known in (
            ("--models", self.models, list(NETWORKS)),
            ("--peers", self.peers, OTHERS),
        ):
            for word in words:
                if word not in known:
                    near = did_you_mean(word, known)
                    raise UserError(f"{flag} {word!r}: expected some of {', '.join(known)}{near}")
        if not self.models:
            raise UserError("--models: expected one or more names of networks")
        for name in ("cores", "image_size", "batch_size", "steps", "rounds", "peak_size"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), 1)
        for name in ("learning_rate", "limit"):
            check_range("--" + name.replace("_", "-"), getattr(self, name), POSITIVE)
        if self.image_size is not None and self.image_size % 8:
            raise UserError(
                f"--image-size {self.image_size}: expected a multiple of 8, whose halves the "
                f"frameworks pad alike, such as {-(-self.image_size // 8) * 8}"
            )
        if self.cores is not None and self.cores > workers.usable_cores():
            raise UserError(f"--cores {self.cores}: there are {workers.usable_cores()}")

    def task(self, network: str, peer: str) -> peer_worker.Task:
        """What a peer is told to build."""
        known = NETWORKS[network]
        return peer_worker.Task(
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
        return self.cores or workers.usable_cores()


@dataclasses.dataclass
class Peer:
    """What has come of a peer."""

    name: str
    worker: workers.Worker | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    """A step's, of each round."""
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    """Likewise, of all its threads."""
    held: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the worker said last of its memory."""
    error: str | None = None
    """Why it is not measured."""

    @property
    def about(self) -> Mapping[str, Any]:
        """What the worker said when it was built."""
        return self.worker.about if self.worker else {}


def started(settings: Settings, network: str, stack: contextlib.ExitStack) -> list[Peer]:
    """The peers of a network, built one after another.

    Raises:
      AssertionError: their networks are not the same size.
    """
    peers = []
    for name in (OURS, *settings.peers):
        task = dataclasses.asdict(settings.task(network, name))
        peer = Peer(name)
        peers.append(peer)
        note(f"{network}: builds {name}")
        try:
            peer.worker = workers.Worker(
                peer_worker.__name__,
                task,
                settings.device,
                settings.threads,
                settings.limit,
            )
        except workers.WorkerError as error:
            peer.error = str(error)
            continue
        stack.callback(peer.worker.close)
    check_parameters({p.name: p.about["parameters"] for p in peers if p.worker})
    return peers


def check_parameters(counts: Mapping[str, int]) -> None:
    """Raises AssertionError unless all peers have as many parameters."""
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise AssertionError(f"the peers train networks of different sizes: {found} parameters")


def take_turns(peers: Sequence[Peer], settings: Settings) -> None:
    """Times all, one after another in each round; the first round is not counted."""
    for number in range(1 + settings.rounds):
        for peer in peers:
            if peer.worker is None or peer.error is not None:
                continue
            time.sleep(PAUSE)
            try:
                answer = peer.worker.ask(settings.steps, settings.limit)
            except workers.WorkerError as error:
                peer.error = str(error)
                continue
            seconds, cpu_seconds = answer.pop("seconds"), answer.pop("cpu_seconds")
            if number:
                peer.seconds.append(seconds)
                peer.cpu_seconds.append(cpu_seconds)
            peer.held = answer


def rows(
    peers: Sequence[Peer], task: peer_worker.Task, gflop: float, best: steps.Peak
) -> list[Row]:
    """A row for each peer: its figures, or why it has none."""
    ours = next(peer for peer in peers if peer.name == OURS)
    found = []
    for peer in peers:
        row = {"network": task.network, "peer": peer.name, **peer.about}
        if peer.error is None:
            timing = common.Timing.of(peer.seconds)
            row |= {
                "step_seconds": dataclasses.asdict(timing),
                "step_cpu_seconds": dataclasses.asdict(common.Timing.of(peer.cpu_seconds)),
                "ratio_to_ours": None if ours.error else ratio(peer.seconds, ours.seconds),
                **steps.speed(timing.median, gflop, task.batch_size, best),
                **peer.held,
            }
        found.append({**row, "error": peer.error})
    return found


def ratio(seconds: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """A peer's seconds over ours, round by round."""
    each = [theirs / own for theirs, own in zip(seconds, ours, strict=True)]
    return dataclasses.asdict(common.Timing.of(each))


def operations(settings: Settings, network: str) -> float:
    """10^9 operations of a training step.

    Raises:
      UserError: the network does not take such images.
    """
    task = settings.task(network, OURS)
    return steps.gflop(models.create(network), task.image_size, task.batch_size, "train")


def measure(settings: Settings, network: str, gflop: float, best: steps.Peak) -> list[Row]:
    """Builds and times the peers of one network."""
    with contextlib.ExitStack() as stack:
        peers = started(settings, network, stack)
        note(f"{network}: takes turns")
        take_turns(peers, settings)
        return rows(peers, settings.task(network, OURS), gflop, best)


def note(text: str) -> None:
    """Says what goes on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def report(found: Sequence[Row]) -> str:
    """The table for people."""
    lines = []
    for row in found:
        cells = ["not run"]
        if row["error"] is None:
            times = row["ratio_to_ours"]
            cells = [
                str(common.Timing(**row["step_seconds"])),
                f"{row['step_cpu_seconds']['median']:.3g}",
                f"{row['images_per_second']:,.0f}",
                str(common.Timing(**times)) if times else "",
                f"{100 * row['peak_share']:.0f}",
                steps.megabytes(row["peak_rss_bytes"]),
            ]
        blank = [""] * (len(HEADER) - 2 - len(cells))
        lines.append([row["network"], row["peer"], *cells, *blank])
    failed = [f"{r['network']}, {r['peer']}: {r['error']}" for r in found if r["error"]]
    return "\n".join([common.table(HEADER, lines), *failed])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the peak and every network's peers; prints lines of JSON, then the table."""
    with one_line_errors():
        prog = "python -m experiments.benchmarks.peers"
        settings = flags.cli(Settings, argv, __doc__ or "", prog)
        jax.config.update("jax_platforms", "cpu")  # a GPU is for the workers
        work = {network: operations(settings, network) for network in settings.models}
        note("measures the machine's peak")
        best = steps.machine_peak(
            settings.device, settings.computed, settings.threads, settings.peak_size
        )
        facts_of = ("processor", "cores", "jax", "glibc_tunables")
        hardware = {name: common.hardware()[name] for name in facts_of}
        facts = {
            "settings": dataclasses.asdict(settings),
            "peak": dataclasses.asdict(best),
            "hardware": hardware,
        }
        found = []
        for network in settings.models:
            for row in measure(settings, network, work[network], best):
                task = settings.task(network, row["peer"])
                common.print_json(
                    {"benchmark": "peers", **dataclasses.asdict(task), **row, **facts}
                )
                found.append(row)
        note(", ".join(f"{name} {value}" for name, value in hardware.items()))
        note(f"{steps.show_peak(best)}\nmedian (least-most)\n{report(found)}")


if __name__ == "__main__":
    main()
