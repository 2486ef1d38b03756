"""Random-access sources of encoded images with labels: a tfds set, or a folder on disk.

A source hands out encoded bytes and is a plain picklable object, so that Grain's worker
processes can hold it. TensorFlow is never imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flax_resnet.data import folders
from flax_resnet.data.decode import Decoder, undecodable
from flax_resnet.data.folders import Classes
from flax_resnet.errors import UserError, did_you_mean
from flax_resnet.records.files import shown

DIGITS = "sklearn_digits"
CHECK_SIZE = 16
"""Side, in pixels, to which images are decoded to see whether they can be: JPEGs at an eighth."""


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
    part: str = ""
    """Name of the folder of the evaluation split; "" where images are held out."""
    notes: tuple[str, ...] = ()
    """What is to be said of the folder, a line each."""
    num_unreadable: int = 0
    """Images of the folder that cannot be read and are left out."""

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> tuple[list[bytes], np.ndarray]:
        """Encoded images and their int32 labels, in the order of ``indices``."""
        return [self.paths[i].read_bytes() for i in indices], self.labels[list(indices)]

    def describe(self, index: int) -> str:
        """What to call the example in an error message."""
        return shown(self.paths[index])

    def contents(self, root: Path) -> dict[str, Any]:
        """{"images": {class: number}, "sha256": of the names in ``root`` and the sizes}."""
        files = (
            f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in self.paths
        )
        text = "\n".join(sorted(map(folders.same_name, files)))
        sha256 = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        return {"images": dict(zip(self.class_names, counts, strict=True)), "sha256": sha256}


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
    folder: str,
    splits: Sequence[str | None],
    image_size: int | None,
    test_every: int,
    *,
    as_displayed: bool = True,
    skip_unreadable: bool = False,
    check: bool = True,
) -> list[FolderSource]:
    """Opens a folder of images, one sub-folder a class.

    With sub-folders named after both splits (``folder/train/CLASS/...``), those are the splits.
    Otherwise ``folder/CLASS/...`` is split: every ``test_every``-th file of a class, by sorted
    path, is evaluation. Images are read as RGB.

    Args:
      folder: the directory.
      splits: names for training and evaluation; see ``folders.split_folders`` for the second.
      image_size: side that images will be resized to; None demands equal sizes on disk.
      test_every: holds out 1 / ``test_every`` of each class.
      as_displayed: how images are decoded, see ``decode.open_image``.
      skip_unreadable: decode every image once, and leave out those that cannot be.
      check: whether images whose header cannot be read are a UserError; else they are left out.

    Raises:
      UserError: no such folder, fewer than two classes, a class without images,
        unreadable images, or images of several sizes and no ``image_size``.
    """
    roots = folders.split_folders(folder, splits)
    parts, notes = folders.matched_classes(roots)
    listings = [listing for part in parts for listing in part.values()]
    paths = (path for listing in listings for path in listing.images)
    sizes, bad, frames = folders.read_headers(paths, as_displayed)
    if skip_unreadable or (bad and check):  # what is bad comes in one list
        decoder = Decoder(3, CHECK_SIZE, as_displayed=as_displayed)
        bad |= undecodable(sizes, lambda path: decoder(path.read_bytes()))
    if bad:
        named = {shown(path): why for path, why in bad.items()}
        if check and not skip_unreadable:
            raise unreadable(named)
        notes.append(f"left out, as they cannot be read: {_listed(named)}")
    for listing in listings:
        listing.images = [path for path in listing.images if path not in bad]
    folders.refuse_empty(parts[0], roots[0])
    readable = {path: size for path, size in sizes.items() if path not in bad}
    shape = _common_shape(readable, image_size)
    groups, part, taken = _groups(roots, parts, test_every)
    names, said = tuple(parts[0]), (taken, *notes, *frames)
    return [
        FolderSource(
            [path for path, _ in group], np.array([label for _, label in group], np.int32),
            names, shape, part, said, len(bad),
        )
        for group in groups
    ]  # fmt: skip


def _groups(
    roots: Sequence[Path], parts: Sequence[Classes], every: int
) -> tuple[list[list[tuple[Path, int]]], str, str]:
    """([(image, label) of training, of evaluation], what is evaluated, a line that says so)."""
    groups: list[list[tuple[Path, int]]] = [
        [(path, label) for label, one in enumerate(part.values()) for path in one.images]
        for part in parts
    ]
    if len(roots) == 2:
        there = map(roots[1].with_name, folders.sub_folders(roots[1].parent))
        others = [
            shown(path) for path in there if folders.is_split(path.name) and path not in roots
        ]
        unused = f"; {' and '.join(others)} not used" if others else ""
        return groups, roots[1].name, f"evaluated on {shown(roots[1])}{unused}"
    held_out: list[list[tuple[Path, int]]] = [[], []]
    for label, (name, listing) in enumerate(parts[0].items()):
        if len(listing.images) < every:
            raise UserError(
                f"class {name!r} in {shown(roots[0])} has {len(listing.images)} images, at least "
                f"{every} are needed to hold out one in {every} for evaluation"
            )
        for position, path in enumerate(listing.images, 1):
            held_out[position % every == 0].append((path, label))
    part = "all images" if every == 1 else f"one in {every} images of each class"
    return held_out, "", f"evaluated on {part}"


def _common_shape(sizes: Mapping[Path, tuple[int, int]], image_size: int | None) -> tuple:
    """(H, W, 3) of all images, or (None, None, 3) where they differ and will be resized."""
    by_size: dict[tuple[int, int], Path] = {}
    for path, size in sizes.items():
        by_size.setdefault(size, path)
    if len(by_size) == 1:
        ((width, height),) = by_size
        return height, width, 3
    if image_size is None:
        (a, first), (b, second) = list(by_size.items())[:2]
        raise UserError(
            f"images differ in size ({first} is {a[0]}x{a[1]}, {second} is {b[0]}x{b[1]}): set "
            "--data.image-size, for example 224"
        )
    return None, None, 3


class Unreadable(UserError):
    """Images whose bytes do not decode."""


def undecodable_rows(
    source: Source, rows: Iterable[int], decoder: Callable[[bytes], Any]
) -> dict[str, str]:
    """{what to call an example: why} of the rows of a source that do not decode."""
    bad = undecodable(rows, lambda row: decoder(source.read([row])[0][0]))
    return {source.describe(row): why for row, why in bad.items()}


def _listed(bad: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({why})" for name, why in bad.items())


def unreadable(bad: Mapping[str, str]) -> Unreadable:
    """The error for images that cannot be read: {what to call each: why}."""
    what = "unreadable image" if len(bad) == 1 else f"{len(bad)} unreadable images:"
    return Unreadable(
        f"{what} {_listed(bad)}: repair or remove what is damaged, or set data.skip_unreadable to "
        "leave it out of a folder"
    )
