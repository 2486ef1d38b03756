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

from flax_resnet.data import folders, preparation, sources
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.errors import UserError
from flax_resnet.models import ResNet, cifar_resnet, imagenet_resnet
from flax_resnet.optim.optimizers import SGD, Cosine
from flax_resnet.training.config import TrainConfig
from flax_resnet.weights import hub, is_path, open_weights

SMALL = 96
"""Sides up to which images are taken by a CIFAR network, as they are."""
LARGE_SIZE = 224
TRAIN_SPLIT = DataConfig.train_split
HELD_OUT = ("train[:80%]", "train[80%:]")
"""Of a set that has a training split alone."""


Shape = tuple[int | None, int | None, int]
"""(H, W, C) of the images; None where they differ."""


def digits() -> TrainConfig:
    """ResNet-20 on scikit-learn's digits: SGD with Nesterov momentum, one cosine, small moves."""
    return _scratch(DataConfig(name=sources.DIGITS), 10, (8, 8, 1))


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
    return _scratch(*look_at(data, given.data_dir))


def finetuned(data: str, given: Given = Given()) -> TrainConfig:
    """A config that fine-tunes a ResNet-50 from ImageNet's weights, for ten epochs.

    The head has the full learning rate, each stage below half that of the next; BatchNorm stays as
    the weights left it. Weights in a file, or a run's, bring their network and their image size.

    Args:
      data: as of ``scratch``.
      given: a model that it names goes before the weights' own.

    Raises:
      UserError: there are no such images, or no such weights.
    """
    images, num_classes, _ = look_at(data, given.data_dir)
    config = finetuning(images, num_classes)
    weights = given.weights
    is_tag = weights and not (is_path(weights) or hub.is_address(weights))
    if weights is None or is_tag or given.model is not None:  # a tag fits any network that has it
        return config
    opened = open_weights(weights)
    own: Any = opened.module
    fields: dict[str, Any] = {"num_classes": num_classes}
    if isinstance(own, ResNet):
        kind = "frozen" if own.norm_kind == "batch" else own.norm_kind
        fields |= {"include_top": True, "norm_kind": kind}
    config = dataclasses.replace(config, model=own.clone(**fields))
    prepared: Any = opened.preprocessing
    if prepared is None:
        return config
    pad = prepared.decoder.pad if prepared.decoder else 0
    size, channels = prepared.shape[0] - 2 * pad, prepared.channels
    shape = {"image_size": size, "pad": pad, "channels": channels}
    images = dataclasses.replace(config.data, **shape, random_resized_crop=size > SMALL)
    return dataclasses.replace(config, data=images, augment=Augment(flip=channels != 1))


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


def look_at(data: str, data_dir: str | None = None) -> tuple[DataConfig, int, Shape]:
    """(where images are, number of classes, their shape); none is decoded.

    Args:
      data: as of ``scratch``; where there are no such images, UserError.
      data_dir: directory that holds NAME/VERSION of a tfds set.
    """
    if Path(data).expanduser().is_dir():
        folder = DataConfig(folder=data)
        splits = (folder.train_split, folder.eval_split)
        source = sources.open_folder(data, splits, LARGE_SIZE, folder.holdout_every, check=False)[0]
        return folder, len(source.class_names), source.image_shape
    if data.startswith((".", "/", "~")):
        raise UserError(f"{data}: no such folder; expected one with a sub-folder for each class")
    if data != "digits" and difflib.get_close_matches(data, ["digits"], 1, 0.8):
        raise UserError(f"unknown data {data!r} (did you mean 'digits'?)")
    name = sources.DIGITS if data == "digits" else data
    if name == sources.DIGITS:
        preparation.prepare(name, data_dir)
    train = sources.open_tfds(name, data_dir, [TRAIN_SPLIT])[0]
    there = sources.split_names(name, data_dir)
    evaluated = [(TRAIN_SPLIT, split) for split in folders.EVAL_NAMES if split in there]
    first, second = [*evaluated, HELD_OUT][0]
    config = DataConfig(name=name, data_dir=data_dir, train_split=first, eval_split=second)
    return config, len(train.class_names), train.image_shape


def _scratch(data: DataConfig, num_classes: int, shape: Shape) -> TrainConfig:
    *sides, channels = shape
    sgd = SGD(0.1, Cosine(warmup=0.05), weight_decay=5e-4, nesterov=True)
    if max(side or SMALL + 1 for side in sides) <= SMALL:
        # Grey images are often signs, which have no mirror image.
        move = Augment(rotation=10.0, width_shift=1 / 8, height_shift=1 / 8, flip=channels != 1)
        return TrainConfig(
            model=cifar_resnet(20, num_classes=num_classes),
            data=data,
            augment=move,
            optimizer=sgd,
            batch_size=64,
            num_epochs=30,
            eval_every_epochs=5,
        )
    crops = {"image_size": LARGE_SIZE, "random_resized_crop": True, "crop_ratio": 0.875}
    return TrainConfig(
        model=imagenet_resnet(18, num_classes=num_classes),
        data=dataclasses.replace(data, **crops),  # type: ignore[arg-type]
        augment=Augment(flip=True),
        optimizer=dataclasses.replace(sgd, weight_decay=1e-4),
        batch_size=64,
        eval_batch_size=64,
        num_epochs=60,
    )
