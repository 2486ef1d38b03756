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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from PIL import Image

from flax_resnet.data.decode import DECODE_ERRORS, orientation, reason, register_plugins
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
Contents = Mapping[str, Mapping[str, Any]]
"""{"train" and "eval": {"images": {class: number}, "sha256": of the files' names and sizes}}."""
Classes = dict[str, "Listing"]
"""{class: the images of its folder}."""


@dataclasses.dataclass
class Listing:
    """What a folder holds, with its sub-folders."""

    images: list[Path] = dataclasses.field(default_factory=list)
    """Files with an ending that Pillow opens, in the order of their paths."""
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Number of all other files, by their ending, and of links that are not followed."""


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


def _inside(folder: Path) -> Iterator[tuple[Path, bool]]:
    """(path, whether it or what it links to is a folder) of all but litter, sorted.

    Raises:
      UserError: the folder cannot be listed.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{shown(folder)} cannot be listed ({reason(error)}): allow reading it"
        ) from error
    for entry in entries:
        if not is_litter(entry.name):
            path = folder / entry.name
            yield path, path.is_dir() if entry.is_symlink() else entry.is_dir()


def sub_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, and of links to folders, sorted."""
    return [path.name for path, is_folder in _inside(folder) if is_folder]


def list_images(folder: Path, deep: bool = True, parents: Set[Path] = frozenset()) -> Listing:
    """The images in a folder and, where ``deep``, in those below it.

    ``parents``, resolved, are not entered again: a link may lead back to one.
    """
    listing, place = Listing(), folder.resolve()
    if place in parents:
        listing.left_out["link back to a folder that it is in"] += 1
        return listing
    for path, is_folder in _inside(folder):
        ending = path.suffix.lower()
        if is_folder and deep:
            inner = list_images(path, deep, parents | {place})
            listing.images += inner.images
            listing.left_out += inner.left_out
        elif not is_folder and ending in image_endings():
            listing.images.append(path)  # a broken link too: it has to be said by its name
        elif not is_folder:
            listing.left_out[ending or "without an ending"] += 1
    return listing


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
        listing = list_images(path) if path.is_dir() else Listing([path])
        lines = left_out_line([listing], path)
        if not listing.images:
            endings = " ".join(sorted(image_endings()))
            raise UserError(
                f"{shown(path)} holds no images: {'; '.join([*lines, ''])}expected files that end "
                f"in {endings}"
            )
        for line in lines:
            say(line)
        files += listing.images
    return files


def is_split(name: str) -> bool:
    """True for what a folder of a split is usually called."""
    return name.lower() in (*TRAIN_NAMES, *EVAL_NAMES)


def split_folders(folder: str, splits: Sequence[str | None]) -> list[Path]:
    """The folders of the training and the evaluation split, or the one folder of both.

    Their names count in any case. An evaluation split of None is that of a training: validation,
    and test only where there is none.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--data.folder {folder}: no such directory")
    train, evaluated = splits
    if any(mark in f"{train}{evaluated}" for mark in "[+"):
        raise UserError(
            f"splits {train!r} and {evaluated!r}: a folder has no slices, name sub-folders of "
            f"{folder}, or set --data.holdout-every"
        )
    there = {same_name(name).lower(): root / name for name in sub_folders(root)}
    trains = (str(train), *(TRAIN_NAMES if train in TRAIN_NAMES else ()))
    evals = (evaluated, *EVAL_NAMES) if evaluated else (*VAL_NAMES, *TEST_NAMES)
    wanted = ([same_name(name).lower() for name in names] for names in (trains, evals))
    first, second = (next((there[n] for n in names if n in there), None) for names in wanted)
    if first is not None and second is not None:
        return [first, second]
    if alike := [path.name for path in there.values() if is_split(path.name)]:
        advice = f"; to hold out images of {shown(first)}, give that folder" if first else ""
        raise UserError(
            f"{shown(root)} holds {alike}, which look like splits and not like classes: for splits "
            f"name them train and val (or test), for classes give them other names{advice}"
        )
    return [root]


def list_classes(root: Path) -> tuple[Classes, list[str]]:
    """({class: what its sub-folder holds}, a line for each thing that was left out), sorted.

    Raises:
      UserError: two folders have one name, or the sub-folders are splits.
    """
    names: dict[str, str] = {}
    for name in sub_folders(root):
        if names.setdefault(same_name(name), name) != name:
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
    above = {root.resolve()}
    classes = {name: list_images(root / name, parents=above) for name in names.values()}
    notes = left_out_line([beside, *classes.values()], root)
    if beside.images:
        notes.append(
            f"{len(beside.images)} images directly in {shown(root)} are of no class: left out"
        )
    return classes, notes


def matched_classes(roots: Sequence[Path]) -> tuple[list[Classes], list[str]]:
    """(the classes of each split in the order of the training's, lines to be said)."""
    listed = [list_classes(root) for root in roots]
    (classes, _), notes = listed[0], [line for _, lines in listed for line in lines]
    if len(classes) < 2:
        raise UserError(
            f"{shown(roots[0])} holds {len(classes)} class sub-folders {list(classes)}: at least "
            f"2 are expected, one for each class with its images inside{'; '.join(['', *notes])}"
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
        parts.append({name: same.get(key, Listing()) for key, name in names.items()})
        if missing := [name for name, one in parts[-1].items() if not one.images]:
            notes.append(f"{shown(root)} has no images of {len(missing)} classes: {missing}")
    return parts, notes


def refuse_empty(classes: Classes, root: Path) -> None:
    """Raises UserError for training classes without images."""
    if empty := [name for name, listing in classes.items() if not listing.images]:
        lines = left_out_line([classes[name] for name in empty], root)
        raise UserError(
            f"class folders {empty} in {shown(root)} hold no images: add some or remove them"
            f"{'; '.join(['', *lines])}"
        )


def read_headers(
    paths: Iterable[Path], as_displayed: bool
) -> tuple[dict[Path, tuple[int, int]], dict[Path, str], list[str]]:
    """({image: its (width, height)}, {image without a readable header: why}, lines to be said)."""
    sizes: dict[Path, tuple[int, int]] = {}
    bad: dict[Path, str] = {}
    frames: list[Path] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                is_turned = as_displayed and orientation(image) > 4
                sizes[path] = image.size[::-1] if is_turned else image.size
                if image.format != "MPO" and getattr(image, "is_animated", False):
                    frames.append(path)
        except DECODE_ERRORS as error:
            is_empty = path.is_file() and not path.stat().st_size
            bad[path] = "it is empty" if is_empty else reason(error)
    count = f"{len(frames)} files have several frames, and the first is taken, as of"
    return sizes, bad, [f"{count} {shown(path)}" for path in frames[:1]]


def changes(there: Contents, now: Contents | None) -> str:
    """How recorded contents of a folder differ from those of now; "" where they are the same."""
    if now is None:
        return "a folder then, a tfds set now"
    lines = []
    for split, what in zip(("train", "eval"), ("training", "evaluation"), strict=True):
        old, new = there[split]["images"], now[split]["images"]
        counts = [
            f"{name!r} {old.get(name, 0)} {what} images then, {new.get(name, 0)} now"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
        if there[split]["sha256"] != now[split]["sha256"]:
            lines += counts[:3] or [f"other names or sizes of {what} images"]
    return "; ".join(lines)
