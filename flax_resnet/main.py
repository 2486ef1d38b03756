"""The command line: experiments run through ``main``; ``python -m flax_resnet`` has the rest."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence

from flax_resnet import flags
from flax_resnet.config import TrainConfig
from flax_resnet.datasets.prepare import prepare
from flax_resnet.errors import UserError
from flax_resnet.train import train_and_evaluate

EXIT_BAD_INPUT = 2


def main(
    get_config: Callable[[], TrainConfig], workdir: str, argv: Sequence[str] | None = None
) -> None:
    """Runs an experiment: its config, changed by flags, through train_and_evaluate.

    Bad input ends the process with status 2 and one line on stderr.

    Args:
      get_config: gives the experiment's config; its module's docstring heads --help.
      workdir: default of --workdir.
      argv: flags; by default the process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    module = sys.modules[get_config.__module__]
    prog = f"python -m {module.__spec__.name}" if module.__spec__ else None
    with one_line_errors():
        chosen = flags.parse(get_config(), workdir, argv, module.__doc__ or "", prog)
        train_and_evaluate(chosen.config, chosen.workdir)


def command(argv: Sequence[str] | None = None) -> None:
    """``python -m flax_resnet COMMAND``."""
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
    arguments = parser.parse_args(argv)
    with one_line_errors():
        print(prepare(arguments.name, arguments.data_dir))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit status 2."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax's notes are for its own users
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
