"""What a GPU is asked for this library's sake: its numbers, its speed beside the peers', a record.

Parts, one after another, each the command that is printed: the device's numbers beside the CPU's
(benchmarks.numbers), ResNet-50 at 224 in bfloat16 beside torch.compile and plain Flax, and the
smaller networks likewise (benchmarks.peers), the CIFAR-10 speed run to 94, 95 and 96 %
(experiments.cifar10_speedrun) and as published (benchmarks.airbench), seeds at once
(benchmarks.seeds), training and evaluation steps. When the time is up the running part is ended and
the exit status is 75: start the same command again, and what is ended is not run again, unless its
command has changed. A part that fails, or takes more than the whole time, is told and the others go
on; the status is 1 at the end, and --retry runs it again.

python -m experiments.launch.gpu_suite --data-dir DIR --minutes 9

WORKDIR/record.json has every part's command, commit and lines of JSON, and for each goal of the
project whether it was met. It needs jax for the GPU (requirements-gpu.txt), torch and torchvision
for the same GPU, and pip's airbench. It was written for 25 minutes of a GPU like the H200; as a
whole it has not been run on one, so how long it takes is not known. --trial runs it on a CPU: small
networks, a few steps, scikit-learn's digits; its record is of no use but to see that it is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks.driver import check_names
from experiments.launch import pieces
from flax_resnet import UserError
from flax_resnet.cli import flags
from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.records.provenance import git_state
from flax_resnet.records.run_dir import read_json, write_json

Rows = Sequence[Mapping[str, Any]]
DATA = "DATA_DIR"
"""In a part's words: the directory of the data."""
WORK = "WORKDIR"
"""Likewise: a directory of the part's own."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of experiments with its flags, and those of its trial on a CPU (None: no trial).

    It prints lines of JSON, or leaves its figures in the file ``result`` of WORK.
    """

    module: str
    words: str
    trial: str | None
    result: str | None = None


def speedrun(target: int, runs: int) -> Part:
    """The CIFAR-10 speed run, each run in one dispatch; the trial has one target, two steps."""
    words = f"--target {target} --num-seeds {runs} --in-turn --workdir {WORK}"
    small = "--model.stage-filters 4 4 4 --data.name sklearn_digits --data.image-size 32"
    tiny = f"{words} {small} --data.channels 3 --num-steps 2 --batch-size 8 --eval-batch-size 100"
    return Part(
        "cifar10_speedrun",
        f"{words} --steps-per-dispatch 10000 --data.data-dir {DATA}",
        tiny if target == 94 else None,
        result="runs.json",
    )


TINY = "--models resnet20 --image-size 8 --batch-size 4"
TINY_STEPS = f"{TINY} --steps 2 --rounds 1 --peak-size 64"
"""Flags of a benchmark's trial."""
PARTS: Mapping[str, Part] = {
    "numbers": Part(
        "benchmarks.numbers",
        "--device gpu --models mini resnet20 resnet50 --no-strict",
        f"--device cpu --no-strict {TINY}",
    ),
    "resnet50": Part(
        "benchmarks.peers",
        "--device gpu --models resnet50 --batch-size 256 --peers flax torch torch_compiled "
        "--torch-compile-mode max-autotune --steps 10 --limit 420",
        None,
    ),
    "small": Part(
        "benchmarks.peers",
        "--device gpu --models mini resnet20 --batch-size 512 --peers flax torch torch_compiled "
        "--steps 20 --limit 300",
        TINY_STEPS,
    ),
    "speedrun94": speedrun(94, runs=10),
    "airbench94": Part("benchmarks.airbench", f"--target 94 --runs 10 --data-dir {DATA}", None),
    "speedrun95": speedrun(95, runs=4),
    "speedrun96": speedrun(96, runs=3),
    "seeds": Part(
        "benchmarks.seeds", "--num-seeds 1 4 16", "--num-seeds 2 --depth 8 --image-size 8 --steps 1"
    ),
    "dispatch": Part(
        "benchmarks.train_step",
        "--models resnet20 --steps 128 --steps-per-dispatch 16",
        f"{TINY_STEPS} --steps-per-dispatch 2",
    ),
    "train_step": Part("benchmarks.train_step", "--models resnet20 --steps 128", None),
    "eval_step": Part(
        "benchmarks.eval_step",
        "--models resnet50 --dtype bfloat16 --batch-size 256",
        TINY_STEPS,
    ),
}
"""In the order in which they are run."""


@dataclasses.dataclass(frozen=True)
class Settings(pieces.Settings):
    """What is run, and for how long."""

    workdir: str = "runs/gpu_suite"
    """Gets record.json, and each part's lines, log and runs."""
    only: tuple[str, ...] = tuple(PARTS)
    """Which parts."""
    retry: bool = False
    """Run parts again that failed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("--only", self.only, PARTS)

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
    return ["python", "-m", f"experiments.{part.module}", *given]


def part_file(name: str, settings: Settings) -> Path:
    """Where a part's command, commit and lines are, or how it failed."""
    return Path(settings.workdir) / f"{name}.json"


