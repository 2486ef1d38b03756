"""What the command line of an experiment and of an ablation does: ``main`` and ``ablate``."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_resnet.cli import flags
from flax_resnet.distributed import hosts, preemption, sharding
from flax_resnet.errors import Note, UserError
from flax_resnet.inspection import step_cost
from flax_resnet.records.files import quoted, shown
from flax_resnet.records.run_dir import RESULT
from flax_resnet.studies import tables
from flax_resnet.studies.sweeps import check_finished, sweep, train_seeds
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.xla.program_cache import use_cache

NEXT = """look at it: flax-resnet report {workdir}
use it: flax-resnet predict IMAGE --weights {workdir} (its best checkpoint, of step {step})"""


def main(
    get_config: Callable[..., TrainConfig], workdir: str, argv: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Runs an experiment: its config, changed by flags, through train_and_evaluate.

    Bad input ends the process with status 2 and one line on stderr.

    Args:
      get_config: gives the experiment's config; its parameters are flags too, ``--depth 110``,
        and its module's docstring heads --help.
      workdir: default of --workdir; a parameter that is given is added to it.
      argv: flags; by default the process's.

    Returns:
      What the result.json of each seed holds; of --analyze nothing.
    """
    with one_line_errors():
        return start(chosen_by(get_config, workdir, argv))


def start(chosen: flags.Invocation) -> list[dict[str, Any]]:
    """Does what a command line asks of an experiment; returns what ``main`` does."""
    with hosts.joined(chosen.hosts), preemption.restartable():
        if chosen.analyze:  # without the cache: it says how long compiling takes
            step_cost.show(chosen.config)
            return []
        use_cache()
        if chosen.num_seeds == 1:
            again = (Path(chosen.workdir) / RESULT).exists()
            result = train_and_evaluate(chosen.config, chosen.workdir)
            if sharding.is_lead() and not again:
                print(NEXT.format(workdir=quoted(chosen.workdir), step=result["best_step"]))
            return [result]
        together = False if chosen.in_turn else None
        return train_seeds(chosen.config, chosen.workdir, chosen.num_seeds, together=together)


def ablate(
    get_config: Callable[..., TrainConfig],
    get_grid: Callable[[TrainConfig, int], Mapping[str, TrainConfig]],
    workdir: str,
    argv: Sequence[str] | None = None,
    *,
    baseline: str | Mapping[str, str] | None = None,
) -> None:
    """Runs an ablation: a grid of an experiment's config, changed by flags, through ``sweep``.

    Bad input ends the process with status 2 and one line; so does a failed run, at the end.
    ``get_grid`` makes named configs of (config, seeds); the rest is that of ``main`` and ``sweep``.
    """
    with one_line_errors():
        chosen = chosen_by(get_config, workdir, argv, flags.SweepInvocation, get_grid)
        with hosts.joined(chosen.hosts), preemption.restartable():
            configs = get_grid(chosen.config, chosen.seeds)
            use_cache()
            rows = sweep(configs, chosen.workdir, baseline=baseline)
            if not sharding.is_lead():
                return
            print(tables.markdown(rows, baseline))
            check_finished(rows, chosen.workdir)


def chosen_by(
    get_config: Callable[..., TrainConfig],
    workdir: str,
    argv: Sequence[str] | None = None,
    ask: Any = flags.Invocation,
    of: Callable[..., Any] | None = None,
) -> Any:
    """What a command line asks of an experiment, or of the ablation in the module of ``of``.

    The arguments are those of ``main``; ``ask`` is the class to return.
    """
    module = sys.modules[(of or get_config).__module__]
    prog = f"python -m {module.__spec__.name}" if module.__spec__ else None
    given, rest, helps = flags.arguments(get_config, sys.argv[1:] if argv is None else argv)
    workdir = "-".join([workdir, *(f"{name}{value}" for name, value in given.items())])
    about = f"{module.__doc__ or ''}\n{helps}"
    return flags.parse(get_config(**given), workdir, rest, about, prog, ask)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError into one line on stderr and its exit status, a Note into one line."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's notes are for its own users
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may hold what its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=Note)
            show = warnings.showwarning
            warnings.showwarning = lambda note, kind, *place: (
                print(f"note: {note}", file=sys.stderr)
                if issubclass(kind, Note)
                else show(note, kind, *place)
            )
            yield
    except UserError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:  # the reader of our output has gone, `head` for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
