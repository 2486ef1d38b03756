"""What is in a folder of images: links, endings, litter, splits, and what cannot be read."""

import os
import shutil
import struct
import threading
import unicodedata
import zlib

import numpy as np
import pytest
from helpers import class_folders
from PIL import Image

from flax_resnet.data import folders, sources
from flax_resnet.data.batches import Data
from flax_resnet.data.config import DataConfig
from flax_resnet.errors import UserError
from flax_resnet.records.configs import from_record, to_record
from flax_resnet.training.workdir import as_begun, differences

SPLITS = ("train", None)


@pytest.fixture
def root(image_folder):
    """Two classes of 20 PNGs, cat and dog."""
    return image_folder


def opened(root, splits=SPLITS, size=8, **options):
    train, evaluated = sources.open_folder(str(root), splits, size, 5, **options)
    return train, evaluated, len(train) + len(evaluated)


def split_folders(root, *names, classes=("cat", "dog"), count=2):
    for name in names:
        class_folders(root / name, classes, count, (8, 8))
    return root


def test_links_are_followed_and_loops_are_said(root, tmp_path):
    more = class_folders(tmp_path / "disk", ("more",), 5, (8, 8)) / "more"
    (root / "cat" / "more").symlink_to(more)
    (root / "owl").symlink_to(more)
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "one.png").symlink_to(more / "00.png")
    train, _, total = opened(root)
    assert train.class_names == ("cat", "dog", "owl")
    assert total == 25 + 5 + (20 + 1)
    line = f"no images, and left out of {root}: 1 link back to a folder that it is in"
    assert train.notes[1:] == (line,)
    assert len(folders.find_images([root])) == total


def test_every_ending_of_pillow_counts_in_any_case(root):
    picture = Image.open(root / "cat" / "00.png")
    for name, kind in {"a.JFIF": "JPEG", "b.webp": "WEBP", "c.Avif": "AVIF", "d.jp2": None}.items():
        picture.save(root / "cat" / name, kind)
    for name in ("model.h5", "scan.pdf", "notes", "x.heic", "y.HEIC", "film.mpg", "a.eps"):
        (root / "dog" / name).write_bytes(b"no image")
    train, _, total = opened(root)
    assert total == 44
    line = f"no images, and left out of {root}: 1 .eps, 1 .h5, 2 .heic, 1 .mpg, 1 .pdf, 1 without"
    advice = " an ending; for more of them run pip install pillow-heif"
    assert train.notes[1:] == (line + advice,)
    said = []
    assert len(folders.find_images([root], said.append)) == 44
    assert said == [line + advice]


def test_litter_and_folders_with_an_images_name_are_no_images(root):
    for name in ("$RECYCLE.BIN", "lost+found", "@eaDir", "System Volume Information", ".git"):
        shutil.copytree(root / "cat", root / name)
        shutil.copytree(root / "cat", root / "dog" / name)
    for name in ("Thumbs.db", "desktop.ini", "._00.png", ".DS_Store"):
        (root / "cat" / name).write_bytes(b"")
    (root / "cat" / "album.jpg").mkdir()
    (root / "cat" / "album.jpg" / "in.png").write_bytes((root / "cat" / "00.png").read_bytes())
    train, _, total = opened(root)
    assert (total, train.class_names, len(train.notes)) == (41, ("cat", "dog"), 1)
    assert len(folders.find_images([root])) == 41


def test_accents_are_compared_not_their_spelling(tmp_path):
    for name, form in (("train", "NFC"), ("val", "NFD")):
        split_folders(tmp_path, name, classes=(unicodedata.normalize(form, "café"), "bee"))
    train, evaluated, _ = opened(tmp_path)
    assert train.class_names == evaluated.class_names == ("bee", "café")
    assert evaluated.labels.tolist() == [0, 0, 1, 1]
    split_folders(tmp_path, "train", classes=(unicodedata.normalize("NFD", "café"),))
    with pytest.raises(UserError, match=r"two folders of the name .* accents are written diff"):
        opened(tmp_path)


def test_val_is_evaluated_in_training_and_test_by_evaluate(tmp_path):
    split_folders(tmp_path, "Train", "test", "Valid")
    train, evaluated, _ = opened(tmp_path)
    assert evaluated.part == "Valid"
    assert train.notes == (f"evaluated on {tmp_path}/Valid; {tmp_path}/test not used",)
    assert opened(tmp_path, ("train", "test"))[1].part == "test"  # what older records say
    shutil.rmtree(tmp_path / "Valid")
    train, evaluated, _ = opened(tmp_path)
    assert (evaluated.part, train.notes) == ("test", (f"evaluated on {tmp_path}/test",))


