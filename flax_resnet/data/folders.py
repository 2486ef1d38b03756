"""What is in a folder of images, by one set of rules for training, evaluation and prediction.

Links are followed. What a file manager, a file system, a NAS or a notebook leaves behind is passed
over. All else that is no image is counted by its ending, so that it can be said.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from flax_resnet.data.decode import DECODE_ERRORS, displayed_size, reason, register_plugins
from flax_resnet.errors import UserError
from flax_resnet.records.files import shown

VAL_NAMES = ("val", "valid", "validation", "dev", "eval")
"""Folders of images for evaluation during the training, by which the best checkpoint is chosen."""
TEST_NAMES = ("test", "testing")
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = (*TEST_NAMES, *VAL_NAMES)
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Pillow's formats that need another program, or hold no image of their own."""
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
"""{ending: the package with which Pillow opens it}."""
LITTER = {
    "__macosx", "__pycache__", "desktop.ini", "thumbs.db", "ehthumbs.db", "$recycle.bin",
    "recycler", "system volume information", "found.000", "lost+found", "@eadir", "#recycle",
    "@recycle", "#snapshot", "network trash folder", "temporary items",
}  # fmt: skip
"""Names, in lower case, of what systems leave in folders."""
Say = Callable[[str], None]
Classes = dict[str, "Listing"]
"""{class: the images of its folder}."""


@dataclasses.dataclass
class Listing:
    """What a folder holds, with its sub-folders."""

    root: Path
    images: list[Path] = dataclasses.field(default_factory=list)
    """Files with an ending that Pillow opens, in the order of their paths."""
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Number of all other files, by their ending."""
    unreadable: dict[Path, str] = dataclasses.field(default_factory=dict)
    """{folder that cannot be listed: why}."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What else was not followed, a line each."""


@functools.cache
def image_endings() -> frozenset[str]:
    """Endings of files, in lower case, that Pillow opens here."""
    register_plugins()
    kinds = Image.registered_extensions().items()
    opened = {*Image.OPEN, "MPO"} - NO_IMAGES  # MPO is opened as JPEG
    return frozenset(ending for ending, kind in kinds if kind in opened)


def is_litter(name: str) -> bool:
    """True for what is hidden, and for what systems leave in folders."""
    return name.startswith((".", "~$")) or name.casefold() in LITTER


def same_name(name: str) -> str:
    """A name as names are compared: macOS and Linux write accents differently."""
    return unicodedata.normalize("NFC", name)


def sub_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, and of links to folders, sorted.

    Raises:
      UserError: the folder cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if not is_litter(entry.name))
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be listed ({error.strerror}): allow reading it"
        ) from error
    return [name for name in names if (folder / name).is_dir()]


def list_images(root: Path, deep: bool = True, above: Path | None = None) -> Listing:
    """The images in a folder and, where ``deep``, in those below it; no link leads ``above``."""
    listing = Listing(root)
    parents = frozenset() if above is None else frozenset({_identity(above)})
    _walk(root, listing, parents, deep)
    return listing


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _walk(folder: Path, into: Listing, parents: frozenset[tuple[int, int]], deep: bool) -> None:
    try:
        identity = _identity(folder)
        inside = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        into.unreadable[folder] = reason(error)
        return
    if identity in parents:
        into.notes.append(f"{shown(folder)} leads back to a folder that it is in: not followed")
        return
    for entry in inside:
        path = folder / entry.name
        ending = path.suffix.lower()
        if is_litter(entry.name):
            continue
        if path.is_dir() if entry.is_symlink() else entry.is_dir():
            if deep:
                _walk(path, into, parents | {identity}, deep)
        elif ending in image_endings() and (path.is_file() or not path.exists()):
            into.images.append(path)  # a broken link too: it has to be said by its name
        else:
            into.left_out[ending or "without an ending"] += 1


def left_out_line(listings: Iterable[Listing], root: Path) -> list[str]:
    """One line that counts the files that are no images; none where there are none."""
    total = sum((listing.left_out for listing in listings), collections.Counter())
    if not total:
        return []
    counts = [f"{count} {ending}" for ending, count in sorted(total.items())]
    packages = sorted({PLUGINS[ending] for ending in total if ending in PLUGINS})
    advice = f"; for more of them run pip install {' '.join(packages)}" if packages else ""
    return [f"no images, and left out of {shown(root)}: {', '.join(counts)}{advice}"]


def find_images(paths: Iterable[str | Path], say: Say = lambda line: None) -> list[Path]:
    """Files as given, and the image files in and below folders, in the order of their paths.

    Args:
      paths: files and folders.
      say: is given a line about what a folder holds besides images.

    Raises:
      UserError: there is no such file or folder, or a folder holds no images or cannot be listed.
    """
    files: list[Path] = []
    for path in (Path(path).expanduser() for path in paths):
        if not path.exists():
            raise UserError(f"{shown(path)}: no such file or folder: give images or folders")
        if not path.is_dir():
            files.append(path)
            continue
        listing = list_images(path)
        lines = [*left_out_line([listing], path), *listing.notes]
        if listing.unreadable:
            (folder, why), *_ = listing.unreadable.items()
            raise UserError(f"{shown(folder)} cannot be listed ({why}): allow reading it")
        if not listing.images:
            endings = " ".join(sorted(image_endings()))
            raise UserError(
                f"{shown(path)} holds no images: {'; '.join([*lines, ''])}expected files that end "
                f"in {endings}"
            )
        for line in lines:
            say(line)
        files.extend(listing.images)
    return files


