"""The tutorials' CIFAR-10 studies in full on one GPU, in pieces that end before a limit.

Runs experiments.cifar10_mini, cifar10_resnet with 20, 56 and 110 layers, and the recipe of
cifar100_dropblock on CIFAR-10, three seeds each, one after another, every one as the command that
is printed. When the time is up the running one is ended (it goes on from its last checkpoint) and
the exit status is 75: start the same command again, as often as it takes. When all are finished the
status is 0. Of each finished one a record goes to experiments/results, and experiments/README.md is
written anew (experiments.results).

python -m experiments.launch.tutorials --data-dir DIR --minutes 9

It was written for a GPU like the H200, and calls of 10 minutes; nothing has been run on a GPU yet,
so how many calls it takes is not known. MiniModel and the DropBlock network compute in bfloat16;
the thin networks stay in float32, since arithmetic is not what takes their time. --trial runs it
all in a minute or two on a CPU: small networks, a few steps, scikit-learn's digits.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import results
from experiments.benchmarks.driver import check_names
from experiments.launch import pieces
from flax_resnet.cli import flags
from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.errors import check_range
from flax_resnet.records.run_dir import RESULT

ON_CPU = {"JAX_PLATFORMS": "cpu"}
"""Writing a record is no work for the accelerator."""
BFLOAT16 = "--model.dtype bfloat16"
STUDIES: Mapping[str, tuple[str, str]] = {
    "cifar10_resnet-depth20": ("cifar10_resnet --depth 20", ""),
    "cifar10_mini": ("cifar10_mini", BFLOAT16),
    "cifar10_resnet-depth56": ("cifar10_resnet --depth 56", ""),
    "cifar10_dropblock": (
        "cifar100_dropblock",
        f"--data.name cifar10 --model.num-classes 10 {BFLOAT16}",
    ),
    "cifar10_resnet-depth110": ("cifar10_resnet --depth 110", ""),
}
"""{directory and record: (experiment with its parameters, flags but for a trial)}, in order."""
TRIAL = "--data.name sklearn_digits --num-steps 2 --batch-size 8"
SMALL = {
    "cifar10_resnet": "--model.stage-sizes 1 --model.num-filters 4",
    "cifar10_mini": "--model.stage-sizes 1 --model.num-filters 4",
    "cifar100_dropblock": "--model.stage-filters 4 --model.dense-features 8",
}
"""Flags that shrink each experiment's network to a trial."""


@dataclasses.dataclass(frozen=True)
class Settings(pieces.Settings):
    """What is run, and for how long."""

    workdir: str = "runs/tutorials"
    """Each experiment's working directory is in it."""
    seeds: int = 3
    """Of each experiment."""
    only: tuple[str, ...] = tuple(STUDIES)
    """Which of them."""
    data_note: str | None = None
    """What the records call the data, where it is not quite what its name says."""
    output: str | None = None
    """Directory that gets results/NAME.json and README.md: experiments; of a trial the workdir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--seeds", self.seeds, 1)
        check_names("--only", self.only, STUDIES)


def command(name: str, settings: Settings) -> list[str]:
    """The command line of one study."""
    experiment, changes = STUDIES[name]
    module, *parameters = experiment.split()
    words = [sys.executable, "-m", f"experiments.{module}", *parameters]
    if settings.trial:
        words += f"{TRIAL} {SMALL[module]}".split()
    else:
        words += [*changes.split(), "--data.data-dir", str(settings.data_dir)]
    workdir = Path(settings.workdir) / name
    return [*words, "--num-seeds", str(settings.seeds), "--workdir", str(workdir)]


def recording(name: str, settings: Settings) -> list[str]:
    """The command line that writes a finished study's record."""
    words = [sys.executable, "-m", "experiments.results", str(Path(settings.workdir) / name)]
    output = settings.output or (settings.workdir if settings.trial else str(results.HERE))
    words += ["--name", name, "--output", output]
    return words if settings.data_note is None else [*words, "--data-note", settings.data_note]


def finished(name: str, settings: Settings) -> bool:
    """True where every seed has its result."""
    found = (Path(settings.workdir) / name).rglob(RESULT)
    return sum(1 for _ in found) >= settings.seeds


def launch(settings: Settings) -> bool:
    """Runs what is not finished; False where the time did not suffice."""
    end = time.monotonic() + 60 * settings.minutes
    workdir = Path(settings.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    environment = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").resolve()), **os.environ}
    for name in settings.only:
        log = workdir / f"{name}.log"
        if not finished(name, settings):
            words = command(name, settings)
            print(shlex.join(words), flush=True)
            if not pieces.run(words, log, end, environment):
                return False
        if not pieces.run(recording(name, settings), log, end, {**environment, **ON_CPU}, least=0):
            return False
        print(f"{name}: finished and recorded", flush=True)
    return True


def main(argv: Sequence[str] | None = None) -> None:
    """Runs studies; status 0 when all are finished, 75 when the time is up."""
    with one_line_errors(), pieces.terminable():
        about, prog = __doc__ or "", "python -m experiments.launch.tutorials"
        done = launch(flags.cli(Settings, argv, about, prog))
    pieces.leave(done)


if __name__ == "__main__":
    main()
