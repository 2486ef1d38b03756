"""What a GPU is asked for this library's sake: its numbers, its speed beside the peers', a record.

Parts, one after another, each the command that is printed: the device's numbers beside the CPU's
(benchmarks.numbers), ResNet-50 at 224 in bfloat16 beside torch.compile and plain Flax, and the
smaller networks likewise (benchmarks.peers), the CIFAR-10 speed run to 94, 95 and 96 %
(experiments.cifar10_speedrun) and as published (benchmarks.airbench), seeds at once
(benchmarks.seeds), training and evaluation steps, compilation cold and warm. When the time is up
the running part is ended and the exit status is 75: start the same command again, and what is
finished is not run again. A part that fails is told and the others go on; a later call tries it
again, and the status is 1.

python -m experiments.launch.gpu_suite --data-dir DIR --minutes 9

WORKDIR/record.json has every part's command and lines of JSON, the commit, and for each goal of the
project whether it was met. It needs jax for the GPU (requirements-gpu.txt), torch and torchvision
for the same GPU, and pip's airbench. It was written for 25 minutes of a GPU like the H200; nothing
has been run on a GPU yet, so how long it takes is not known. --trial runs it all on a CPU: small
networks, a few steps, scikit-learn's digits; its record is of no use but to see that it is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.launch import pieces
from flax_resnet import flags
from flax_resnet.config import write_json
from flax_resnet.errors import POSITIVE, UserError, check_range, did_you_mean
from flax_resnet.main import one_line_errors

Rows = Sequence[Mapping[str, Any]]
DATA = "DATA_DIR"
"""In a part's words: the directory of the data."""
WORK = "WORKDIR"
"""Likewise: a directory of the part's own."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One command of the suite; it prints lines of JSON.

    Attributes:
      module: of experiments.
      words: its flags.
      trial: its flags on a CPU, or None where there is no such trial.
      result: file of WORK that has its figures, in place of its standard output.
    """

    module: str
    words: str
    trial: str | None
    result: str | None = None


def speedrun(target: int, runs: int) -> Part:
    """The CIFAR-10 speed run, each of its runs in one dispatch; of a trial one of two steps."""
    words = f"--target {target} --runs {runs} --workdir {WORK}"
    small = "--model.stage-filters 4 4 4 --data.name sklearn_digits --data.image-size 32"
    return Part(
        "cifar10_speedrun",
        f"{words} --steps-per-dispatch 10000 --data.data-dir {DATA}",
        f"{words} {small} --data.channels 3 --num-steps 2 --batch-size 8 --eval-batch-size 100",
        result="runs.json",
    )


SMALL_PEERS = "--image-size 8 --batch-size 4 --steps 1 --rounds 1 --peak-size 64 --peers flax"
PARTS: Mapping[str, Part] = {
    "numbers": Part(
        "benchmarks.numbers",
        "--device gpu --models mini resnet20 resnet50",
        "--device cpu --models resnet20 --image-size 8 --batch-size 4",
    ),
    "resnet50": Part(
        "benchmarks.peers",
        "--device gpu --models resnet50 --batch-size 256 --peers flax torch torch_compiled "
        "--torch-compile-mode max-autotune --steps 10 --limit 420",
        f"--models resnet20 {SMALL_PEERS}",
    ),
    "small": Part(
        "benchmarks.peers",
        "--device gpu --models mini resnet20 --batch-size 512 --peers flax torch torch_compiled "
        "--steps 20 --limit 300",
        f"--models resnet20 {SMALL_PEERS}",
    ),
    "speedrun94": speedrun(94, runs=10),
    "airbench94": Part("benchmarks.airbench", f"--target 94 --runs 10 --data-dir {DATA}", None),
    "speedrun95": speedrun(95, runs=4),
    "speedrun96": speedrun(96, runs=3),
    "seeds": Part(
        "benchmarks.seeds", "--num-seeds 1 4 16", "--num-seeds 2 --depth 8 --image-size 8 --steps 1"
    ),
    "train_step": Part(
        "benchmarks.train_step",
        "--models resnet50 --dtype bfloat16 --batch-size 256",
        "--models resnet20 --image-size 8 --batch-size 4 --steps 1 --rounds 1 --peak-size 64",
    ),
    "eval_step": Part(
        "benchmarks.eval_step",
        "--models resnet50 --dtype bfloat16 --batch-size 256",
        "--models resnet20 --image-size 8 --batch-size 4 --steps 1 --rounds 1 --peak-size 64",
    ),
    "compile": Part(
        "benchmarks.compile_cache",
        "--dtype bfloat16 --batch-size 64 --repeats 1",
        "--models resnet20 --scanned resnet20 --batch-size 2 --repeats 1",
    ),
}
"""In the order in which they are run."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run, and for how long."""

    data_dir: str | None = None
    """Directory that holds cifar10."""
    workdir: str = "runs/gpu_suite"
    """Gets record.json, and each part's lines, log and runs."""
    minutes: float = 9.0
    """End after this many."""
    only: tuple[str, ...] = tuple(PARTS)
    """Which parts."""
    trial: bool = False
    """Small, and on the CPU."""

    def __post_init__(self) -> None:
        check_range("--minutes", self.minutes, POSITIVE)
        for name in self.only:
            if name not in PARTS:
                raise UserError(
                    f"--only {name!r}: expected some of {', '.join(PARTS)}"
                    f"{did_you_mean(name, PARTS)}"
                )
        if self.data_dir is None and not self.trial:
            raise UserError("--data-dir: name the directory that holds cifar10 (or --trial)")

    @property
    def parts(self) -> list[str]:
        """Those that are run."""
        return [name for name in self.only if not self.trial or PARTS[name].trial is not None]


