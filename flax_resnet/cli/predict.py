"""``flax-resnet predict``: the most probable classes of images."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from flax_resnet.cli.flags import Positional, flag, writing
from flax_resnet.cli.weight_flags import WeightFlags
from flax_resnet.data.decode import reason
from flax_resnet.data.folders import find_images
from flax_resnet.errors import UserError
from flax_resnet.inference.classifier import predict_images
from flax_resnet.records.files import shown


@dataclasses.dataclass(frozen=True)
class Settings(WeightFlags):
    """Prints the most probable classes of images, with their probabilities.

    An image that cannot be read is named on the standard error and left out; a path that is not
    there ends it before any is read. One device is used. Of a run, --size, --resize and
    --interpolation take the place of how its data were decoded.

    Examples:
      flax-resnet predict PHOTO.jpg --model resnet50
      flax-resnet predict FOLDER --weights runs/digits --top 3
      flax-resnet predict FOLDER --weights net.safetensors --format csv --output classes.csv
    """

    images: Annotated[Positional[tuple[str, ...]], flag("IMAGE [IMAGE ...]")] = ()
    """Image files, and folders, which are searched for them with their sub-folders."""
    top: Annotated[int, flag("K", "5")] = 5
    """How many classes an image."""
    batch_size: int = 32
    """Images in one step of the device."""
    format: Literal["text", "json", "csv"] = "text"
    """For people; JSON Lines, one object an image; or one row of CSV for each class."""
    output: Annotated[str | None, flag("FILE")] = None
    """Write to this file, whole or not at all, instead of the standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise UserError("no images are given: expected files, or folders of them")


def main(settings: Settings) -> None:
    """``flax-resnet predict``."""
    notes: list[str] = []
    files = find_images(settings.images, notes.append)
    opened, read = settings.open(settings.weights), 0

    def skip(path: Path, error: Exception) -> None:
        print(f"skipped {shown(path)}: {reason(error)}", file=sys.stderr)

    found = predict_images(
        opened, files, top=settings.top, batch_size=settings.batch_size, on_error=skip
    )
    with writing(settings.output) as out:
        rows = csv.writer(out, lineterminator="\n")
        if settings.format == "csv":
            rows.writerow(["path", "rank", "class", "name", "probability"])
        for one in found:
            read += 1
            path = shown(str(one.path))
            columns = zip(one.classes, one.names, one.probabilities, strict=True)
            if settings.format == "json":
                print(json.dumps({**dataclasses.asdict(one), "path": str(one.path)}), file=out)
            elif settings.format == "csv":
                rows.writerows([path, i, *row] for i, row in enumerate(columns, 1))
            else:
                lines = [f"  {p:.4f}  {name}" for _, name, p in columns]
                print(path, *lines, sep="\n", file=out)
        if not read:
            raise UserError(f"none of {len(files)} images could be read: give others")
    for line in notes:
        print(line, file=sys.stderr)
