import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from helpers import assert_one_line_error, tiny_resnet
from inspection_helpers import tiny_config
from prediction_helpers import apply, damaged, make_weights, paint

from flax_resnet import figures
from flax_resnet.data.config import DataConfig
from flax_resnet.data.normalization import normalize
from flax_resnet.errors import UserError
from flax_resnet.inference.classifier import open_network
from flax_resnet.inference.evaluation import class_order, evaluate
from flax_resnet.inspection import open_run
from flax_resnet.optim.optimizers import Adam
from flax_resnet.records.run_dir import finished, read_config, read_metrics
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.weights.imagenet import imagenet_classes, imagenet_ids
from flax_resnet.weights.loading import open_run_weights

CLASSES = tuple(f"kind {i}" for i in range(7))
NUMBERS = ("top1", "top5", "loss", "calibration_error", "brier", "n")


def fill(root, rng, names=CLASSES, count=5):
    """Images of odd sizes, a folder a class; returns their paths and labels."""
    paths = []
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            paths.append(root / name / f"{i}.png")
            paint(rng, *rng.integers(8, 15, 2)).save(paths[-1])
    return paths, np.repeat(np.arange(len(names)), count)


@pytest.fixture
def folder(tmp_path, rng):
    """(folder, its files, their labels)."""
    return tmp_path / "folder", *fill(tmp_path / "folder", rng)


@pytest.fixture
def opened(tmp_path):
    make_weights(tmp_path / "tiny.safetensors", class_names=CLASSES, num_classes=7)
    return open_network(tmp_path / "tiny.safetensors")


def softmax(opened, pixels):
    stats = opened.preprocessing.statistics()
    logits = apply(opened.module, opened.variables, normalize(pixels, stats))
    return np.asarray(jax.nn.softmax(logits), np.float64)


def brute_force(p, labels):
    """The numbers that evaluate gives."""
    n, order = len(p), np.argsort(-p, axis=1, kind="stable")
    surplus, bins = p.max(axis=1) - (order[:, 0] == labels), np.ceil(15 * p.max(axis=1))
    return {
        "top1": np.mean(order[:, 0] == labels),
        "top5": np.mean([label in best for label, best in zip(labels, order[:, :5], strict=True)]),
        "loss": -np.mean(np.log(p[np.arange(n), labels])),
        "calibration_error": sum(abs(surplus[bins == m].sum()) for m in range(1, 16)) / n,
        "brier": np.mean(np.sum((p - np.eye(p.shape[1])[labels]) ** 2, axis=1)),
        "n": n,
    }


def check(found, wanted):
    assert {k: found[k] for k in NUMBERS} == pytest.approx(wanted, rel=1e-4)


def test_a_folder_against_brute_force(opened, folder):
    root, paths, labels = folder
    p = softmax(opened, np.stack([opened.preprocessing(x.read_bytes()) for x in paths]))
    wanted = brute_force(p, labels)
    assert len(set(p.argmax(1))) > 2
    assert 0 < wanted["top5"] < 1
    check(evaluate(opened, DataConfig(folder=str(root)), batch_size=8), wanted)


def test_what_of_a_folder_is_evaluated(opened, folder, tmp_path, rng):
    root, paths, labels = folder
    p = softmax(opened, np.stack([opened.preprocessing(x.read_bytes()) for x in paths]))
    config = DataConfig(folder=str(root), holdout_every=3)
    held = np.arange(35) % 5 == 2
    check(evaluate(opened, config, holdout=True), brute_force(p[held], labels[held]))
    even = np.linspace(0, 34, 12).round().astype(int)
    check(evaluate(opened, config, limit=12), brute_force(p[even], labels[even]))
    assert evaluate(opened, config, limit=99)["n"] == 35
    fill(tmp_path / "split" / "train", rng)
    root.rename(tmp_path / "split" / "val")
    found = evaluate(opened, DataConfig(folder=str(tmp_path / "split")))
    check(found, brute_force(p, labels))


