"""``flax-resnet evaluate``: weights measured on a data set or a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from flax_resnet.cli.flags import DataDir, Switch, flag, writing
from flax_resnet.cli.weight_flags import WeightFlags
from flax_resnet.data.config import DataConfig, contents
from flax_resnet.data.folders import TEST_NAMES, changes
from flax_resnet.data.tta import Views
from flax_resnet.errors import UserError
from flax_resnet.inference.evaluation import evaluate
from flax_resnet.records import text_tables
from flax_resnet.records.run_dir import METRICS, data_config, read_config, read_record
from flax_resnet.weights.loading import is_path


@dataclasses.dataclass(frozen=True)
class Where:
    """Where the images are."""

    name: Annotated[str | None, flag("NAME")] = None
    """A tfds image-classification set: "imagenet2012", "cifar10", "NAME:VERSION". Weights that are
    a run's working directory need none: its own data are taken, as it evaluated on them."""
    data_dir: DataDir = None
    """Directory that holds NAME/VERSION."""
    folder: Annotated[str | None, flag("DIR")] = None
    """A folder instead: all images of DIR/CLASS/..., or, next to DIR/train, those of DIR/val. Where
    a run's folder has been moved there, those that the run evaluated on."""
    train_split: Annotated[str | None, flag("SPLIT", DataConfig.train_split)] = None
    """Of a folder: the sub-folder next to which that of --data.eval-split is one."""
    eval_split: Annotated[str | None, flag("SPLIT", TEST_NAMES[0])] = None
    """Split to evaluate; of a folder without it val or the like, next to its train."""
    holdout_every: Annotated[int | None, flag("N")] = None
    """Of DIR/CLASS/... only one image in N of each class: what training on it holds out."""
    skip_unreadable: Switch = False
    """Of DIR: leave out images that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Settings(WeightFlags):
    """Measures weights on a data set or a folder: top-1, top-5, mean loss, expected calibration
    error (Guo et al. 2017) and Brier score.

    The images are decoded as the weights want it. Classes of the same names in another order
    are matched by name, WordNet's ids with ImageNet's classes. One device is used. Of a run,
    --size, --resize and --interpolation take the place of how its data were decoded; where no
    data are named, those that it was evaluated on are taken, and its --tta.

    Examples:
      flax-resnet evaluate --weights runs/digits
      flax-resnet evaluate --model resnet50 --data.folder PHOTOS --tta flip --output result.json
    """

    data: Where = Where()
    batch_size: int = 64
    """Images, or crops, in one step of the device."""
    ten_crop: Switch = False
    """Average the probabilities of the corners and the centre, each also mirrored."""
    tta: Annotated[
        Views | None, flag("{none,flip,flip_shift}", "none; of a run on its own data, the run's")
    ] = None
    """Average the logits of an image and its mirror image, and of both shifted by a pixel."""
    limit: Annotated[int | None, flag("N", "all")] = None
    """Evaluate N examples, evenly spread."""
    output: Annotated[str | None, flag("FILE.json")] = None
    """Write the numbers to this file too."""

    def asked(self) -> tuple[DataConfig, dict[str, Any], list[str]]:
        """The data and the other arguments of ``evaluate``: those given, else the run's own.

        The last is a line where a run's own folder has changed since the training.

        Raises:
          UserError: nothing says what images, or the record of the run cannot be read.
        """
        asked = dataclasses.asdict(self.data).items()
        given = {name: v for name, v in asked if v is not None and v is not False}
        named, run = {"name", "folder"} & given.keys(), Path(self.weights).expanduser()
        is_run = is_path(self.weights) and ((run / METRICS).is_file() if named else run.is_dir())
        if len(named) == 2 or not (named or is_run):
            raise UserError(
                "expected one of --data.name NAME and --data.folder DIR: what images (weights that "
                "are a run's working directory need neither)"
            )
        config, holdout = DataConfig(), self.data.holdout_every is not None
        tta: Views = self.tta or "none"
        notes: list[str] = []
        if is_run and "name" not in named and not (named and holdout):
            recorded, there = read_config(run), read_record(run).get("contents")
            is_gone = there and not Path(recorded.data.folder).expanduser().exists()
            if not named or is_gone:
                own = data_config(run, recorded, self.data.folder)
                if changed := there and _changed(there, own):
                    notes.append(
                        f"{own.folder} has changed since the training ({changed}): images that "
                        "were trained on may be among those that are scored"
                    )
                if not named or not changed:
                    # With sub-folders for its splits a folder has nothing to hold out.
                    config, holdout = own, own.folder is not None
                    tta = self.tta or ("none" if self.ten_crop else recorded.tta)
        options = {name: getattr(self, name) for name in ("batch_size", "ten_crop", "limit")}
        options |= {"tta": tta, "holdout": holdout}
        return dataclasses.replace(config, **given), options, notes


def _changed(there: dict[str, Any], config: DataConfig) -> str:
    """How a folder differs from its recorded contents; "" where it does not."""
    try:
        return changes(there, contents(config))
    except UserError as error:  # it is no folder of the run's kind
        return str(error)


def main(settings: Settings) -> None:
    """``flax-resnet evaluate``."""
    config, options, notes = settings.asked()
    opened = settings.open(settings.weights)
    with contextlib.ExitStack() as stack:  # a file that cannot be written is said at once
        file = settings.output and stack.enter_context(writing(settings.output))
        numbers = evaluate(opened, config, **options, say=notes.append)
        if file:
            asked = {**dataclasses.asdict(settings), "tta": options["tta"]}
            unused = {"name": config.folder is not None, "holdout_every": not options["holdout"]}
            asked["data"] = {
                name: None if unused.get(name) else getattr(config, name) for name in asked["data"]
            }
            print(json.dumps({**asked, **numbers}, indent=2), file=file)
    split = "" if config.folder else f" {config.eval_split or TEST_NAMES[0]}"
    about = {"weights": settings.weights, "data": f"{config.title}{split}"}
    for line in notes:
        print(line)
    text_tables.show(opened.name, [*about.items(), *text_tables.result_rows(numbers).items()])
