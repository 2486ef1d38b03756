"""The benchmark of input: what it reads, and what it says."""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import line_of_bad_input
from PIL import Image

from experiments.benchmarks import input, input_files, input_worker, workers
from flax_resnet.datasets import decode, jpeg, sources

SMALL = ["--photographs", "4", "--long-side", "64", "--size", "16", "--batch-size", "3",
         "--batches", "2", "--rounds", "2", "--cores", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    assert input_files.make_photographs(root, 8, 64)["count"] == 8
    return root


def first_batches(folder, way, crop):
    """Two batches of a way, in this process."""
    task = input.Settings(size=16, batch_size=3, crop=crop).task(way, folder, 1)
    _, batches = input_worker.WAYS[way](task)
    made = batches()
    return [next(made) for _ in range(2)]


def test_photographs_are_of_both_classes_and_splits_and_of_the_size(folder):
    paths = sorted(folder.glob("*/*/*.jpg"))
    assert {str(path.parent.relative_to(folder)) for path in paths} == {
        f"{split}/class{label}" for split in ("train", "test") for label in (0, 1)
    }
    sizes = set()
    for path in paths:
        with Image.open(path) as image:
            sizes.add(image.size)
    assert sizes == {(64, 48), (48, 64)}
    assert len({path.read_bytes() for path in paths}) == len(paths) == 10


def test_photographs_can_be_larger_than_the_originals():
    image = Image.fromarray(np.zeros((40, 30, 3), np.uint8))
    assert input_files._window(image, 90, 61, np.random.default_rng(0)).size == (90, 61)


@pytest.mark.parametrize("crop", ["random", "centre"])
def test_the_decoder_with_pillow_alone_gives_the_same_crops(folder, crop, monkeypatch):
    monkeypatch.setattr(jpeg, "read_header", jpeg.read_header)  # put back afterwards
    quick = first_batches(folder, "decoder", crop)
    slow = first_batches(folder, "decoder, Pillow alone", crop)
    assert quick[0].shape == (3, 16, 16, 3)
    assert np.abs(np.subtract(quick, slow, dtype=int)).mean() < 2


def test_records_hold_the_folders_files(folder):
    """Bit for bit, with their labels; the same files give the same crops."""
    input_files.make_records(folder)
    (records,) = sources.open_tfds(input_files.RECORDS, str(folder), ["train"])
    files = sources.open_folder(str(folder), ["train", "test"], 16, 5)[0]
    assert (len(records), records.image_shape) == (len(files), (None, None, 3))
    stored, labels = records.read(range(8))
    expected = dict(zip(*files.read(range(8)), strict=True))
    assert {data: expected[data] for data in stored} == dict(zip(stored, labels, strict=True))
    made = first_batches(folder, "ours, threads, ArrayRecord", "random")
    assert np.shape(made[0]["image"]) == (3, 16, 16, 3)


def test_the_windows_of_tf_data_are_drawn_as_the_decoder_draws(folder):
    task = input.Settings().task("tf.data", folder, 1)
    found = input_worker.windows(task)
    assert found.shape == (8 * input_worker.WINDOWS, 4)
    assert (found[:, :2] >= 0).all()
    assert (found[:, :2] + found[:, 2:] <= 64).all()
    area = found[:, 2] * found[:, 3] / (64 * 48)
    rng = np.random.default_rng(0)
    boxes = np.array([decode._random_box(rng, 64, 48) for _ in range(4000)])
    drawn = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (64 * 48)
    assert abs(area.mean() - drawn.mean()) < 0.1
    centre = input_worker.windows(dataclasses.replace(task, crop="centre"))
    assert {tuple(row[2:]) for row in centre.tolist()} == {(42, 42)}


def test_each_way_has_a_row_for_one_core_and_for_all(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "usable_cores", lambda: 4)
    tasks = input.Settings().tasks(tmp_path)
    piped = [way for way in input_worker.WAYS if not way.startswith("decoder")]
    assert [task.way for task in tasks] == [*input_worker.WAYS, *piped]
    assert [task.cores for task in tasks] == [1] * len(input_worker.WAYS) + [4] * len(piped)
    assert {task.cores for task in input.Settings(cores=3).tasks(tmp_path)} == {1, 3}


@pytest.mark.parametrize("crop", ["random", "centre"])
def test_torch_reads_crops_of_the_photographs(folder, crop):
    pytest.importorskip("torch")
    task = input.Settings(size=16, crop=crop).task("torch", folder, 1)
    photographs = input_worker.Photographs(task)
    assert len(photographs) == 8
    assert photographs[3].shape == (3, 16, 16)


def fake_worker(seconds):
    """In place of a process: it says what its turns took."""

    class Worker:
        about = {"versions": {"x": "1"}}

        def __init__(self, module, task, device, cores, limit):
            assert (module, device) == ("experiments.benchmarks.input_worker", "cpu")
            assert Path(task["folder"], "train", "class0").is_dir()
            self.way = task["way"]

        def ask(self, steps, limit):
            if self.way not in seconds:
                raise workers.WorkerError("died of signal 9")
            return {"seconds": seconds[self.way]}

        def close(self):
            pass

    return Worker


def test_rows_have_ratios_to_tf_data_or_say_why_not(monkeypatch, capfd):
    installed = types.SimpleNamespace(find_spec=lambda name: None if name == "torch" else name)
    monkeypatch.setattr(input.importlib, "util", installed)
    seconds = {"ours": 0.1, "tf.data": 0.2, "tf.data, antialias": 0.5, "decoder": 0.05}
    monkeypatch.setattr(input.workers, "Worker", fake_worker(seconds))
    input.main(SMALL)
    out, err = capfd.readouterr()
    rows = {row["way"]: row for row in map(json.loads, out.splitlines())}
    assert list(rows) == list(input_worker.WAYS)
    assert rows["ours"]["crops_per_second_per_core"] == {
        "median": pytest.approx(30), "least": pytest.approx(30), "most": pytest.approx(30), "n": 2,
    }  # fmt: skip
    assert rows["ours"]["ratio_to_tf_data"]["median"] == 2
    assert rows["ours"]["ratio_to_tf_data_antialias"]["median"] == 5
    assert rows["ours"]["photographs"]["count"] == 4
    assert rows["torch"]["error"] == "torch is not installed: pip install -e '.[parity]'"
    assert rows["decoder, Pillow alone"]["error"] == "died of signal 9"
    assert "torch: torch is not installed" in err
    assert ["decoder", "1", "60", "60", "(60-60)", "4", "(4-4)", "10", "(10-10)"] in [
        x.split() for x in err.splitlines()
    ]


def test_without_tf_data_there_are_no_ratios(monkeypatch, capfd):
    monkeypatch.setattr(input.workers, "Worker", fake_worker({"ours": 0.1}))
    input.main(SMALL)
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row.get("ratio_to_tf_data") for row in rows] == [None] * 8


def test_a_worker_times_batches_after_those_read_ahead(folder, monkeypatch):
    made = []
    monkeypatch.setitem(
        input_worker.WAYS,
        "ours",
        lambda task: ({"x": "1"}, lambda: (made.append(i) or i for i in range(100))),
    )
    task = input.Settings(cores=1).task("ours", folder, 1)
    built = input_worker.build(vars(task))
    assert built.about == {"versions": {"x": "1"}}
    assert built.turn(5) > 0
    assert made == list(range(8 + 5))
    built.turn(1)
    assert made[13:] == list(range(9))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--photographs", "1"], "--photographs=1: expected 2 or more"),
        (["--cores", "4096"], "--cores 4096: there are"),
        (["--batches", "0"], "--batches=0: expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(argv, line, capfd):
    assert line in line_of_bad_input(input.main, argv, capfd)


def test_module_says_how_it_is_run():
    assert "Command: python -m experiments.benchmarks.input" in input.__doc__


@pytest.mark.slow
def test_it_runs(capfd):
    input.main(SMALL)
    rows = {row["way"]: row for row in map(json.loads, capfd.readouterr().out.splitlines())}
    assert rows["ours"]["error"] is None
    assert rows["decoder"]["crops_per_second"] > 0