def test_ten_crops_against_brute_force(opened, folder):
    root, paths, labels = folder
    crops = np.stack([opened.preprocessing.ten_crops(x.read_bytes()) for x in paths])
    p = softmax(opened, crops.reshape(-1, 8, 8, 3)).reshape(35, 10, 7).mean(1)
    found = evaluate(opened, DataConfig(folder=str(root)), ten_crop=True, batch_size=80)
    check(found, brute_force(p, labels))
    squeezed = dataclasses.replace(opened.preprocessing, resize=None)
    opened = dataclasses.replace(opened, preprocessing=squeezed)
    with pytest.raises(UserError, match=r"ten crops of 8 pixels need a larger image"):
        evaluate(opened, DataConfig(folder=str(root)), ten_crop=True)


def test_an_extra_class_is_left_out_and_a_missing_one_is_said(opened, folder, tmp_path, rng):
    root, _, _ = folder
    wanted = evaluate(opened, DataConfig(folder=str(root)))
    fill(root, rng, ("another", "kind 9"), 3)
    said = []
    found = evaluate(opened, DataConfig(folder=str(root)), say=said.append)
    check(found, {name: wanted[name] for name in NUMBERS})
    assert said == [
        "evaluated on all images",
        "left out: 6 images of classes that the weights do not know: ['another', 'kind 9']",
        f"scored on 35 images of {root}",
    ]
    for name in (*CLASSES[:4], "another", "kind 9"):
        (root / name).rename(tmp_path / name)
    evaluate(opened, DataConfig(folder=str(root)), say=said.append)
    missing = f"4 of the network's classes are not in {root}: ['kind 0', 'kind 1'"
    assert said[4].startswith(missing)
    assert said[5] == f"scored on 15 images of {root}"


def test_classes_in_another_order_are_matched_by_name(opened, folder):
    root, _, _ = folder
    config = DataConfig(folder=str(root))
    wanted = evaluate(opened, config)
    order = [3, 0, 6, 1, 5, 2, 4]
    params = dict(opened.variables["params"])
    params["head"] = {k: v[..., order] for k, v in params["head"].items()}
    variables, names = {**opened.variables, "params": params}, tuple(CLASSES[i] for i in order)
    turned = dataclasses.replace(opened, variables=variables, class_names=names)
    check(evaluate(turned, config), {k: wanted[k] for k in NUMBERS})


@pytest.mark.parametrize(
    ("data", "weights", "outputs", "order"),
    [
        (["b", "a"], ["a", "b"], 2, [1, 0]),
        (["b", "a"], ["d", "c"], 2, [0, 1]),
        (["b", "b"], ["b", "b"], 2, [0, 1]),
        (["b", "a"], ["a", "b"], 5, [1, 0]),
        (["b", "a"], None, 2, [0, 1]),
        (["fox"], ["cat", "dog", "fox"], 3, [2]),
        (["e\u0301"], ["a", "\u00e9"], 2, [1]),
    ],
)
def test_class_order(data, weights, outputs, order):
    assert class_order(data, weights, outputs, "x").tolist() == order


def test_class_order_of_imagenet_and_what_is_said():
    ids = list(imagenet_ids())
    assert class_order(ids, imagenet_classes(), 1000, "x").tolist() == list(range(1000))
    assert class_order(ids[::-1], imagenet_classes(), 1000, "x").tolist() == [*range(999, -1, -1)]
    odd = class_order([*ids[:-1], "n99999999"], imagenet_classes(), 1000, "x")
    assert odd.tolist() == [*range(999), -1]
    said = []
    animals = class_order(["ant", "cat", "dog"], ["cat", "dog", "fox"], 3, "d", said.append)
    assert animals.tolist() == [-1, 0, 1]
    assert said == ["1 of the network's classes are not in d: ['fox']"]
    class_order(["b", "a"], ["d", "c"], 2, "x", said.append)
    assert "no class of x has a name of the network's: they are matched by position" in said[1]
    with pytest.raises(UserError, match="tell 3 classes apart and x has 2"):
        class_order(["a", "b"], None, 3, "x")