def command(name: str, settings: Settings) -> list[str]:
    """The command line of a part."""
    part = PARTS[name]
    words = part.trial if settings.trial else part.words
    assert words is not None
    places = {DATA: str(settings.data_dir), WORK: str(Path(settings.workdir) / name)}
    given = [places.get(word, word) for word in words.split()]
    return [sys.executable, "-m", f"experiments.{part.module}", *given]


def lines_of(name: str, settings: Settings) -> Path:
    """Where a finished part's lines of JSON are."""
    return Path(settings.workdir) / f"{name}.jsonl"


def launch(settings: Settings) -> tuple[bool, dict[str, str]]:
    """Runs what is not finished: (False where the time did not suffice, {part: how it failed})."""
    end = time.monotonic() + 60 * settings.minutes
    workdir = Path(settings.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # Each part is a process, and some have several: none may take the whole of the GPU's memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    failed: dict[str, str] = {}
    for name in settings.parts:
        if lines_of(name, settings).exists():
            continue
        words, log = command(name, settings), workdir / f"{name}.log"
        partial = workdir / f"{name}.partial"
        print(shlex.join(words), flush=True)
        try:
            if not pieces.run(words, log, end, environment, output=partial):
                return False, failed
        except UserError as error:
            failed[name] = str(error)
            print(f"{name}: {error}", flush=True)
        else:
            if (result := PARTS[name].result) is not None:
                found = json.loads((workdir / name / result).read_text())
                partial.write_text(json.dumps(found) + "\n")
            partial.rename(lines_of(name, settings))
            print(f"{name}: finished", flush=True)
    return True, failed


def record(settings: Settings, failed: Mapping[str, str]) -> dict[str, Any]:
    """What the parts have found so far, and the goals."""
    found = {name: rows(lines_of(name, settings)) for name in PARTS}
    return {
        "trial": settings.trial,
        "commit": commit(),
        "parts": {
            name: {"command": shlex.join(["python", *command(name, settings)[1:]]), "rows": each}
            for name, each in found.items()
            if each
        },
        "failed": dict(failed),
        "missing": [name for name in settings.parts if not found[name]],
        "goals": goals(found),
    }


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON of a finished part; none of another."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def commit() -> str | None:
    """The commit that is checked out; None outside a repository."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def goals(found: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Each goal with what was measured, None where it was not, and whether that meets it."""
    return [
        {"goal": text, "measured": value, "met": None if value is None else meets(value)}
        for text, value, meets in _judged(found)
    ]


def _at_least(bound: float) -> Callable[[float], bool]:
    return lambda value: value >= bound


def _judged(found: Mapping[str, Rows]) -> Iterator[tuple[str, Any, Callable[[Any], bool]]]:
    numbers = [row["within"] for row in found["numbers"]]
    yield "the GPU's numbers are the CPU's", all(numbers) if numbers else None, bool
    peers = {row["peer"]: row for row in found["resnet50"] if row.get("error") is None}
    compiled, ours = peers.get("torch_compiled", {}), peers.get("ours", {})
    ratio = (compiled.get("ratio_to_ours") or {}).get("median")
    text = "ResNet-50 at 224 in bfloat16: images/s over those of torch.compile, at least 1.15"
    yield text, ratio, _at_least(1.15)
    text = "ResNet-50: operations a second over those of the best matrix product, at least 0.5"
    yield text, ours.get("peak_share"), _at_least(0.5)
    for target in (94, 95, 96):
        own = next(iter(found[f"speedrun{target}"]), None)
        text = f"the speed run's mean top-1, at least {target} %"
        mean = own and own["top1"]["mean"]
        yield text, mean, _at_least(target / 100)
    theirs = next(iter(found["airbench94"]), None)
    own = next(iter(found["speedrun94"]), None)
    text = "airbench94's seconds over those of the speed run to 94 %, at least 1"
    both = None
    if theirs and own:
        taken = own["train_seconds"]["mean"] + own["eval_seconds"]["mean"]
        both = theirs["seconds"]["mean"] / taken
    yield text, both, _at_least(1)
    together = {row["num_seeds"]: row["together_over_in_turn"] for row in found["seeds"]}
    text = "16 seeds at once over one after another, seconds, below 1"
    yield text, together.get(16), lambda value: value < 1


def report(made: Mapping[str, Any]) -> str:
    """The goals, a line each."""
    marks = {True: "met", False: "MISSED", None: "not measured"}
    lines = [
        f"{marks[goal['met']]}: {goal['goal']}"
        + ("" if goal["measured"] is None else f" ({goal['measured']:.4g})")
        for goal in made["goals"]
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs parts; status 0 when all are finished, 75 when the time is up, 1 when some failed."""
    with one_line_errors(), pieces.terminable():
        about, prog = __doc__ or "", "python -m experiments.launch.gpu_suite"
        settings = flags.cli(Settings, argv, about, prog)
        done, failed = launch(settings)
        made = record(settings, failed)
        write_json(Path(settings.workdir) / "record.json", made)
        print(report(made), flush=True)
    if done and failed:
        print(f"failed: {', '.join(failed)}; the same command tries again", flush=True)
        sys.exit(1)
    pieces.leave(done)


if __name__ == "__main__":
    main()
