"""The command line: experiments run through ``main``; ``python -m flax_resnet`` has the rest."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from flax_resnet import (
    analysis,
    convert,
    distributed,
    evaluate,
    flags,
    hosts,
    models,
    predict,
    preemption,
    report,
    restart,
    summary,
    tables,
)
from flax_resnet.compilation import use_cache
from flax_resnet.config import TrainConfig
from flax_resnet.datasets.prepare import prepare
from flax_resnet.errors import UserError, check_range
from flax_resnet.exporting import command as exporting
from flax_resnet.pretrained import tags
from flax_resnet.sweeps import sweep, train_seeds
from flax_resnet.train import train_and_evaluate

# Commands whose flags are the fields of a dataclass: (what they do, their main).
TOOLS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "predict": ("name what is in images", predict.main),
    "evaluate": ("measure weights on a data set or a folder", evaluate.main),
    "convert": ("write weights in another format", convert.main),
    "export": ("write a network for use elsewhere: StableHLO, ONNX, safetensors", exporting.main),
    "report": ("write a run's result and pictures as one HTML file", report.main),
}


def main(
    get_config: Callable[..., TrainConfig], workdir: str, argv: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Runs an experiment: its config, changed by flags, through train_and_evaluate.

    Bad input ends the process with status 2 and one line on stderr. Of several processes
    (``hosts.joined``) all end when one does.

    Args:
      get_config: gives the experiment's config; its parameters are flags too, ``--depth 110``,
        and its module's docstring heads --help.
      workdir: default of --workdir; a parameter that is given is added to it.
      argv: flags; by default the process's.

    Returns:
      What the result.json of each seed holds; of --analyze nothing.
    """
    with one_line_errors():
        chosen = chosen_by(get_config, workdir, argv)
        with hosts.joined(chosen.hosts), preemption.restartable():
            if chosen.analyze:  # without the cache: it says how long compiling takes
                analysis.show(chosen.config)
                return []
            if argv is None and jax.process_count() == 1:
                restart.with_huge_pages(chosen.config, chosen.num_seeds)
            use_cache()
            if chosen.num_seeds == 1:
                return [train_and_evaluate(chosen.config, chosen.workdir)]
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

    Args:
      get_config: as of ``main``.
      get_grid: (config, seeds) to named configs, as ``grid`` gives.
      workdir: as of ``main``.
      argv: flags; by default the process's.
      baseline: the variant that the others are compared with, or {variant: its own reference}.
    """
    with one_line_errors():
        chosen = chosen_by(get_config, workdir, argv, flags.SweepInvocation, get_grid)
        with hosts.joined(chosen.hosts), preemption.restartable():
            configs = get_grid(chosen.config, chosen.seeds)
            if argv is None and jax.process_count() == 1:
                restart.with_huge_pages(chosen.config, len(configs))
            use_cache()
            rows = sweep(configs, chosen.workdir, baseline=baseline)
            if not distributed.is_lead():
                return
            print(tables.markdown(rows, baseline))
            if failed := [row for row in rows if row["state"] != tables.FINISHED]:
                raise UserError(
                    f"{len(failed)} of {len(rows)} runs failed: {chosen.workdir}/failures says "
                    "how; the same command tries them again"
                )


def chosen_by(
    get_config: Callable[..., TrainConfig],
    workdir: str,
    argv: Sequence[str] | None = None,
    ask: Any = flags.Invocation,
    of: Callable[..., Any] | None = None,
) -> Any:
    """What a command line asks of an experiment or an ablation.

    Args:
      get_config: as of ``main``.
      workdir: as of ``main``.
      argv: flags; by default the process's.
      ask: what to return, a flags.Invocation or a flags.SweepInvocation.
      of: its module is what is run; by default ``get_config``.
    """
    module = sys.modules[(of or get_config).__module__]
    prog = f"python -m {module.__spec__.name}" if module.__spec__ else None
    given, rest = flags.arguments(get_config, sys.argv[1:] if argv is None else argv)
    workdir = "-".join([workdir, *(f"{name}{value}" for name, value in given.items())])
    about = f"{module.__doc__ or ''}\n{flags.arguments_help(get_config)}"
    return flags.parse(get_config(**given), workdir, rest, about, prog, ask)


def command(argv: Sequence[str] | None = None) -> None:
    """``python -m flax_resnet COMMAND``."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TOOLS:
        with one_line_errors():
            use_cache()
            TOOLS[argv[0]][1](argv[1:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m flax_resnet",
        description="Residual networks in JAX. Experiments run as python -m experiments.NAME.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser(
        "prepare",
        help="make a tfds set readable",
        description="Builds the bundled digits, converts a set prepared as TFRecord, or downloads "
        "and prepares a set (which needs the [prepare] extra), as ArrayRecord.",
    )
    preparing.add_argument("name", help='tfds name, such as "cifar10" or "imagenet2012"')
    preparing.add_argument("--data-dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    preparing.set_defaults(run=lambda given: print(prepare(given.name, given.data_dir)))
    listing = commands.add_parser("names", help="list the networks that have a name")
    listing.add_argument("--weights", action="store_true", help="with the tags of their weights")
    listing.set_defaults(run=_names)
    _add_summary(commands)
    for name, (what, _) in TOOLS.items():
        commands.add_parser(name, help=what, add_help=False)  # they are parsed above
    arguments = parser.parse_args(argv)
    with one_line_errors():
        arguments.run(arguments)


def _names(given: argparse.Namespace) -> None:
    for name in models.names():
        print(" ".join([name, *(tags(name) if given.weights else ())]))


def _add_summary(commands: Any) -> None:
    parser = commands.add_parser(
        "summary",
        help="show a network's layers and what they cost",
        description="Prints a network's layers with output shapes, parameters, multiply-adds and "
        "the memory of a batch, and the totals. Nothing is computed.",
    )
    parser.add_argument("name", help="one that `python -m flax_resnet names` lists")
    parser.add_argument("--num-classes", type=int, help="default: the network's own")
    parser.add_argument("--input-shape", type=int, nargs=3, metavar=("H", "W", "C"),
                        help="default: 224 224 3, of CIFAR nets 32 32 3")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument("--dtype", default="float32", help="of the computation; default: float32")
    parser.add_argument("--no-top", action="store_true", help="leave out the head")
    parser.add_argument(
        "--parts", action="store_true", help="a line for each block, not each layer"
    )
    parser.set_defaults(run=_summary)


def _summary(given: argparse.Namespace) -> None:
    fields: dict[str, Any] = {"dtype": given.dtype}
    if given.num_classes is not None:
        fields["num_classes"] = given.num_classes
    if given.no_top:
        fields["include_top"] = False
    check_range("--batch-size", given.batch_size, 1)
    module = models.create(given.name, **fields)
    shape = models.check_shape(given.input_shape or models.default_shape(module))
    counted = summary.summarize(module, shape, given.batch_size)
    size = "x".join(map(str, shape))
    summary.show(f"{given.name}, input {size}", counted, parts=given.parts)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError into one line on stderr and its exit status."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's notes are for its own users
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:  # the reader of our output has gone, `head` for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
