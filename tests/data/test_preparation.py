import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tensorboardX.record_writer import RecordWriter

from flax_resnet.data import preparation, sources
from flax_resnet.data.decode import Decoder
from flax_resnet.data.sklearn_digits import load_digits, test_rows
from flax_resnet.errors import UserError

test_rows.__test__ = False


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(data, format="png")
    return data.getvalue()


def test_digits_splits_hold_every_digit_once(digits_dir):
    images, labels = load_digits()
    train, test = sources.open_tfds("sklearn_digits", digits_dir, ("train", "test"))
    assert (len(train), len(test)) == (1442, 355)
    rows = test_rows(labels)
    assert np.bincount(labels[rows]).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    for split, wanted in ((train, ~rows), (test, rows)):
        encoded, got = split.read(range(len(split)))
        pixels = [Decoder(1)(data) for data in encoded]
        want = sorted(
            (int(c), i.tobytes()) for c, i in zip(labels[wanted], images[wanted], strict=True)
        )
        assert sorted((int(c), p.tobytes()) for c, p in zip(got, pixels, strict=True)) == want


def test_digits_stretch_16_grey_levels_over_a_byte():
    from sklearn.datasets import load_digits as original

    images, _ = load_digits()
    np.testing.assert_allclose(images[..., 0] / 255, original().images / 16, atol=0.5 / 255)
    assert images.max() == 255


def test_preparing_again_changes_nothing(digits_dir):
    directory = preparation.prepare("sklearn_digits", digits_dir)
    before = {p: p.stat().st_mtime_ns for p in sources.Path(directory).iterdir()}
    assert preparation.prepare("sklearn_digits", digits_dir) == directory
    assert {p: p.stat().st_mtime_ns for p in sources.Path(directory).iterdir()} == before


def test_split_slices(digits_dir):
    first, rest = sources.open_tfds("sklearn_digits", digits_dir, ("train[:90%]", "train[90%:]"))
    assert (len(first), len(rest)) == (1298, 144)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("sklearn_digits", "tests", r"split 'tests' .* \['t.*did you mean 'test'"),
        ("cifar1o", "train", r"unknown dataset 'cifar1o' \(did you mean 'cifar10'\?\)"),
        (
            "cifar100",
            "train",
            "is not prepared in .*run python -m flax_resnet prepare cifar100 --",
        ),
        ("3sets", "train", "name '3sets' cannot be read: expected NAME, NAME/CONF"),
    ],
)
def test_a_set_that_cannot_be_opened_is_one_line(digits_dir, name, split, message):
    with pytest.raises(UserError, match=message):
        sources.open_tfds(name, digits_dir, (split,))


def test_preparing_a_download_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs TensorFlow .*pip install -e '\.\[prepare\]'"):
        preparation.prepare("cifar100", str(tmp_path))


