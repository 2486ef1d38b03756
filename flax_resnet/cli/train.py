"""The commands train, finetune and prepare."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from flax_resnet.cli import flags
from flax_resnet.cli.flags import PROG, DataDir, Positional, flag
from flax_resnet.data.config import DataConfig
from flax_resnet.data.preparation import prepare
from flax_resnet.errors import UserError
from flax_resnet.records.files import quoted
from flax_resnet.records.run_dir import CONFIG, read_config, read_record
from flax_resnet.training import recipes
from flax_resnet.training.config import TrainConfig

TRAIN = """Trains a network from random weights on "digits", a tfds set, or a folder of images with
a sub-folder for each class.

Where nothing is said, images of up to 96 pixels get a ResNet-20 and others a ResNet-18 at 224. The
batch size, the learning rate and the epochs follow from the number of images; the classes are
counted. Every field of the config is a flag. The same command goes on where it was.

Examples:
  flax-resnet train digits
  flax-resnet train cifar10 --data.data-dir DIR --model wrn_28_10 --num-epochs 60
  flax-resnet train PHOTOS --model resnet50 --data.image-size 160 --workdir runs/photos"""
FINETUNE = """Trains a ResNet-50 on from ImageNet's weights, on a folder of images with a sub-folder
for each class, or a tfds set. Of --weights FILE_OR_RUN it is their network, on images as theirs.

Every layer trains, earlier ones more slowly. The batch size, the learning rate and the epochs
follow from the number of images; the classes are counted. Every field of the config is a flag. The
same command goes on where it was.

Examples:
  flax-resnet finetune PHOTOS --num-epochs 5
  flax-resnet finetune PHOTOS --weights runs/others
  flax-resnet finetune PHOTOS --weights resnet.pth
  flax-resnet finetune PHOTOS --model.frozen-stages 4 --cache-features \\
    --data.no-random-resized-crop --augment.no-flip"""
DATA = "DATA"
MAKES: Mapping[str, tuple[str, Callable[..., TrainConfig]]] = {
    "train": (TRAIN, recipes.scratch),
    "finetune": (FINETUNE, recipes.finetuned),
}


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Builds the bundled digits, converts a set prepared as TFRecord, or downloads and
    prepares a set (which needs the [prepare] extra), as ArrayRecord.

    Examples:
      flax-resnet prepare cifar10 --data-dir ~/data
    """

    name: Annotated[Positional[str], flag("NAME")]
    """A tfds name, such as "cifar10" or "imagenet2012"."""
    data_dir: DataDir = None
    """Directory that will hold NAME/VERSION."""


def parse(command: str, argv: Sequence[str]) -> flags.Invocation:
    """The first config for what the first argument names, changed by the flags."""
    about, recipe = MAKES[command]
    prog = f"{PROG} {command} {DATA}"
    ending = "" if command == "train" else f"-{command}"
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            tuned = recipes.finetuning(DataConfig(folder=DATA), num_classes=1000)
            config = recipes.digits() if command == "train" else tuned
            flags.parse(config, f"runs/{DATA}{ending}", ["--help"], about, prog)
        raise UserError(
            f'{command} {" ".join(argv[:1])}: expected what to train on first: "digits", a tfds '
            f"name, or a folder; `{PROG} {command} --help` has examples"
        )
    data, rest = argv[0], argv[1:]
    given, _ = tyro.cli(
        recipes.Given, args=rest, return_unknown_args=True, add_help=False, description=""
    )
    options = {"say": functools.partial(_name_finetune, data, given)} if command == "train" else {}
    config = recipe(data, given, **options)
    name = Path(data).expanduser().resolve().name if config.data.folder else data.replace("/", "-")
    chosen = flags.parse(config, f"runs/{name}{ending}", rest, about, prog)
    return _resumed(chosen, [command, *argv])


def _name_finetune(data: str, given: recipes.Given, line: str) -> None:
    """Prints what is said of few images, and the command that starts from ImageNet's weights."""
    words = ["finetune", data, *(["--data.data-dir", given.data_dir] if given.data_dir else [])]
    print(f"{line}: {PROG} {' '.join(map(quoted, words))}", flush=True)


def _resumed(chosen: flags.Invocation, argv: Sequence[str]) -> flags.Invocation:
    """The config that the same command, perhaps of an earlier version, began a run there with."""
    workdir = Path(chosen.workdir).expanduser()
    if chosen.num_seeds > 1:
        workdir /= f"seed{chosen.config.seed}"
    starts = read_record(workdir)["starts"] if (workdir / CONFIG).exists() else []
    if [*argv] not in (start["argv"][1:] for start in starts):
        return chosen
    config = dataclasses.replace(read_config(workdir), tracking=chosen.config.tracking)
    return dataclasses.replace(chosen, config=config)


def prepare_set(settings: Prepare) -> None:
    """``flax-resnet prepare``."""
    print(prepare(settings.name, settings.data_dir))