def find_split(root: Path, names: Sequence[str]) -> Path | None:
    """The sub-folder of the first of these names, in any case; None where there is none."""
    there = sub_folders(root)
    for name in names:
        if (root / name).is_dir():
            return root / name
        alike = [other for other in there if same_name(other).lower() == same_name(name).lower()]
        if alike:
            return root / alike[0]
    return None


def is_split(name: str) -> bool:
    """True for what a folder of a split is usually called."""
    return name.lower() in (*TRAIN_NAMES, *EVAL_NAMES)


def eval_names(name: str | None) -> tuple[str, ...]:
    """Names that the evaluation folder may have, the first choice first.

    None is that of a training: validation, and test only where there is none.
    """
    return (*VAL_NAMES, *TEST_NAMES) if name is None else (name, *EVAL_NAMES)


def list_classes(root: Path) -> tuple[dict[str, Listing], list[str]]:
    """({class: what its sub-folder holds}, a line for each thing that was left out), sorted.

    Raises:
      UserError: two folders have one name, or the sub-folders are splits.
    """
    names = sub_folders(root)
    for name in names:
        twins = [other for other in names if same_name(other) == same_name(name)]
        if len(twins) > 1:
            raise UserError(
                f"{shown(root)} holds two folders of the name {shown(name)}, whose accents are "
                "written differently: move the images of one into the other"
            )
        splits = [inner for inner in sub_folders(root / name) if is_split(inner)]
        if len(splits) > 1:
            raise UserError(
                f"{shown(root / name)} holds {splits}, which look like splits: give "
                f"{shown(root / name)}, or sort the images into FOLDER/train/CLASS"
            )
    beside = list_images(root, deep=False)
    classes = {name: list_images(root / name, above=root) for name in names}
    notes = [line for one in classes.values() for line in one.notes]
    if beside.images:
        notes.append(
            f"{len(beside.images)} images directly in {shown(root)} are of no class: left out"
        )
    return classes, [*notes, *left_out_line([beside, *classes.values()], root)]


def split_folders(folder: str, splits: Sequence[str | None]) -> list[Path]:
    """The folders of the training and the evaluation split, or the one folder of both."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--data.folder {folder}: no such directory")
    if any(mark in split for split in splits for mark in "[+" if split):
        raise UserError(
            f"splits {splits[0]!r} and {splits[1]!r}: a folder has no slices, name sub-folders of "
            f"{folder}, or set --data.holdout-every"
        )
    train, evaluated = splits
    names = TRAIN_NAMES if train in TRAIN_NAMES else ()
    first = find_split(root, [str(train), *names])
    second = find_split(root, eval_names(evaluated))
    if first is not None and second is not None:
        return [first, second]
    if alike := [name for name in sub_folders(root) if is_split(name)]:
        advice = f"; to hold out images of {shown(first)}, give that folder" if first else ""
        raise UserError(
            f"{shown(root)} holds {alike}, which look like splits and not like classes: for splits "
            f"name them train and val (or test), for classes give them other names{advice}"
        )
    return [root]


def matched_classes(roots: Sequence[Path]) -> tuple[list[Classes], list[str]]:
    """(the classes of each split in the order of the training's, lines to be said)."""
    listed = [list_classes(root) for root in roots]
    (classes, _), notes = listed[0], [line for _, lines in listed for line in lines]
    if len(classes) < 2:
        beside = len(list_images(roots[0], deep=False).images)
        advice = f"; {beside} images lie beside them, in no class" if beside else ""
        raise UserError(
            f"{shown(roots[0])} holds {len(classes)} class sub-folders {list(classes)}: at least "
            f"2 are expected, one for each class with its images inside{advice}"
        )
    parts = [classes]
    for root, (others, _) in zip(roots[1:], listed[1:], strict=True):
        same = {same_name(name): other for name, other in others.items()}
        names = {same_name(name): name for name in classes}
        if same.keys() - names.keys():
            raise UserError(
                f"{shown(roots[0])} and {shown(root)} differ in classes "
                f"{sorted(same.keys() ^ names.keys())}: both need the same ones"
            )
        parts.append({name: same.get(key, Listing(root / name)) for key, name in names.items()})
        if missing := [name for name, one in parts[-1].items() if not one.images]:
            notes.append(f"{shown(root)} has no images of {len(missing)} classes: {missing}")
    return parts, notes


def refuse_empty(classes: Classes, root: Path) -> None:
    """Raises UserError for training classes without images."""
    if empty := [name for name, listing in classes.items() if not listing.images]:
        there = ", ".join(f"{n} {end}" for end, n in sorted(classes[empty[0]].left_out.items()))
        more = f", nor do {empty[1:]}" if empty[1:] else ""
        raise UserError(
            f"class folder {shown(root / empty[0])} holds no images{there and f' but {there}'}"
            f"{more}: add some or remove it"
        )


def read_headers(
    listings: Iterable[Listing], as_displayed: bool
) -> tuple[dict[Path, tuple[int, int]], dict[Path, str], list[str]]:
    """({image: its (width, height)}, {image without a readable header: why}, lines to be said)."""
    sizes: dict[Path, tuple[int, int]] = {}
    bad: dict[Path, str] = {}
    frames: list[Path] = []
    for path in (path for listing in listings for path in listing.images):
        try:
            with Image.open(path) as image:
                sizes[path] = displayed_size(image) if as_displayed else image.size
                if image.format != "MPO" and getattr(image, "is_animated", False):
                    frames.append(path)
        except DECODE_ERRORS as error:
            is_empty = path.is_file() and not path.stat().st_size
            bad[path] = "it is empty" if is_empty else reason(error)
    count = f"{len(frames)} files have several frames, and the first is taken, as of"
    return sizes, bad, [f"{count} {shown(path)}" for path in frames[:1]]