@pytest.fixture
def tfrecord_digits(digits_dir, tmp_path):
    """The digits as tfds leaves them by default: TFRecord shards, two for training."""
    builder = sources.find_builder("sklearn_digits", digits_dir)
    target = tmp_path / "sklearn_digits" / "1.0.0"
    target.mkdir(parents=True)
    info = json.loads((builder.data_path / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        source = builder.info.splits[split["name"]].filepaths[0]
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        records = ArrayRecordDataSource(str(source)).__getitems__(
            list(range(int(split["shardLengths"][0])))
        )
        cut = 1000 if split["name"] == "train" else len(records)
        shards = [s for s in (records[:cut], records[cut:]) if s]
        split["shardLengths"] = [str(len(s)) for s in shards]
        for i, shard in enumerate(shards):
            name = f"sklearn_digits-{split['name']}.tfrecord-{i:05d}-of-{len(shards):05d}"
            writer = RecordWriter(str(target / name))
            for record in shard:
                writer.write(record)
            writer.close()
    (target / "dataset_info.json").write_text(json.dumps(info))
    (target / "features.json").write_text((builder.data_path / "features.json").read_text())
    return str(tmp_path)


def test_tfrecord_sets_give_the_command_and_it_converts_them(tfrecord_digits, digits_dir):
    command = f"python -m flax_resnet prepare sklearn_digits --data-dir {tfrecord_digits}"
    with pytest.raises(UserError, match=f"stored as tfrecord, .*convert it by {command}"):
        sources.open_tfds("sklearn_digits", tfrecord_digits, ("train",))
    preparation.prepare("sklearn_digits", tfrecord_digits)
    for split in ("train", "test"):
        (got,) = sources.open_tfds("sklearn_digits", tfrecord_digits, (split,))
        (want,) = sources.open_tfds("sklearn_digits", digits_dir, (split,))
        got_bytes, got_labels = got.read(range(len(got)))
        want_bytes, want_labels = want.read(range(len(want)))
        assert got_bytes == want_bytes
        np.testing.assert_array_equal(got_labels, want_labels)


def test_a_damaged_tfrecord_set_is_not_recorded_as_converted(tfrecord_digits):
    info = sources.Path(tfrecord_digits) / "sklearn_digits" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"1000"', '"999"'))
    with pytest.raises(UserError, match="holds 1000 records, 999 are recorded"):
        preparation.prepare("sklearn_digits", tfrecord_digits)
    with pytest.raises(UserError, match="stored as tfrecord"):
        sources.open_tfds("sklearn_digits", tfrecord_digits, ("train",))


def test_sets_that_are_not_image_classification_are_refused(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "sets")
    path = tmp_path / "sets" / "sklearn_digits" / "1.0.0" / "features.json"
    path.write_text(path.read_text().replace('"label"', '"number"'))
    with pytest.raises(UserError, match=r"'sklearn_digits/1\.0\.0' is not image classification"):
        sources.open_tfds("sklearn_digits", str(tmp_path / "sets"), ("train",))


def test_folder_holds_out_every_fifth_of_each_class(image_folder):
    train, test = sources.open_folder(str(image_folder), ("train", "test"), None, 5)
    assert train.class_names == ("cat", "dog")
    assert train.image_shape == (8, 8, 3)
    assert [test.describe(i)[-10:] for i in range(4)] == [
        "cat/04.png", "cat/09.png", "cat/14.png", "cat/19.png",
    ]  # fmt: skip
    assert (len(train), len(test)) == (32, 8)
    encoded, labels = train.read([0, 31])
    assert encoded[1] == (image_folder / "dog" / "18.png").read_bytes()
    assert labels.tolist() == [0, 1]


def test_a_folder_has_no_slices(image_folder):
    with pytest.raises(UserError, match="a folder has no slices"):
        sources.open_folder(str(image_folder), ("train[:90%]", "test"), None, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root), r"--data\.folder .*set: no such directory"),
        (lambda root: (root / "empty").mkdir(), r"'empty'.* hold no images: add some or remove"),
        (lambda root: Image.new("RGB", (9, 8)).save(root / "dog" / "wide.png"),
         r"differ in size .*8x8.* 9x8\): set --data.image-size"),
        (lambda root: (root / "dog" / "bad.png").write_bytes(b"no image"),
         r"unreadable image .*dog/bad\.png \(.*repair or remove what"),
        (lambda root: shutil.rmtree(root / "dog"),
         r"holds 1 class sub-folders \['cat'\]: at least 2"),
        (lambda root: [path.unlink() for path in sorted((root / "dog").iterdir())[1:]],
         r"class 'dog' .* has 1 images, at least 5"),
    ],
)  # fmt: skip
def test_a_bad_folder_is_one_line(image_folder, tmp_path, change, message):
    root = image_folder.rename(tmp_path / "set")
    change(root)
    with pytest.raises(UserError, match=message):
        sources.open_folder(str(root), ("train", "test"), None, 5)


def test_decoder_converts_to_its_channels(rng):
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(Decoder(3)(png(pixels)), pixels)
    grey = Decoder(1)(png(pixels))
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))
    assert Decoder(3)(png(pixels[..., :1])).shape == (5, 7, 3)


def test_decoder_keeps_the_upper_byte_of_16_bit_grey(rng):
    deep = rng.integers(0, 65536, (5, 7), dtype=np.uint16)
    for channels in (1, 3):  # as older runs and weight files have it
        stored = Decoder(channels, as_displayed=False)(png(deep))
        np.testing.assert_array_equal(stored[..., -1], deep >> 8)


def test_decoder_resizes_the_centre_crop(rng):
    pixels = rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    want = image.resize((8, 8), Image.Resampling.BILINEAR, box=(12, 2, 28, 18), reducing_gap=3.0)
    np.testing.assert_array_equal(Decoder(3, 8, crop_ratio=0.8)(png(pixels)), np.asarray(want))
    np.testing.assert_array_equal(Decoder(3, 20)(png(pixels)), pixels[:, 10:30])


def test_random_crops_keep_to_area_and_aspect(rng):
    from flax_resnet.data.decode import _random_box

    boxes = np.array([_random_box(rng, 60, 40) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert (boxes[:, 2] <= 60 + 1e-9).all()
    assert (boxes[:, 3] <= 40 + 1e-9).all()
    aspect = width / height
    assert aspect.min() >= 3 / 4 - 1e-9
    assert aspect.max() <= 4 / 3 + 1e-9
    share = width * height / 2400
    assert share.min() == pytest.approx(0.08, abs=0.01)
    assert share.max() > 0.65
