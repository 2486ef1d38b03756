"""Random-access sources of encoded images with labels: a tfds set, or a folder on disk.

A source hands out encoded bytes and is a plain picklable object, so that Grain's worker
processes can hold it. TensorFlow is never imported.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from flax_resnet.data.decode import DECODE_ERRORS
from flax_resnet.errors import UserError, did_you_mean

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
DIGITS = "sklearn_digits"
EVAL_NAMES = ("test", "testing", "val", "valid", "validation", "dev", "eval")
SPLIT_NAMES = {"train", "training", *EVAL_NAMES}
Labelled = list[tuple[Path, int]]


class Source(Protocol):
    """One split of an image-classification set."""

    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]  # None: varies from image to image

    def __len__(self) -> int:
        """Number of examples."""

    def read(self, indices: Sequence[int]) -> tuple[list[bytes], np.ndarray]:
        """Encoded images and their int32 labels, in the order of ``indices``."""

    def describe(self, index: int) -> str:
        """What to call the example in an error message."""


class TfdsSource:
    """A split of a tfds set prepared as ArrayRecord."""

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        info = builder.info
        self.image_key, self.label_key = _supervised_keys(info)
        self._what = f"{info.full_name} {split}"
        image, label = info.features[self.image_key], info.features[self.label_key]
        self.class_names = tuple(label.names)
        self.image_shape = tuple(image.shape)
        if self.image_shape[-1] is None:
            self.image_shape = (*self.image_shape[:2], 3)
        try:
            self._records = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except ValueError as error:
            names = list(info.splits)
            raise UserError(
                f"split {split!r} of {info.full_name} cannot be read: expected one of {names} or "
                f"a slice like 'train[:90%]'{did_you_mean(split, names)}"
            ) from error

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._records)

    def read(self, indices: Sequence[int]) -> tuple[list[bytes], np.ndarray]:
        """Encoded images and their int32 labels, in the order of ``indices``."""
        from tensorflow_datasets.proto import tf_example_pb2

        records = self._records.__getitems__([int(i) for i in indices])
        # By itself: tfds takes a tenth of the time that decoding takes, in Python.
        features = [
            tf_example_pb2.Example.FromString(record).features.feature for record in records
        ]
        return (
            [each[self.image_key].bytes_list.value[0] for each in features],
            np.array([each[self.label_key].int64_list.value[0] for each in features], np.int32),
        )

    def describe(self, index: int) -> str:
        """What to call the example in an error message."""
        return f"example {index} of {self._what}"


@dataclasses.dataclass
class FolderSource:
    """Image files in one sub-folder a class; the classes are the sub-folders, sorted."""

    paths: list[Path]
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_shape: tuple[int | None, int | None, int]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> tuple[list[bytes], np.ndarray]:
        """Encoded images and their int32 labels, in the order of ``indices``."""
        return [self.paths[i].read_bytes() for i in indices], self.labels[list(indices)]

    def describe(self, index: int) -> str:
        """What to call the example in an error message."""
        return str(self.paths[index])


def find_builder(name: str, data_dir: str | None) -> Any:
    """The tfds builder of a set prepared under ``data_dir``, or None where it is not there."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    try:
        return builder_from_files(name, data_dir=data_root(data_dir))
    except tfds.core.DatasetNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"dataset name {name!r} cannot be read: expected NAME, NAME/CONFIG or NAME:VERSION"
        ) from error


def data_root(data_dir: str | None) -> str:
    """``data_dir``, or tfds's default: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    from tensorflow_datasets.core import constants

    return str(Path(data_dir or constants.DATA_DIR).expanduser())


def is_array_record(builder: Any) -> bool:
    """True where the set is stored as ArrayRecord, perhaps beside its first format."""
    from tensorflow_datasets.core.file_adapters import FileFormat

    return FileFormat.ARRAY_RECORD in builder.info.available_file_formats()


def check_known(name: str) -> None:
    """Raises UserError unless tfds, or this library, can build a set of that name."""
    import tensorflow_datasets as tfds

    known = [*tfds.list_builders(with_community_datasets=False), DIGITS]
    if name.split("/")[0].split(":")[0] not in known:
        raise UserError(
            f"unknown dataset {name!r}{did_you_mean(name, known)}: expected a tfds name, or a "
            "folder of images (--data.folder DIR)"
        )


def open_tfds(name: str, data_dir: str | None, splits: Sequence[str]) -> list[TfdsSource]:
    """Opens splits of a prepared tfds set.

    Args:
      name: as tfds takes it: "cifar10", "cifar10:3.0.2", "imagenet_resized/32x32".
      data_dir: directory holding ``name/version``; None is tfds's default.
      splits: tfds split names or slices, such as "train[:90%]".

    Raises:
      UserError: the set is unknown, not prepared, prepared as TFRecord, or not image
        classification.
    """
    builder = find_builder(name, data_dir)
    command = f"python -m flax_resnet prepare {name}"
    command += f" --data-dir {data_dir}" if data_dir else ""
    if builder is None:
        check_known(name)
        raise UserError(f"dataset {name!r} is not prepared in {data_root(data_dir)}: run {command}")
    if not is_array_record(builder):
        raise UserError(
            f"dataset {name!r} in {builder.data_path} is stored as "
            f"{builder.info.file_format.value}, array_record is needed: convert it by {command}"
        )
    return [TfdsSource(builder, split) for split in splits]


def split_names(name: str, data_dir: str | None) -> list[str]:
    """Names of a prepared set's splits; none where there is no such set."""
    builder = find_builder(name, data_dir)
    return [] if builder is None else list(builder.info.splits)