def ended(name: str, settings: Settings) -> dict[str, Any] | None:
    """What a part has left; None where it has not ended, or by another command."""
    found = read_json(part_file(name, settings)) or {}
    return found if found.get("command") == shlex.join(command(name, settings)) else None


def launch(settings: Settings) -> bool:
    """Runs what has not ended; False where the time did not suffice."""
    end = time.monotonic() + 60 * settings.minutes
    workdir = Path(settings.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # Each part is a process, and some have several: none may take the whole of the GPU's memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    first = done = True
    for name in settings.parts:
        left = ended(name, settings)
        if left is not None and not (settings.retry and "failed" in left):
            continue
        words, log, out = command(name, settings), workdir / f"{name}.log", workdir / f"{name}.out"
        print(shlex.join(words), flush=True)
        found: dict[str, Any] = {"command": shlex.join(words), "commit": git_state()}
        try:
            program = [sys.executable, *words[1:]]
            done = pieces.run(program, log, end, environment, output=out)
            if done:
                found["rows"] = rows(name, out, settings)
            elif first:  # the whole of the time was its own
                found["failed"] = f"it takes more than --minutes {settings.minutes:g}"
            else:
                return False
        except UserError as error:
            found["failed"] = str(error)
        print(f"{name}: {found.get('failed', 'finished')}", flush=True)
        write_json(part_file(name, settings), found)
        first = False
        if not done:
            return False
    return True


def rows(name: str, out: Path, settings: Settings) -> list[dict[str, Any]]:
    """The lines of JSON of a part that has ended well, or what is in its result's file."""
    if (result := PARTS[name].result) is not None:
        return [json.loads((Path(settings.workdir) / name / result).read_text())]
    return [json.loads(line) for line in out.read_text().splitlines() if line.startswith("{")]


def record(settings: Settings) -> dict[str, Any]:
    """What the parts have found so far, and the goals."""
    parts = {name: left for name in settings.parts if (left := ended(name, settings))}
    found = {name: parts.get(name, {}).get("rows", []) for name in PARTS}
    return {
        "trial": settings.trial,
        "parts": parts,
        "failed": {name: left["failed"] for name, left in parts.items() if "failed" in left},
        "missing": [name for name in settings.parts if name not in parts],
        "goals": goals(found),
    }


def goals(found: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Each goal with what was measured, None where it was not, and whether that meets it."""
    numbers = [row["within"] for row in found["numbers"]]
    peers = {row["peer"]: row for row in found["resnet50"] if row.get("error") is None}
    ratio = peers.get("torch_compiled", {}).get("ratio_to_ours") or {}
    share = peers.get("ours", {}).get("peak_share")
    top1 = {t: [row["top1"]["mean"] for row in found[f"speedrun{t}"]] for t in (94, 95, 96)}
    seconds = [
        theirs["seconds"]["mean"]
        / sum(own[f"{each}_seconds"]["mean"] for each in ("start", "train", "eval"))
        for theirs, own in zip(found["airbench94"], found["speedrun94"], strict=False)
    ]
    together = {row["num_seeds"]: row["together_over_in_turn"] for row in found["seeds"]}.get(16)
    judged: list[tuple[str, Any, float]] = [
        ("the GPU's numbers are the CPU's", all(numbers) if numbers else None, True),
        ("ResNet-50 at 224 in bfloat16: images/s over those of torch.compile, at least 1.15",
         ratio.get("median"), 1.15),
        ("ResNet-50: operations a second over those of the best matrix product, at least 0.5",
         share, 0.5),
        *((f"the speed run's mean top-1, at least {target} %", next(iter(means), None),
           target / 100) for target, means in top1.items()),
        ("airbench94's seconds over those of the speed run to 94 %, at least 1",
         next(iter(seconds), None), 1),
    ]  # fmt: skip
    found_goals = [
        {"goal": text, "measured": value, "met": None if value is None else value >= least}
        for text, value, least in judged
    ]
    text = "16 seeds at once over one after another, seconds, below 1"
    met = None if together is None else together < 1
    return [*found_goals, {"goal": text, "measured": together, "met": met}]


def report(made: Mapping[str, Any]) -> str:
    """The goals, a line each."""
    marks = {True: "met", False: "MISSED", None: "not measured"}
    lines = []
    for goal in made["goals"]:
        value = "" if goal["measured"] is None else f" ({goal['measured']:.4g})"
        lines.append(f"{marks[goal['met']]}: {goal['goal']}{value}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs parts; status 0 when all are finished, 75 when the time is up, 1 when some failed."""
    with one_line_errors(), pieces.terminable():
        about, prog = __doc__ or "", "python -m experiments.launch.gpu_suite"
        settings = flags.cli(Settings, argv, about, prog)
        done = launch(settings)
        made = record(settings)
        write_json(Path(settings.workdir) / "record.json", made)
        print(report(made), flush=True)
    if done and made["failed"]:
        print(f"failed: {', '.join(made['failed'])}; --retry runs them again", flush=True)
        sys.exit(1)
    pieces.leave(done)


if __name__ == "__main__":
    main()
