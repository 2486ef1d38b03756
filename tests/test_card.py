"""Model cards: every figure is of the record, and what nobody said is said to be not known."""

import dataclasses
import json

import jax
import pytest
import yaml
from inspection_helpers import tiny_config, tiny_run
from prediction_helpers import make_weights

from flax_resnet.card import Trained, model_card
from flax_resnet.data import DataConfig
from flax_resnet.distributed import data_mesh
from flax_resnet.hub import _opened as opened_of
from flax_resnet.hub import write_repository
from flax_resnet.licenses import License
from flax_resnet.optim import AdamW
from flax_resnet.pretrained import open_weights
from flax_resnet.schedules import Cosine
from flax_resnet.train import train_and_evaluate

MIT = License("mit")
ARGV = ["/home/x/experiments/digits.py", "--optimizer.learning-rate", "0.05"]


@pytest.fixture(scope="module")
def run(digits_dir):
    workdir = tiny_run(digits_dir)
    opened, trained, _ = opened_of(workdir)
    starts = [{**trained.starts[0], "argv": ARGV}]
    return workdir, opened, dataclasses.replace(trained, starts=starts)


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def rows(card):
    """{first cell: second} of all tables."""
    cells = [line.strip("| ").split(" | ", 1) for line in card.splitlines() if line[:2] == "| "]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_the_figures_are_those_of_the_run(run):
    workdir, opened, trained = run
    result = json.loads((workdir / "result.json").read_text())
    card = model_card(opened, "me/digits", MIT, trained)
    told = rows(card)
    assert told["top-1"] == f"{100 * result['top1']:.2f} %"
    assert told["top-5"] == f"{100 * result['top5']:.2f} %"
    assert told["loss"] == "cross_entropy"  # of the recipe, after the accuracy's
    assert f"| loss | {result['loss']:.4f} nats |" in card
    assert told["images"] == "355, each once"
    assert told["training images"] == f"{result['num_train']:,}, split train"
    assert told["parameters"] == f"{result['parameters']:,}"
    assert told["optimizer"] == "SGD: learning_rate 0.05, momentum 0.9, weight_decay 0.0"
    assert told["augmentation"] == "flip True, pad_crop 1"
    assert told["length"] == "24 steps, 1.0435 epochs"
    assert told["time"].startswith(f"{result['seconds']:,.1f} s for the whole run")
    assert told["runs"] == "1, of seed 3"
    assert f"jax {jax.__version__}" in told["packages"]
    made = "python -m experiments.digits --optimizer.learning-rate 0.05"
    of = "The command that made it (in a checkout of flax_resnet):"
    assert f"{of}\n\n```bash\n{made}\n```" in card
    assert told["data"] == "sklearn_digits (scikit-learn's digits, which flax_resnet brings)"
    assert again(card) == (
        "flax-resnet evaluate --weights hf://me/digits --data.name sklearn_digits "
        "--data.eval-split test"
    )
    assert "the best by top-1 of 2 evaluations on this split" in card


def again(card):
    """The command that measures it again."""
    return card.partition("To measure it again")[2].split("```")[1].removeprefix("bash\n").strip()


def test_the_length_is_that_of_the_run(run):
    _, opened, trained = run

    def length(**fields):
        card = model_card(opened, "me/digits", MIT, dataclasses.replace(trained, **fields))
        return rows(card)["length"]

    earlier = {**trained.checkpoint, "step": 23}
    wanted = "24 steps, 1.0435 epochs; these weights are of step 23"
    assert length(checkpoint=earlier) == wanted
    wanted = "24 steps, 1.0435 epochs, not known to be finished; these weights are of step 23"
    assert length(checkpoint=earlier, result=None) == wanted
    epochs = tiny_config(None, num_steps=None, num_epochs=2.5)  # of 23 steps
    assert length(config=epochs, result=None).startswith("58 steps, 2.5217 epochs, not known")