def _supervised_keys(info: Any) -> tuple[str, str]:
    import tensorflow_datasets as tfds

    features, keys = info.features, info.supervised_keys or ("image", "label")
    wanted = zip(keys, (tfds.features.Image, tfds.features.ClassLabel), strict=False)
    known = all(key in features and isinstance(features[key], kind) for key, kind in wanted)
    if len(keys) != 2 or not known:
        raise UserError(
            f"dataset {info.full_name!r} is not image classification: expected an image and a "
            f"class label, its features are {dict(features)}"
        )
    return keys


def open_folder(
    folder: str, splits: Sequence[str], image_size: int | None, test_every: int
) -> list[FolderSource]:
    """Opens a folder of images, one sub-folder a class.

    With sub-folders named after both splits (``folder/train/CLASS/...``; "val", "validation" and
    the like also stand for the second), those are the splits. Otherwise
    ``folder/CLASS/...`` is split: every ``test_every``-th file of a class, by sorted path, is
    evaluation. Images are read as RGB.

    Args:
      folder: the directory.
      splits: two names, for training and evaluation.
      image_size: side that images will be resized to; None demands equal sizes on disk.
      test_every: holds out 1 / ``test_every`` of each class.

    Raises:
      UserError: no such folder, fewer than two classes, a class without images, an
        unreadable image, or images of several sizes and no ``image_size``.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--data.folder {folder}: no such directory")
    if any(mark in split for split in splits for mark in "[+"):
        raise UserError(
            f"splits {splits[0]!r} and {splits[1]!r}: a folder has no slices, name sub-folders of "
            f"{folder}, or set --data.holdout-every"
        )
    train_root, others = root / splits[0], (splits[1], *EVAL_NAMES)
    test_root = next((root / s for s in others if (root / s).is_dir()), None)
    if train_root.is_dir() and test_root is not None:
        names, groups = _split_folders(train_root, test_root)
    else:
        names, groups = _held_out(root, test_every)
    shape = _common_shape([path for group in groups for path, _ in group], image_size)
    return [
        FolderSource([p for p, _ in g], np.array([c for _, c in g], np.int32), tuple(names), shape)
        for g in groups
    ]


def _split_folders(train_root: Path, test_root: Path) -> tuple[list[str], list[Labelled]]:
    """(class names, [training images, evaluation images]) of two folders with the same classes."""
    names = _class_names(train_root)
    if odd := sorted(set(names) ^ set(_class_names(test_root))):
        raise UserError(
            f"{train_root} and {test_root} differ in classes {odd}: both need the same ones"
        )
    roots = (train_root, test_root)
    return names, [[*itertools.chain(*_by_class(root, names))] for root in roots]


def _held_out(root: Path, test_every: int) -> tuple[list[str], list[Labelled]]:
    """(class names, [training images, evaluation images]), one in ``test_every`` held out."""
    names = _class_names(root)
    if alike := [name for name in names if name.lower() in SPLIT_NAMES]:
        raise UserError(
            f"{root} holds {alike}, which look like splits and not like classes: for splits "
            "name them train and test, for classes give them other names"
        )
    groups: list[Labelled] = [[], []]
    for images in _by_class(root, names):
        if len(images) < test_every:
            raise UserError(
                f"class {names[images[0][1]]!r} in {root} has {len(images)} images, at least "
                f"{test_every} are needed to hold out one in {test_every} for evaluation"
            )
        for position, image in enumerate(images, 1):
            groups[position % test_every == 0].append(image)
    return names, groups


def _class_names(root: Path) -> list[str]:
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not _hidden(p.name))
    if len(names) < 2:
        raise UserError(
            f"{root} holds {len(names)} class sub-folders {names}: at least 2 are expected, one "
            "for each class with its images inside"
        )
    return names


def _hidden(name: str) -> bool:
    """True for what a file manager or a notebook leaves behind."""
    return name.startswith(".") or name == "__MACOSX"


def _by_class(root: Path, names: Sequence[str]) -> list[Labelled]:
    """Images of each class, sorted by path."""
    classes = []
    for label, name in enumerate(names):
        images = [
            (path, label)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(map(_hidden, path.relative_to(root).parts))
        ]
        if not images:
            raise UserError(f"class folder {root / name} holds no images: add some or remove it")
        classes.append(images)
    return classes


def _common_shape(paths: Sequence[Path], image_size: int | None) -> tuple:
    """Opens every header, so that a file that is no image is found before anything starts."""
    sizes: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.setdefault(image.size, path)
        except DECODE_ERRORS as error:
            raise unreadable(str(path), error) from error
    if len(sizes) == 1:
        ((width, height),) = sizes
        return height, width, 3
    if image_size is None:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise UserError(
            f"images differ in size ({first} is {a[0]}x{a[1]}, {second} is {b[0]}x{b[1]}): set "
            "--data.image-size, for example 224"
        )
    return None, None, 3


def unreadable(what: str, error: Exception) -> UserError:
    """The error for bytes that do not decode."""
    return UserError(f"unreadable image {what} ({error}): repair it or remove it")
