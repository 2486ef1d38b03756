"""The configuration of the data: which images, and how they reach the devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from flax_resnet.data import folders, preparation, sources
from flax_resnet.data.decode import Decoder
from flax_resnet.data.sources import DIGITS
from flax_resnet.errors import UserError, check_range, check_types

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
# Metadata of fields that a resumed run may change: they say where things lie, how to get at them
# and how often to look, and decide no number.
FREE = {"free": True}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they reach the devices."""

    name: str = DIGITS
    """A tfds image-classification set: "cifar10", "mnist", "imagenet2012", "NAME:VERSION"."""
    data_dir: str | None = dataclasses.field(default=None, metadata=FREE)
    """Directory that holds NAME/VERSION; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    folder: str | None = None
    """Read this folder of images, one sub-folder a class, instead of a tfds set."""
    train_split: str = "train"
    """Training split: a name, or a slice such as "train[:90%]"."""
    eval_split: str | None = None
    """Evaluation split; None: of a folder val or the like, test where there is no val; of a tfds
    set "test"."""
    holdout_every: int = 5
    """A folder without split sub-folders holds out one in so many images of each class."""
    image_size: int | None = None
    """Resize to this height and width; None keeps the stored size."""
    eval_image_size: int | None = None
    """With image_size: evaluate at this height and width instead (Touvron et al. 2019)."""
    crop_ratio: float = 1.0
    """With image_size: side of the centre crop over the shorter side (ImageNet: 0.875)."""
    pad: int = 0
    """Pad with so many pixels of zero on every side (MNIST's 28 to 32: 2)."""
    channels: Literal[1, 3, 4] | None = None
    """Convert to grey, RGB or RGBA (3 repeats a grey channel); None keeps what is stored."""
    as_displayed: bool = True
    """Of a folder: turn photographs as EXIF says, put transparent pixels on white and scale 16-bit
    greys, as viewers do; False, and a tfds set: the pixels as they are stored."""
    random_resized_crop: bool = False
    """With image_size: train on a random area and aspect of each image (Szegedy et al. 2015)."""
    repeats: int = 1
    """Train on so many copies of each image in a row, each changed on its own (repeated
    augmentation, Hoffer et al. 2020); all images have come only after so many epochs."""
    resident_mb: int = dataclasses.field(default=2048, metadata=FREE)
    """Sets of up to this many MiB of pixels live on the device; larger ones stream."""
    num_workers: int = dataclasses.field(default=2, metadata=FREE)
    """Worker processes that decode a streamed set; 0 decodes in threads of this process, and the
    training loop waits for Python with them."""
    skip_unreadable: bool = False
    """Of a folder: decode every image once, and leave out those that cannot be read."""
    statistics_examples: int = 100_000
    """Normalisation statistics read at most so many training images, evenly spaced."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        for name in ("image_size", "eval_image_size", "repeats", "statistics_examples"):
            check_range(f"data.{name}", getattr(self, name), 1)
        for name in ("resident_mb", "num_workers", "pad"):
            check_range(f"data.{name}", getattr(self, name), 0)
        check_range("data.holdout_every", self.holdout_every, 2)
        if not 0 < self.crop_ratio <= 1:
            raise UserError(f"data.crop_ratio={self.crop_ratio}: expected a share in (0, 1]")
        sized = {"crop_ratio": 1.0, "random_resized_crop": False, "eval_image_size": None}
        for name, off in sized.items():
            if getattr(self, name) != off and self.image_size is None:
                raise UserError(f"data.{name} needs a size to train at: set --data.image-size")

    def decoder(self, channels: int, split: Split = "eval") -> Decoder:
        """What turns stored bytes into pixels of so many channels, without random crops."""
        size = self.eval_image_size if split == "eval" else None
        as_displayed = self.as_displayed and self.folder is not None
        size = size or self.image_size
        return Decoder(channels, size, self.crop_ratio, pad=self.pad, as_displayed=as_displayed)

    @property
    def title(self) -> str:
        """What to call the data: the folder, or the set's name."""
        return self.folder or self.name


def open_sources(config: DataConfig, splits: Any = None, every: int | None = None) -> list[Any]:
    """Sources of the training and the evaluation split, or of other ``splits`` of a tfds set.

    ``every`` takes the place of ``holdout_every``.
    """
    splits = splits or (config.train_split, config.eval_split)
    if config.folder is not None:
        return list(
            sources.open_folder(
                config.folder,
                splits,
                config.image_size,
                every or config.holdout_every,
                as_displayed=config.as_displayed,
                skip_unreadable=config.skip_unreadable,
            )
        )
    if config.name == sources.DIGITS:
        preparation.prepare(config.name, config.data_dir)
    splits = [split or folders.TEST_NAMES[0] for split in splits]
    return list(sources.open_tfds(config.name, config.data_dir, splits))


def contents(config: DataConfig, splits: Iterable[Any] | None = None) -> folders.Contents | None:
    """What a run records of a folder of images; None of a tfds set.

    ``splits`` are sources of its training and its evaluation split; by default they are opened.
    """
    if config.folder is None:
        return None
    opened = splits or open_sources(dataclasses.replace(config, image_size=1))
    root = Path(config.folder).expanduser()
    return {split: one.contents(root) for split, one in zip(SPLITS, opened, strict=True)}