def test_a_part_may_lack_classes_and_none_may_be_new(tmp_path):
    split_folders(tmp_path, "train", classes=("ant", "bee", "cat"))
    split_folders(tmp_path, "val", classes=("cat", "ant"))
    train, evaluated, _ = opened(tmp_path)
    assert evaluated.labels.tolist() == [0, 0, 2, 2]
    assert train.notes[1] == f"{tmp_path}/val has no images of 1 classes: ['bee']"
    split_folders(tmp_path, "val", classes=("dog",))
    with pytest.raises(UserError, match=r"differ in classes \['bee', 'dog'\]"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: split_folders(root, "images/train", "images/val", "labels/train"),
         r"images holds \['train', 'val'\], which look like splits: give .*images, or sort"),
        (lambda root: split_folders(root, "train"),
         r"holds \['train'\], which look like splits.*; to hold out images of .*/train, give that"),
        (lambda root: [Image.new("RGB", (8, 8)).save(root / f"{i}.png") for i in range(3)],
         r"holds 0 class sub-folders \[\]: at least 2 .*; 3 images directly in .* are of no class"),
        (lambda root: [class_folders(root, ("a", "b"), 5, (8, 8)), (root / "c").mkdir(),
                       (root / "d").mkdir(), (root / "c" / "x.txt").touch()],
         r"class folders \['c', 'd'\] in .* hold no images: add .*; no images, and .*: 1 \.txt"),
    ],
)  # fmt: skip
def test_other_arrangements_are_one_clear_line(tmp_path, change, message):
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_images_beside_classes_and_several_frames_are_said(root):
    Image.new("RGB", (8, 8)).save(root / "cover.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "cat" / "film.gif", save_all=True, append_images=frames[1:])
    train, _, total = opened(root)
    assert total == 41
    assert train.notes[1:] == (
        f"1 images directly in {root} are of no class: left out",
        f"1 files have several frames, and the first is taken, as of {root}/cat/film.gif",
    )


def bomb():
    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def damaged(root):
    """The folder with a file of every kind that cannot be read, in three folders."""
    rng = np.random.default_rng(0)
    photo = root / "dog" / "cut.jpg"
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(photo)
    photo.write_bytes(photo.read_bytes()[:-500])
    (root / "cat" / "empty.png").touch()
    (root / "cat" / "text.jpg").write_text("a page of an error 404")
    (root / "dog" / "bomb.png").write_bytes(bomb())
    (root / "dog" / "gone.png").symlink_to("nowhere.png")
    return root


BAD = [r"cat/empty.png \(it is empty\)", r"cat/text.jpg \(it is no image that Pillow reads\)",
       r"dog/bomb.png \(Image size \(900000000 pixels\) exceeds limit",
       r"dog/gone.png \(No such file or directory\)",
       r"dog/cut.jpg \(image file is truncated"]  # fmt: skip


def test_all_that_cannot_be_read_is_one_list(damaged, mesh):
    with pytest.raises(UserError, match="5 unreadable images: ") as found:
        opened(damaged)
    for each in BAD:
        found.match(each)
    train, evaluated, total = opened(damaged, skip_unreadable=True)
    assert total == 40
    assert train.num_unreadable == evaluated.num_unreadable == 5
    assert all(name.split()[0].replace("\\", "") in train.notes[-1] for name in BAD)
    config = DataConfig(folder=str(damaged), image_size=8, skip_unreadable=True)
    for resident_mb in (0, 64):
        data = Data(DataConfig(**{**vars(config), "resident_mb": resident_mb}), mesh, 2)
        assert data.describe()["num_unreadable"] == 5
        assert (data.num_train, data.num_eval) == (32, 8)


@pytest.mark.parametrize("resident_mb", [0, 64])
def test_all_that_breaks_off_in_either_part_is_one_list(root, mesh, resident_mb):
    for name in ("cat/04.png", "cat/05.png", "dog/19.png"):  # the fifth and the last are held out
        (root / name).write_bytes((root / name).read_bytes()[:120])
    config = DataConfig(folder=str(root), image_size=8, resident_mb=resident_mb, num_workers=0)
    with pytest.raises(UserError, match=r"3 unreadable.*cat/05\.png.*cat/04\.png.*dog/19\.png"):
        Data(config, mesh, 2).begin_check(print)()
    with pytest.raises(UserError, match="3 unreadable images"):
        list(Data(config, mesh, 2).train_images())


def test_who_waits_until_all_images_have_been_decoded_is_told(root, mesh, monkeypatch):
    data = Data(DataConfig(folder=str(root), image_size=8, resident_mb=0), mesh, 2)
    said, told = [], threading.Event()
    monkeypatch.setattr(data, "check_readable", told.wait)
    data.begin_check(lambda line: (said.append(line), told.set()))()
    assert said == ["decodes all 40 images once, to find those that cannot be read"]


def test_a_folder_that_cannot_be_listed_is_named(root, monkeypatch):
    def scandir(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", scandir)
    for read in (opened, lambda root: folders.find_images([root])):
        with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\): allow"):
            read(root)


def test_runs_of_before_keep_their_split_and_pixels(tmp_path):
    from flax_resnet.training.recipes import digits

    new = digits()
    there = to_record(new)
    assert as_begun(there, new) == new
    del there["data"]["as_displayed"], there["data"]["skip_unreadable"]
    there["data"]["eval_split"] = "test"
    old = from_record(there)
    assert (old.data.as_displayed, old.data.eval_split) == (False, "test")
    assert as_begun(there, new).data == old.data
    assert differences(there, new) == []
