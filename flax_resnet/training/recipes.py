"""A first config for any images: trained from scratch, or from published weights.

A place to start from, by what the images are; the flags change everything. The papers' recipes,
with their figures, are the modules of ``experiments``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_resnet.data import folders, preparation, sources
from flax_resnet.data.augment import Augment
from flax_resnet.data.config import DataConfig
from flax_resnet.errors import Note, UserError
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
FEW = 100
"""Training images a class below which a network from random weights learns little from photographs:
a rule of thumb."""
LEAST_EPOCH = 4
"""Steps that an epoch has at least, where the batch can be as small as that needs."""
BATCHES = (16, 32, 64)
"""Batch sizes, in images; the learning rates of the recipes are those of the largest."""
Shape = tuple[int | None, int | None, int]
"""(H, W, C) of the images; None where they differ."""


def digits() -> TrainConfig:
    """ResNet-20 on scikit-learn's digits: SGD with Nesterov momentum, one cosine, small moves."""
    return from_scratch(1442, 10, (8, 8, 1), DataConfig(name=sources.DIGITS))


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command line says that decides the rest."""

    data_dir: Annotated[str | None, tyro.conf.arg(name="data.data-dir")] = None
    """Directory that holds NAME/VERSION of a tfds set."""
    weights: str | None = None
    """Weights to train on from: a tag, a weight file, a run's directory."""
    model: str | None = None
    """Name of the network."""
    batch_size: int | None = None
    """Images in a step."""
    num_epochs: float | None = None
    """Length of the run in epochs."""
    num_steps: int | None = None
    """Length of the run in steps."""


def scratch(
    data: str, given: Given = Given(), say: Callable[[str], None] = lambda line: None
) -> TrainConfig:
    """A config that trains from random weights: ``from_scratch`` of the images.

    Args:
      data: "digits", a tfds name, or a folder of images with a sub-folder for each class.
      given: its ``data_dir`` is looked at, its batch size and length are kept.
      say: called with a line where a class has fewer than FEW training images, on average.

    Raises:
      UserError: there are no such images.
    """
    config, images = look_at(data, given.data_dir)
    num_classes = len(images.class_names)
    if len(images) < FEW * num_classes and given.weights is None:
        say(
            f"{len(images)} training images in {num_classes} classes, fewer than {FEW} a class: a "
            "network from random weights learns little from so few photographs. Start from "
            "ImageNet's weights"
        )
    return from_scratch(len(images), num_classes, images.image_shape, config, given)


def from_scratch(
    num_images: int,
    num_classes: int,
    shape: Shape,
    data: DataConfig = DataConfig(),
    given: Given = Given(),
) -> TrainConfig:
    """A config that trains from random weights on ``num_images`` of ``shape``, ``paced``.

    Images of up to 96 pixels get a ResNet-20 (He et al. 2016, section 4.2), others a ResNet-18 at
    224 pixels.
    """
    *sides, channels = shape
    sgd = SGD(0.1, Cosine(warmup=0.05), weight_decay=5e-4, nesterov=True)
    if max(side or SMALL + 1 for side in sides) <= SMALL:
        # Grey images are often signs, which have no mirror image.
        config = TrainConfig(
            model=cifar_resnet(20, num_classes=num_classes),
            data=data,
            augment=Augment(
                rotation=10.0, width_shift=1 / 8, height_shift=1 / 8, flip=channels != 1
            ),
            optimizer=sgd,
            num_epochs=30,
            eval_every_epochs=5,
        )
    else:
        crops = {"image_size": LARGE_SIZE, "random_resized_crop": True, "crop_ratio": 0.875}
        config = TrainConfig(
            model=imagenet_resnet(18, num_classes=num_classes),
            data=dataclasses.replace(data, **crops),  # type: ignore[arg-type]
            augment=Augment(flip=True),
            optimizer=dataclasses.replace(sgd, weight_decay=1e-4),
            eval_batch_size=64,
            num_epochs=60,
        )
    return paced(config, num_images, 400, given)