def test_the_card_of_a_folder_measures_what_was_held_out(call, image_folder, tmp_path):
    for path in [*image_folder.glob("*/0[5-9].png")]:
        path.unlink()  # 15 of each class are left, 3 of which are held out
    workdir = tmp_path / "run"
    data = DataConfig(folder=str(image_folder), holdout_every=5)
    config = tiny_config(None, data=data, batch_size=12, num_steps=4, tta="flip")
    train_and_evaluate(config, workdir, mesh=data_mesh(jax.devices()[:1]))
    write_repository(workdir, "me/photos", tmp_path / "there", license="mit")
    card = (tmp_path / "there" / "README.md").read_text()
    command = again(card)
    assert command == (
        "flax-resnet evaluate --weights hf://me/photos --data.folder DIR --data.eval-split test "
        "--data.holdout-every 5 --tta flip"
    )
    places = {"hf://me/photos": tmp_path / "there" / "model.safetensors", "DIR": image_folder}
    words = [places.get(word, word) for word in command.split()[1:]]
    file = tmp_path / "numbers.json"
    assert call(*words, "--output", file)[0] == 0
    found, (shown, *_) = json.loads(file.read_text()), front(card)["model-index"][0]["results"]
    assert found["n"] == shown["dataset"]["args"]["images"] == 6
    assert found["top1"] == shown["metrics"][0]["value"]
    assert found["loss"] == pytest.approx(shown["metrics"][2]["value"], rel=1e-4)


def test_a_folder_with_sub_folders_for_its_splits_held_out_nothing(run):
    _, opened, trained = run
    data = DataConfig(folder="/a/b/photos", train_split="training", eval_split="val")

    def command(num_train, num_eval):
        counts = {"num_train": num_train, "num_eval": num_eval, "class_names": ["a", "b", "c"]}
        told = dataclasses.replace(
            trained,
            config=dataclasses.replace(trained.config, data=data),
            checkpoint={**trained.checkpoint, **counts},
        )
        return again(model_card(opened, "me/net", MIT, told))

    start = "flax-resnet evaluate --weights hf://me/net --data.folder DIR"
    whole = f"{start} --data.train-split training --data.eval-split val"
    assert [command(48, n) for n in (5, 13)] == [whole, whole]
    # Of 3 classes with 19, 19 and 24 images 3, 3 and 4 are held out; of 20 each 12.
    assert command(52, 10) == command(48, 12) == f"{whole} --data.holdout-every 5"


def test_they_are_of_the_step_that_was_kept(run):
    _, opened, trained = run
    lines = [
        {"step": 23, "epoch": 1.0, "top1": 0.5, "top5": 0.75, "loss": 1.5},
        {"step": 24, "epoch": 1.04, "top1": 0.25, "top5": 0.5, "loss": 2.5},
    ]
    kept = {**trained.checkpoint, "step": 23}
    better = dataclasses.replace(trained, evaluations=lines, checkpoint=kept, result=None)
    card = model_card(opened, "me/digits", MIT, better)
    metrics = front(card)["model-index"][0]["results"][0]["metrics"]
    assert [m["value"] for m in metrics] == [0.5, 0.75, 1.5]
    assert rows(card)["top-1"] == "50.00 %"
    assert rows(card)["time"] == "not known: the run is not finished"
    never = dataclasses.replace(better, checkpoint={**kept, "step": 20})
    card = model_card(opened, "me/digits", MIT, never)
    assert "Not known: the checkpoint of step 20 was not evaluated." in card
    assert "model-index" not in front(card)
    assert "%" not in card


def test_weights_alone_say_that_the_rest_is_not_known(tmp_path):
    make_weights(tmp_path / "a.safetensors", preprocessing=None)
    card = model_card(open_weights(tmp_path / "a.safetensors"), "me/net", MIT)
    assert "Not known: these weights were published without the record of a run." in card
    assert rows(card)["input"] == "not known: nobody recorded how images are prepared"
    assert front(card) == {
        "license": "mit",
        "library_name": "flax_resnet",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "resnet", "image-classification"],
    }
    assert "predict" not in card  # it would not work
    assert "Accuracy" not in card