def test_a_run_gives_its_own_top1(call, tmp_path, mesh, digits_dir, monkeypatch):
    for name in ("curves", "confusion"):  # drawing them takes longer than the training
        monkeypatch.setattr(figures, name, lambda *arguments: None)
    workdir = tmp_path / "run"
    config = TrainConfig(
        model=tiny_resnet(),
        data=DataConfig(data_dir=digits_dir),
        optimizer=Adam(learning_rate=0.003),
        normalization="pixel",
        batch_size=128,
        eval_batch_size=355,
        num_steps=9,
    )
    recorded = train_and_evaluate(config, workdir, mesh=mesh)
    arguments = ("evaluate", "--weights", workdir, "--data.name", "sklearn_digits")
    file = tmp_path / "numbers.json"
    code, out, err = call(*arguments, "--data.data-dir", digits_dir, "--output", file)
    assert (code, err) == (0, "")
    assert f"{100 * recorded['top1']:.2f} % of 355 images" in out
    assert "Brier score" in out
    found = json.loads(file.read_text())
    assert (found["top1"], found["top5"], found["n"]) == (recorded["top1"], recorded["top5"], 355)
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-4)
    assert found["weights"] == str(workdir)
    # Where no data are named they are the run's own.
    assert call("evaluate", "--weights", workdir, "--output", file)[0] == 0
    own = json.loads(file.read_text())
    assert {k: own[k] for k in NUMBERS} == {k: found[k] for k in NUMBERS}
    assert own["data"] == found["data"]
    assert (own["data"]["name"], own["data"]["holdout_every"]) == ("sklearn_digits", None)
    arguments = ("evaluate", "--weights", workdir, "--data.eval-split", "train", "--output", file)
    assert call(*arguments)[0] == 0
    assert json.loads(file.read_text())["n"] == 1442


@pytest.fixture
def folder_run(tmp_path, image_folder, mesh, monkeypatch):
    """A run on 40 images that held out 10, and saw each with its mirror image."""
    for name in ("curves", "confusion"):
        monkeypatch.setattr(figures, name, lambda *arguments: None)
    data = DataConfig(folder=str(image_folder), holdout_every=4)
    config = tiny_config(None, data=data, batch_size=15, num_steps=6, tta="flip")
    train_and_evaluate(config, tmp_path / "run", mesh=mesh)
    return tmp_path / "run"


def test_a_run_on_a_folder_gives_its_own_top1(call, folder_run, tmp_path):
    kept = open_run_weights(folder_run)[1]["step"]
    lines = [line for line in read_metrics(folder_run) if line["split"] == "eval"]
    (recorded,) = [line for line in lines if line["step"] == kept]
    file = tmp_path / "numbers.json"

    def measured(*flags):
        result = call("evaluate", "--weights", folder_run, *flags, "--output", file)
        assert result[::2] == (0, "")
        return json.loads(file.read_text())

    own = measured()
    assert (own["top1"], own["n"], own["tta"]) == (recorded["top1"], 10, "flip")
    assert own["loss"] == pytest.approx(recorded["loss"], rel=1e-4)
    assert (own["data"]["name"], own["data"]["holdout_every"]) == (None, 4)
    assert measured("--tta", "none")["loss"] != pytest.approx(own["loss"], rel=1e-4)
    assert measured("--data.holdout-every", "5")["n"] == 8
    # The same, told by hand; and all of it.
    where = ("--data.folder", own["data"]["folder"], "--tta", "flip")
    assert measured(*where, "--data.holdout-every", "4")["loss"] == own["loss"]
    assert measured(*where)["n"] == 40


def test_a_run_whose_folder_changes_or_moves(call, folder_run, image_folder, tmp_path):
    evaluated = ("evaluate", "--weights", folder_run, "--output", tmp_path / "numbers.json")
    code, out, _ = call(*evaluated)
    assert code == 0
    assert "evaluated on one in 4 images of each class\nscored on 10 images" in out
    changed = "has changed since the training ('cat' 15 training images then, 18 now"
    assert "changed" not in out
    copies = [image_folder / "cat" / f"0{i}-copy.png" for i in range(3)]
    for path in copies:
        shutil.copy(image_folder / "cat" / "00.png", path)
    code, out, _ = call("evaluate", "--weights", folder_run)
    assert (code, changed in out) == (0, True)
    for path in copies:
        path.unlink()
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    image_folder.rename(tmp_path / "new")
    gone = f"was trained on the folder {image_folder}; {image_folder} is not there"
    assert_one_line_error(call(*evaluated), gone)
    assert call(*evaluated, "--data.folder", tmp_path / "new")[::2] == (0, "")
    again = json.loads((tmp_path / "numbers.json").read_text())
    assert {k: again[k] for k in NUMBERS} == {k: numbers[k] for k in NUMBERS}
    with pytest.raises(UserError, match="is not there: name the place"):
        open_run(folder_run).data  # noqa: B018
    assert open_run(folder_run, folder=str(tmp_path / "new")).data.num_eval == 10

    (tmp_path / "new" / "cat" / "00.png").unlink()
    code, out, _ = call(*evaluated, "--data.folder", tmp_path / "new")
    assert code == 0
    assert "new has changed since the training (" in out
    assert "'cat' 5 evaluation images then, 4 now" in out
    assert json.loads((tmp_path / "numbers.json").read_text())["n"] == 39