def paced(
    config: TrainConfig, num_images: int, least_steps: int, given: Given = Given()
) -> TrainConfig:
    """A config with the batch, the rate and the length that so many training images ask for.

    - The batch is the largest of BATCHES with which an epoch has LEAST_EPOCH steps.
    - The learning rate, that of a batch of 64 before, follows the batch (Goyal et al. 2017, section
      2.1: the linear rule). It warms up for 20 steps, 5 to 25 % of the run.
    - The run has at least ``least_steps`` steps, 32 of them between evaluations.
    - BatchNorm's running statistics are those of the last tenth of a run of fewer than 100 steps.
    """
    fits = (size for size in reversed(BATCHES) if num_images >= size * LEAST_EPOCH)
    batch_size = given.batch_size or next(fits, BATCHES[0])
    epoch = math.ceil(num_images / batch_size)
    num_epochs = given.num_epochs or max(config.num_epochs, math.ceil(least_steps / epoch))
    num_steps = given.num_steps or max(1, round(num_epochs * epoch))
    optimizer, schedule = config.optimizer, config.optimizer.schedule
    assert isinstance(schedule, Cosine)
    warmup = round(min(max(schedule.warmup, 20 / num_steps), 0.25), 3)
    model = config.model
    if getattr(model, "norm_kind", None) == "batch":
        momentum = round(max(0.0, 1 - 10 / num_steps), 2)
        model = model.clone(bn_momentum=min(model.bn_momentum, momentum))
    return dataclasses.replace(
        config,
        model=model,
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=optimizer.learning_rate * batch_size / BATCHES[-1],
            schedule=dataclasses.replace(schedule, warmup=warmup),
        ),
        batch_size=batch_size,
        num_epochs=num_epochs,
        eval_every_epochs=max(config.eval_every_epochs, math.ceil(32 / epoch)),
    )


def finetuned(data: str, given: Given = Given()) -> TrainConfig:
    """A config that fine-tunes a ResNet-50 from ImageNet's weights, for ten epochs or 100 steps.

    The head has the full learning rate, each stage below half that of the next; BatchNorm stays as
    the weights left it. Weights in a file, or a run's, bring their network and their image size.

    Args:
      data: as of ``scratch``.
      given: a model that it names goes before the weights' own.

    Raises:
      UserError: there are no such images, or no such weights.
    """
    images, training = look_at(data, given.data_dir)
    num_classes = len(training.class_names)
    config = paced(finetuning(images, num_classes), len(training), 100, given)
    weights = given.weights
    is_tag = weights and not (is_path(weights) or hub.is_address(weights))
    if weights is None or is_tag or given.model is not None:  # a tag fits any network that has it
        return config
    opened = open_weights(weights)
    own, prepared = opened.module, opened.preprocessing
    fields: dict[str, Any] = {"num_classes": num_classes}
    if isinstance(own, ResNet):
        kind = "frozen" if own.norm_kind == "batch" else own.norm_kind
        fields |= {"include_top": True, "norm_kind": kind}
    if prepared is None:
        line = "nothing says how images are prepared for it: normalization='channel' is taken"
        warnings.warn(f"{weights}: {line}", Note, stacklevel=2)
    height, _, channels = opened.input_shape
    pad = prepared.decoder.pad if prepared and prepared.decoder else 0
    shape: dict[str, Any] = {"image_size": height - 2 * pad, "pad": pad, "channels": channels}
    shape["random_resized_crop"] = shape["image_size"] > SMALL
    return dataclasses.replace(
        config,
        model=own.clone(**fields),
        data=dataclasses.replace(config.data, **shape),
        augment=Augment(flip=channels != 1),
        normalization="weights" if prepared else "channel",
    )


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


def look_at(data: str, data_dir: str | None = None) -> tuple[DataConfig, sources.Source]:
    """(where the images of ``data`` are, the training split) for ``scratch``; none is decoded."""
    if Path(data).expanduser().is_dir():
        folder = DataConfig(folder=data)
        splits = (folder.train_split, folder.eval_split)
        source = sources.open_folder(data, splits, LARGE_SIZE, folder.holdout_every, check=False)[0]
        return folder, source
    if data.startswith((".", "/", "~")):
        raise UserError(f"{data}: no such folder; expected one with a sub-folder for each class")
    if data != "digits" and difflib.get_close_matches(data, ["digits"], 1, 0.8):
        raise UserError(f"unknown data {data!r} (did you mean 'digits'?)")
    name = sources.DIGITS if data == "digits" else data
    if name == sources.DIGITS:
        preparation.prepare(name, data_dir)
    train = sources.open_tfds(name, data_dir, [TRAIN_SPLIT])[0]
    there = sources.split_names(name, data_dir)
    pairs = ((TRAIN_SPLIT, split) for split in folders.EVAL_NAMES if split in there)
    first, second = next(pairs, HELD_OUT)
    return DataConfig(name=name, data_dir=data_dir, train_split=first, eval_split=second), train
