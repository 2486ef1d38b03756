import dataclasses
import sys

import numpy as np
import pytest
from helpers import tiny_resnet
from PIL import Image
from sklearn.datasets import load_sample_image

from flax_resnet import TrainConfig, train_and_evaluate
from flax_resnet.data import order, sources
from flax_resnet.data.batches import Data
from flax_resnet.data.config import DataConfig
from flax_resnet.data.decode import Decoder
from flax_resnet.data.order import BatchReader, batch_rows, epoch_permutation
from flax_resnet.distributed import workers
from flax_resnet.errors import UserError


@pytest.fixture
def digits(digits_dir, mesh):
    return Data(DataConfig(data_dir=digits_dir), mesh, 10)


def as_numpy(batches):
    return [{name: np.asarray(x) for name, x in batch.items()} for batch in batches]


def assert_same_batches(a, b):
    a, b = as_numpy(a), as_numpy(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize(("batch", "size"), [(7, 50), (25, 10)])
def test_every_epoch_holds_every_example_once_across_batch_edges(batch, size):
    stream = np.concatenate([batch_rows(3, step, batch, size) for step in range(50)])
    epochs = stream.reshape(-1, size)
    assert len(epochs) == 50 * batch // size
    assert (np.sort(epochs) == np.arange(size)).all()


def test_order_is_a_function_of_seed_and_epoch():
    def epoch(seed, index):
        return epoch_permutation(seed, index, 50).tolist()

    assert epoch(1, 0) == epoch(1, 0)
    assert len({tuple(epoch(seed, index)) for seed in range(4) for index in range(4)}) == 16


def test_repeats_go_through_the_same_order_in_so_many_epochs():
    once = np.concatenate([batch_rows(3, step, 7, 50) for step in range(8)])
    thrice = np.concatenate([batch_rows(3, step, 7, 50, 3) for step in range(24)])
    np.testing.assert_array_equal(thrice, np.repeat(once, 3))
    assert sorted(thrice[:150]) == sorted(3 * list(range(50)))


def test_copies_of_an_image_are_cropped_each_on_its_own(digits_dir):
    (train,) = sources.open_tfds("sklearn_digits", digits_dir, ("train",))
    reader = BatchReader(train, Decoder(1, 8, random_crop=True), 60, seed=0, repeats=3)
    batch = reader(2)
    copies = batch["image"].reshape(20, 3, -1)
    np.testing.assert_array_equal(batch["label"], np.repeat(batch["label"][::3], 3))
    assert (copies[:, 0] != copies[:, 1]).any(1).mean() > 0.9
    assert (copies[:, 1] != copies[:, 2]).any(1).mean() > 0.9
    np.testing.assert_array_equal(batch["image"], reader(2)["image"])


@pytest.mark.parametrize("resident_mb", [0, 64])
def test_evaluation_at_another_size(image_folder, mesh, resident_mb):
    config = DataConfig(folder=str(image_folder), image_size=4, eval_image_size=6, pad=1,
                        repeats=2, resident_mb=resident_mb, num_workers=0)  # fmt: skip
    opened = Data(config, mesh, 2)
    assert opened.resident == bool(resident_mb)
    assert (opened.image_shape, opened.eval_shape) == ((6, 6, 3), (8, 8, 3))
    assert opened.sizes == "6x6x3 and 8x8x3"
    train, evaluated = sources.open_folder(str(image_folder), ("train", "test"), 4, 5)
    (batch,) = as_numpy(opened.train_batches(0, 8, 3, 4))
    rows = batch_rows(0, 3, 8, 32, 2)
    want = [Decoder(3, 4, pad=1)(data) for data in train.read(rows.tolist())[0]]
    np.testing.assert_array_equal(batch["image"], want)
    (batch,) = as_numpy(opened.in_order("eval", 8))
    want = [Decoder(3, 6, pad=1)(data) for data in evaluated.read(range(8))[0]]
    np.testing.assert_array_equal(batch["image"], want)
    (first, *_) = opened.in_order("train", 8)
    assert first["image"].shape == next(opened.train_images())[:8].shape == (8, 6, 6, 3)
    plain = Data(dataclasses.replace(config, eval_image_size=None), mesh, 2)
    assert plain.fingerprint("train") == opened.fingerprint("train")
    assert plain.fingerprint("eval") != opened.fingerprint("eval")


@pytest.mark.parametrize("resident_mb", [0, 64])
def test_batches_with_rows_say_which_image_came_when(image_folder, mesh, resident_mb):
    config = DataConfig(folder=str(image_folder), resident_mb=resident_mb, num_workers=0, repeats=2)
    opened = Data(config, mesh, 2, with_rows=True)
    batches = as_numpy(opened.train_batches(4, 12, 2, 8))
    rows = np.concatenate([batch["row"] for batch in batches])
    epochs = np.concatenate([batch["epoch"] for batch in batches])
    np.testing.assert_array_equal(epochs, np.arange(24, 96) // 2 // 32)
    assert (rows.dtype, epochs.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(rows, np.concatenate([batch_rows(4, k, 12, 32, 2)
                                                        for k in range(2, 8)]))  # fmt: skip
    everything = next(opened.train_images())
    for batch in batches:
        np.testing.assert_array_equal(batch["image"], everything[batch["row"]])
    (plain,) = Data(config, mesh, 2).train_batches(4, 12, 2, 3)
    assert plain.keys() == {"image", "label"}
    if resident_mb:
        (both,) = as_numpy(opened.train_batches([4, 5], 12, 2, 3))
        np.testing.assert_array_equal(both["row"][0], batches[0]["row"])
        np.testing.assert_array_equal(both["epoch"], np.stack([batches[0]["epoch"]] * 2))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_batches_equal_resident_ones(digits, digits_dir, mesh, num_workers):
    config = DataConfig(data_dir=digits_dir, resident_mb=0, num_workers=num_workers)
    streamed = Data(config, mesh, 10)
    assert digits.resident
    assert not streamed.resident
    assert_same_batches(streamed.train_batches(7, 64, 20, 32), digits.train_batches(7, 64, 20, 32))
    fewer = Data(dataclasses.replace(config, num_workers=min(1, num_workers)), mesh, 10)
    assert_same_batches(fewer.in_order("eval", 24), digits.in_order("eval", 24))
    whole = np.concatenate(list(digits.train_images()))
    np.testing.assert_array_equal(np.concatenate(list(streamed.train_images())), whole)


@pytest.mark.parametrize("resident_mb", [0, 64])
def test_statistics_read_the_same_even_sample_resident_or_streamed(digits_dir, mesh, resident_mb):
    config = DataConfig(data_dir=digits_dir, resident_mb=resident_mb, statistics_examples=100)
    sample = np.concatenate(list(Data(config, mesh, 10).train_images()))
    (train,) = sources.open_tfds("sklearn_digits", digits_dir, ("train",))
    rows = np.linspace(0, 1441, 100).round().astype(int)
    np.testing.assert_array_equal(sample, [Decoder(1)(x) for x in train.read(rows)[0]])


@pytest.mark.parametrize("batch_size", [100, 355, 512])
def test_evaluation_counts_each_example_once(digits, digits_dir, batch_size):
    (test,) = sources.open_tfds("sklearn_digits", digits_dir, ("test",))
    _, labels = test.read(range(len(test)))
    batches = as_numpy(digits.in_order("eval", batch_size))
    assert {b["label"].shape for b in batches} == {(batch_size,)}
    mask = np.concatenate([b["mask"] for b in batches])
    got = np.concatenate([b["label"] for b in batches])
    assert mask.sum() == 355
    np.testing.assert_array_equal(got[mask], labels)


def test_batches_are_split_over_eight_devices_and_equal(digits, digits_dir, meshes):
    eight = Data(DataConfig(data_dir=digits_dir), meshes[1], 10)
    (batch,) = eight.train_batches(0, 64, 3, 4)
    assert {s.data.shape for s in batch["image"].addressable_shards} == {(8, 8, 8, 1)}
    assert_same_batches([batch], digits.train_batches(0, 64, 3, 4))


def test_processes_read_equal_parts_that_join_up(digits_dir):
    (train,) = sources.open_tfds("sklearn_digits", digits_dir, ("train",))
    decoder = Decoder(1, 16, random_crop=True)
    whole = BatchReader(train, decoder, 48, seed=2)(9)
    for count in (2, 3):
        parts = [BatchReader(train, decoder, 48, seed=2, shard=(i, count))(9) for i in range(count)]
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])
    whole = BatchReader(train, Decoder(1), 1000)(1)
    parts = [BatchReader(train, Decoder(1), 1000, shard=(i, 4))(1) for i in range(4)]
    assert whole["mask"].sum() == 442
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


def jpeg_source(root, sizes):
    """Photographs of so many heights and widths, as a source."""
    pixels = load_sample_image("flower.jpg")
    paths = [root / f"{number}.jpg" for number in range(len(sizes))]
    for path, (height, width) in zip(paths, sizes, strict=True):
        Image.fromarray(pixels[:height, :width]).save(path)
    labels = np.arange(len(sizes)) % 2
    return sources.FolderSource(paths, labels, ("a", "b"), (None, None, 3))


@pytest.mark.parametrize("seed", [None, 3])
def test_a_batch_is_its_images_one_by_one(tmp_path, seed):
    source = jpeg_source(tmp_path, [(50 + 9 * i, 120 - 7 * i) for i in range(10)])
    decoder = Decoder(3, 32, random_crop=True, pad=1)
    reader = BatchReader(source, decoder, 16, seed)
    batch = reader(1)
    assert batch["image"].shape == (16, 34, 34, 3)
    places = np.arange(16, 32)
    order = np.where(places < 10, places, 0) if seed is None else batch_rows(3, 1, 16, 10)
    encoded = source.read(order)[0]
    draws = [
        None if seed is None else np.random.Generator(np.random.Philox(key=[seed, i], counter=1))
        for i in places
    ]
    singly = [decoder(data, draw) for data, draw in zip(encoded, draws, strict=True)]
    np.testing.assert_array_equal(batch["image"], singly)


def test_images_of_two_sizes_are_named(tmp_path):
    source = jpeg_source(tmp_path, [(20, 30), (20, 30), (30, 20)])
    with pytest.raises(UserError, match=r"2\.jpg is 20x30 and others are 30x20: set --data"):
        BatchReader(source, Decoder(3), 3)(0)


def test_a_small_set_is_trained_on_without_grain(digits_dir, tmp_path, mesh, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "grain"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grain", None)  # importing it is an error
    config = TrainConfig(
        model=tiny_resnet(), data=DataConfig(data_dir=digits_dir), num_steps=2, batch_size=8
    )
    assert train_and_evaluate(config, tmp_path, mesh=mesh)["step"] == 2


def test_an_image_that_breaks_off_is_named(image_folder, mesh):
    path = image_folder / "dog" / "07.png"
    path.write_bytes(path.read_bytes()[:120])
    with pytest.raises(UserError, match=r"unreadable image .*dog/07\.png"):
        Data(DataConfig(folder=str(image_folder)), mesh, 2)
    streamed = Data(DataConfig(folder=str(image_folder), resident_mb=0, num_workers=0), mesh, 2)
    with pytest.raises(UserError, match=r"unreadable image .*dog/07\.png"):
        list(streamed.train_batches(0, 32, 0, 1))


@pytest.mark.parametrize("resident_mb", [0, 64])
def test_unlabelled_examples_are_refused(image_folder, mesh, monkeypatch, resident_mb):
    read = sources.FolderSource.read

    def unlabelled(self, indices):
        encoded, labels = read(self, indices)
        return encoded, labels - 1

    monkeypatch.setattr(sources.FolderSource, "read", unlabelled)
    config = DataConfig(folder=str(image_folder), resident_mb=resident_mb, num_workers=0)
    with pytest.raises(UserError, match=r"png has label -1, expected 0 to 1: the split is unlab"):
        list(Data(config, mesh, 2).train_batches(0, 32, 0, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_ratio": 0.875}, "data.crop_ratio needs a size"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"statistics_examples": 0}, "statistics_examples=0"),
        ({"crop_ratio": 1.5}, "crop_ratio=1.5"),
        ({"holdout_every": 1}, "holdout_every=1"),
        ({"random_resized_crop": True}, "set --data.image-size"),
        ({"eval_image_size": 8}, "eval_image_size needs a size to train at"),
        ({"eval_image_size": 0, "image_size": 8}, "eval_image_size=0"),
        ({"repeats": 0}, "data.repeats=0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_real_cifar10_reads_whole(shared_data, mesh):
    config = DataConfig("cifar10", data_dir=shared_data, train_split="train[:2000]")
    opened = Data(config, mesh, 10)
    assert (opened.num_train, opened.num_eval, opened.image_shape) == (2000, 10000, (32, 32, 3))
    assert opened.class_names[:3] == ("airplane", "automobile", "bird")
    labels = np.concatenate([b["label"][b["mask"]] for b in as_numpy(opened.in_order("eval", 512))])
    assert np.bincount(labels).tolist() == [1000] * 10
    streamed = Data(dataclasses.replace(config, resident_mb=0, num_workers=0), mesh, 10)
    assert_same_batches(streamed.train_batches(0, 128, 3, 6), opened.train_batches(0, 128, 3, 6))


def test_the_shared_memory_of_a_run_follows_from_its_batches(image_folder, mesh, monkeypatch):
    asked = []
    monkeypatch.setattr(workers, "check_shared_memory", asked.append)
    config = DataConfig(folder=str(image_folder), resident_mb=0, num_workers=1)
    data = Data(config, mesh, 2)  # 8 for evaluation
    data.check_shared_memory(5, 8, 1)
    data.check_shared_memory(4, 8, 1)  # too few steps for worker processes
    data.check_shared_memory(4, 8, 8)
    Data(dataclasses.replace(config, num_workers=0), mesh, 2).check_shared_memory(99, 8, 1)
    Data(dataclasses.replace(config, resident_mb=1), mesh, 2).check_shared_memory(99, 8, 1)
    assert asked == [3 * (8 + 1) * 8 * 8 * 3, 3 * 8 * 8 * 3]


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [(1, 0, 1), (2, 0, 2), (64, 0, 8), (1, 2, 1), (2, 2, 1), (4, 2, 2), (64, 2, 2), (6, 4, 1)],
)
def test_there_are_no_more_threads_than_cores(cores, workers, threads, monkeypatch):
    monkeypatch.setattr(order, "usable_cores", lambda: cores)
    assert order.thread_count(workers) == threads