def test_the_recipe_is_what_was_changed(run):
    _, opened, trained = run
    config = tiny_config(
        None,
        optimizer=AdamW(learning_rate=0.01, schedule=Cosine(warmup=0.25)),
        label_smoothing=0.1,
        tta="flip",
        weights="hf://you/base@v1",
    )
    card = model_card(opened, "me/net", MIT, dataclasses.replace(trained, config=config))
    told = rows(card)
    assert told["optimizer"].startswith("AdamW: learning_rate 0.01")
    assert told["schedule"] == "Cosine: warmup 0.25"
    assert told["besides"] == "label_smoothing 0.1, tta flip"
    assert told["views"] == "the mean of those of tta=flip"
    assert told["started from"] == r"hf\://you/base\@v1"
    assert front(card)["base_model"] == "you/base"
    assert "--tta flip" in card
    assert "whose licence counts as well" in card


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (None, "random weights"),
        ("imagenet", "imagenet"),
        ("timm/a1", "timm/a1"),
        ("other/net.safetensors", "other/net.safetensors"),
        ("runs/photos", "weights of another run (runs/photos)"),
    ],
)
def test_what_it_started_from(run, weights, said):
    _, opened, trained = run
    config = tiny_config(None, weights=weights)
    card = model_card(opened, "me/net", MIT, dataclasses.replace(trained, config=config))
    assert rows(card)["started from"] == said
    assert (f"It was trained from {said}, whose licence" in card) == (weights is not None)


def test_how_to_get_the_library(run):
    card = model_card(run[1], "me/net", MIT)
    assert "flax_resnet comes from its repository, there is no release on PyPI yet" in card
    assert "flax-resnet predict photo.png --weights hf://me/net\n" in card
    assert "flax-resnet pull me/net net\n" in card


def test_from_python_there_is_no_command(run):
    _, opened, trained = run
    told = dataclasses.replace(trained, starts=[{**trained.starts[0], "argv": ["-c"]}])
    card = model_card(opened, "me/net", MIT, told)
    assert "It was trained from Python, not by a command" in card
    assert "command that made it" not in card
    both = dataclasses.replace(trained, starts=[*trained.starts, {"argv": ["own.py"]}])
    card = model_card(opened, "me/net", MIT, both)
    assert "The commands that made it, in turn (in a checkout of flax_resnet):" in card
    assert "learning-rate 0.05\npython own.py\n" in card
    assert rows(card)["packages"] == "not recorded"


def test_what_is_in_names_does_nothing(run):
    _, opened, trained = run
    nasty = "x\n---\nlicense: mit\n| <script>evil</script> [a](b)"
    names = (nasty, *opened.class_names[1:])
    data = dataclasses.replace(
        trained.config.data, folder=f"/home/secret/{nasty}", eval_split=nasty
    )
    config = dataclasses.replace(trained.config, data=data)
    devices = [{**trained.starts[0], "devices": [nasty], "argv": ["a.py", "```\n" + nasty]}]
    card = model_card(
        dataclasses.replace(opened, class_names=names),
        "me/net",
        License("other", nasty, nasty),
        Trained(config, devices, trained.checkpoint, trained.evaluations),
    )
    _, about, body = card.split("---\n", 2)
    about = yaml.safe_load(about)
    assert about["license"] == "other"
    assert about["license_name"] == " ".join(nasty.split())
    outside = "".join(body.split("````bash")[0::2])
    assert "<script>" not in outside.split("````")[0]
    assert "secret" not in card


def test_the_card_of_a_long_list_of_classes_is_not_long(run):
    _, opened, trained = run
    names = tuple(f"class{i}" for i in range(1000))
    many = dataclasses.replace(opened, class_names=names)
    told = rows(model_card(many, "me/net", MIT, trained))["classes"]
    assert told.endswith("class99 and 900 more")


def test_the_trained_name_of_a_folder_is_not_where_it_lies(run):
    trained = run[2]
    data = dataclasses.replace(trained.config.data, folder="/a/b/photos")
    config = dataclasses.replace(trained.config, data=data)
    told = dataclasses.replace(trained, config=config)
    card = model_card(run[1], "me/net", MIT, told)
    assert rows(card)["data"] == "photos (a folder of images)"
    assert "/a/b" not in card
