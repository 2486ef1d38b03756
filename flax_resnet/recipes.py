"""A first config for any images: trained from scratch, or from published weights.

A place to start from, by what the images are; the flags change everything. The papers' recipes,
with their figures, are the modules of ``experiments``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flax_resnet.augment import Augment
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig
from flax_resnet.datasets import prepare, sources
from flax_resnet.models import cifar_resnet, imagenet_resnet
from flax_resnet.optim import SGD, Cosine

SMALL = 96
"""Sides up to which images are taken by a CIFAR network, as they are."""
LARGE_SIZE = 224
TRAIN_SPLIT = DataConfig.train_split
HELD_OUT = ("train[:80%]", "train[80%:]")
"""Of a set that has a training split alone."""


@dataclasses.dataclass(frozen=True)
class Images:
    """What decides a first config."""

    data: DataConfig
    """Where they are."""
    num_classes: int
    """How many classes they have."""
    shape: tuple[int | None, int | None, int]
    """(H, W, C); None where they differ."""

    @property
    def small(self) -> bool:
        """True where a CIFAR network takes them as they are."""
        height, width, _ = self.shape
        return height is not None and width is not None and max(height, width) <= SMALL


def digits() -> TrainConfig:
    """ResNet-20 on scikit-learn's digits: SGD with Nesterov momentum, one cosine, small moves."""
    return _on_small(Images(DataConfig(name=sources.DIGITS), 10, (8, 8, 1)))


def scratch(data: str, data_dir: str | None = None) -> TrainConfig:
    """A config that trains from random weights.

    Small images get a ResNet-20 (He et al. 2016, section 4.2), others a ResNet-18 at 224 pixels.

    Args:
      data: "digits", a tfds name, or a folder of images with a sub-folder for each class.
      data_dir: directory that holds NAME/VERSION of a tfds set.

    Raises:
      UserError: there are no such images.
    """
    images = look_at(data, data_dir)
    return _on_small(images) if images.small else _on_large(images)


def finetuned(data: str, data_dir: str | None = None) -> TrainConfig:
    """A config that trains a ResNet-50 on from ImageNet's weights, for ten epochs.

    Every layer trains, the head at the full learning rate and each stage below at half that of the
    next; BatchNorm stays as the weights left it.

    Args:
      data: as of ``scratch``.
      data_dir: as of ``scratch``.

    Raises:
      UserError: there are no such images.
    """
    images = look_at(data, data_dir)
    return finetuning(images.data, images.num_classes)


def finetuning(data: DataConfig, num_classes: int) -> TrainConfig:
    """The config of ``finetuned``, without a look at the images."""
    return TrainConfig(
        model=imagenet_resnet(50, num_classes=num_classes, norm_kind="frozen"),
        weights="imagenet",
        data=dataclasses.replace(data, image_size=LARGE_SIZE, random_resized_crop=True),
        augment=Augment(flip=True),
        normalization="weights",
        optimizer=SGD(learning_rate=0.01, schedule=Cosine(warmup=0.1), stage_decay=0.5),
        batch_size=64,
        eval_batch_size=64,
        num_epochs=10,
    )


def look_at(data: str, data_dir: str | None = None) -> Images:
    """Where images are, how many classes they have, and how large they are; none is decoded.

    Args:
      data: as of ``scratch``.
      data_dir: as of ``scratch``.

    Raises:
      UserError: there are no such images.
    """
    if Path(data).expanduser().is_dir() or data.startswith((".", "/", "~")):
        folder = DataConfig(folder=data)
        splits = (folder.train_split, folder.eval_split)
        source = sources.open_folder(data, splits, LARGE_SIZE, folder.holdout_every)[0]
        return Images(folder, len(source.class_names), source.image_shape)
    name = sources.DIGITS if data == "digits" else data
    if name == sources.DIGITS:
        prepare.prepare(name, data_dir)
    train = sources.open_tfds(name, data_dir, [TRAIN_SPLIT])[0]
    there = sources.split_names(name, data_dir)
    evaluated = next((split for split in sources.EVAL_NAMES if split in there), None)
    splits = HELD_OUT if evaluated is None else (TRAIN_SPLIT, evaluated)
    config = DataConfig(name=name, data_dir=data_dir, train_split=splits[0], eval_split=splits[1])
    return Images(config, len(train.class_names), train.image_shape)


def _on_small(images: Images) -> TrainConfig:
    grey = images.shape[2] == 1
    return TrainConfig(
        model=cifar_resnet(20, num_classes=images.num_classes),
        data=images.data,
        # Grey images are often signs, which have no mirror image.
        augment=Augment(rotation=10.0, width_shift=1 / 8, height_shift=1 / 8, flip=not grey),
        optimizer=_sgd(weight_decay=5e-4),
        batch_size=64,
        num_epochs=30,
        eval_every_epochs=5,
    )


def _sgd(weight_decay: float) -> SGD:
    return SGD(
        learning_rate=0.1,
        schedule=Cosine(warmup=0.05),
        weight_decay=weight_decay,
        nesterov=True,
    )


def _on_large(images: Images) -> TrainConfig:
    return TrainConfig(
        model=imagenet_resnet(18, num_classes=images.num_classes),
        data=dataclasses.replace(
            images.data, image_size=LARGE_SIZE, random_resized_crop=True, crop_ratio=0.875
        ),
        augment=Augment(flip=True),
        optimizer=_sgd(weight_decay=1e-4),
        batch_size=64,
        eval_batch_size=64,
        num_epochs=60,
    )