def test_a_run_goes_on_where_its_folder_has_moved(folder_run, image_folder, tmp_path, mesh):
    config = read_config(folder_run)
    image_folder.rename(tmp_path / "new")
    moved = dataclasses.replace(config.data, folder=str(tmp_path / "new"))
    moved = dataclasses.replace(config, data=moved)
    recorded = finished(folder_run)
    assert train_and_evaluate(moved, folder_run, mesh=mesh) == recorded
    (folder_run / "result.json").unlink()
    again = train_and_evaluate(moved, folder_run, mesh=mesh)
    assert (again["step"], again["loss"]) == (6, recorded["loss"])
    (tmp_path / "new").rename(tmp_path / "third")
    (tmp_path / "third" / "cat" / "00.png").unlink()
    third = dataclasses.replace(config.data, folder=str(tmp_path / "third"))
    with pytest.raises(UserError, match=r"other ones .*'cat' 5 evaluation images then, 4 now"):
        train_and_evaluate(dataclasses.replace(config, data=third), folder_run, mesh=mesh)


def test_sub_folders_for_splits_hold_out_nothing(call, folder_run, image_folder, tmp_path, rng):
    for name in ("training", "val"):
        fill(image_folder / name, rng, ("cat", "dog"), 3)
    record = json.loads((folder_run / "config.json").read_text())
    record["config"]["data"]["train_split"] = "training"
    (folder_run / "config.json").write_text(json.dumps(record))
    file = tmp_path / "numbers.json"
    assert call("evaluate", "--weights", folder_run, "--output", file)[0] == 0
    assert json.loads(file.read_text())["n"] == 6


def test_a_directory_that_does_not_say_its_data_is_one_line(call, folder_run, tmp_path):
    assert_one_line_error(call("evaluate", "--weights", tmp_path / "photos"), "holds no run")
    (folder_run / "config.json").write_text("{}")
    told = "(KeyError('config')): name another directory"
    assert_one_line_error(call("evaluate", "--weights", folder_run), told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --data.name NAME and --data.folder DIR"),
        (["--data.name", "cifar10", "--data.folder", "{root}"], "expected one of --data.name"),
        (["--data.folder", "{root}", "--data.holdout-every", "1"], "holdout_every=1: expected 2"),
        (["--data.folder", "{root}", "--data.holdout-every", "9"], "at least 9 are needed"),
        (["--data.folder", "{root}", "--limit", "0"], "limit=0: expected 1 or more"),
        (["--data.folder", "{root}", "--batch-size", "0"], "batch_size=0: expected 1 or more"),
        (["--data.folder", "{root}", "--ten-crop", "--resize", "0"], "set resize (--resize) above"),
        (["--data.folder", "{root}", "--ten-crop", "--tta", "flip"], "leave one out"),
        (["--data.folder", "{root}", "--weights", "{nan}"], "outputs are not finite"),
        (["--data.folder", "{root}", "--output", "/proc/x/y"], "cannot be written"),
        (["--data.folder", "{few}"], "tell 7 classes apart and {few} has 2"),
        (["--data.folder", "{broken}"], "unreadable image {broken}/kind 1/0.png"),
    ],
)
def test_bad_input_is_one_line(call, opened, folder, tmp_path, rng, arguments, message):
    root, _, _ = folder
    weights = tmp_path / "tiny.safetensors"
    places = {"root": root, "few": tmp_path / "few", "broken": tmp_path / "broken"}
    if "{few}" in arguments:
        fill(tmp_path / "few", rng, ("a", "b"), 2)
    if "{broken}" in arguments:
        root.rename(places["broken"])
        cut = places["broken"] / "kind 1" / "0.png"
        cut.write_bytes(cut.read_bytes()[:70])
    if "{nan}" in arguments:
        places["nan"] = damaged(weights)
    result = call("evaluate", "--weights", weights, *[a.format(**places) for a in arguments])
    assert_one_line_error(result, message.format(**places))
