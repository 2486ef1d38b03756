"""A first config for any images: trained from scratch, or from published weights.

A place to start from, by what the images are; the flags change everything. The papers' recipes,
with their figures, are the modules of ``experiments``.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_resnet.augment import Augment
from flax_resnet.config import TrainConfig
from flax_resnet.data import DataConfig
from flax_resnet.datasets import prepare, sources
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet, cifar_resnet, imagenet_resnet
from flax_resnet.optim import SGD, Cosine
from flax_resnet.pretrained import Pretrained, hub, is_path, open_weights

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


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command line says that decides the rest."""

    data_dir: Annotated[str | None, tyro.conf.arg(name="data.data-dir")] = None
    """Directory that holds NAME/VERSION of a tfds set."""
    weights: str | None = None
    """Weights to train on from: a tag, a weight file, a run's directory."""
    model: str | None = None
    """Name of the network."""


def scratch(data: str, given: Given = Given()) -> TrainConfig:
    """A config that trains from random weights.

    Small images get a ResNet-20 (He et al. 2016, section 4.2), others a ResNet-18 at 224 pixels.

    Args:
      data: "digits", a tfds name, or a folder of images with a sub-folder for each class.
      given: its ``data_dir`` is looked at.

    Raises:
      UserError: there are no such images.
    """
    images = look_at(data, given.data_dir)
    return _on_small(images) if images.small else _on_large(images)


def finetuned(data: str, given: Given = Given()) -> TrainConfig:
    """A config that trains a ResNet-50 on from ImageNet's weights, for ten epochs.

    Every layer trains, the head at the full learning rate and each stage below at half that of the
    next; BatchNorm stays as the weights left it. Of weights in a file, or a run's, it is their
    network, and images get the size and the channels that they were trained on.

    Args:
      data: as of ``scratch``.
      given: a model that it names goes before the weights' own.

    Raises:
      UserError: there are no such images, or no such weights.
    """
    images = look_at(data, given.data_dir)
    config = finetuning(images.data, images.num_classes)
    weights = given.weights
    if weights is None or given.model is not None:
        return config
    if not (is_path(weights) or hub.is_address(weights)):  # a tag fits any network that has it
        return config
    return _as_trained(config, open_weights(weights))


def _as_trained(config: TrainConfig, opened: Pretrained) -> TrainConfig:
    """A config of fine-tuning, with the network of opened weights, on images as theirs were."""
    own: Any = opened.module
    fields: dict[str, Any] = {"num_classes": getattr(config.model, "num_classes", None)}
    if isinstance(own, ResNet):
        fields |= {"include_top": True, "norm_kind": "frozen" if own.norm_kind == "batch" else
                   own.norm_kind}  # fmt: skip
    config = dataclasses.replace(config, model=own.clone(**fields))
    prepared = opened.preprocessing
    if prepared is None:
        return config
    pad = prepared.decoder.pad if prepared.decoder else 0
    size = prepared.shape[0] - 2 * pad
    channels: Any = prepared.channels
    data = dataclasses.replace(
        config.data,
        image_size=size,
        pad=pad,
        channels=channels,
        random_resized_crop=size > SMALL,
    )
    return dataclasses.replace(config, data=data, augment=Augment(flip=prepared.channels != 1))


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
      data_dir: directory that holds NAME/VERSION of a tfds set.

    Raises:
      UserError: there are no such images.
    """
    is_folder = Path(data).expanduser().is_dir()
    if not is_folder and data.startswith((".", "/", "~")):
        raise UserError(f"{data}: no such folder; expected one with a sub-folder for each class")
    if data != "digits" and not is_folder and difflib.get_close_matches(data, ["digits"], 1, 0.8):
        raise UserError(f"unknown data {data!r} (did you mean 'digits'?)")
    if is_folder:
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
