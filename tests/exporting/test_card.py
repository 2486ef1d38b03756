"""Model cards: every figure is the record's, and what nobody said is said to be not known."""

import dataclasses
import json

import jax
import pytest
import yaml
from inspection_helpers import tiny_config, tiny_run
from prediction_helpers import make_weights

from flax_resnet.data.config import DataConfig
from flax_resnet.distributed.sharding import data_mesh
from flax_resnet.exporting.card import escaped, model_card
from flax_resnet.exporting.hub import _opened as opened_of
from flax_resnet.exporting.hub import write_repository
from flax_resnet.training.loop import train_and_evaluate
from flax_resnet.weights import open_weights

pytest.importorskip("huggingface_hub", reason="needs [hub]")


@pytest.fixture(scope="module")
def run(digits_dir):
    workdir = tiny_run(digits_dir)
    return workdir, *opened_of(workdir)[:2]


def front(card):
    return yaml.safe_load(card.split("---\n", 1)[1].split("\n---\n\n# ")[0])


def again(card):
    """The command that measures it again."""
    return card.partition("To measure it again")[2].split("```bash\n")[1].split("\n")[0]


def test_the_figures_are_those_of_the_run(run):
    workdir, opened, trained = run
    result = json.loads((workdir / "result.json").read_text())
    card = model_card(opened, "me/digits", "mit", trained)
    row = "| 355 of sklearn\\_digits, split test | {:.2%} | {:.2%} | {:.4f} |"
    assert row.format(result["top1"], result["top5"], result["loss"]) in card
    assert f"network of {result['parameters']:,} parameters" in card
    assert "One run of seed 3, at step 24, the best of 2 evaluations on these images. " in card
    assert again(card) == (
        "flax-resnet evaluate --weights hf://me/digits --data.name sklearn_digits "
        "--data.eval-split test"
    )
    (entry,) = front(card)["model-index"]
    (shown,) = entry["results"]
    assert [m["value"] for m in shown["metrics"]] == [result["top1"]]
    assert shown["dataset"] == {
        "name": "sklearn_digits", "type": "sklearn_digits", "split": "test", "args": {"images": 355}
    }  # fmt: skip


def test_the_card_of_a_folder_measures_what_was_held_out(call, image_folder, tmp_path):
    for path in [*image_folder.glob("*/0[5-9].png")]:
        path.unlink()  # 15 of each class are left, 3 of which are held out
    workdir = tmp_path / "run"
    data = DataConfig(folder=str(image_folder), holdout_every=5)
    config = tiny_config(None, data=data, batch_size=12, num_steps=4, tta="flip")
    train_and_evaluate(config, workdir, mesh=data_mesh(jax.devices()[:1]))
    write_repository(workdir, "me/photos", tmp_path / "there", license="mit")
    card = (tmp_path / "there" / "README.md").read_text()
    assert ". To measure it again, DIR being the same" in card
    assert "--tta flip" in again(card)
    assert str(image_folder.parent) not in card
    places = {"hf://me/photos": tmp_path / "there" / "model.safetensors", "DIR": image_folder}
    words = [places.get(word, word) for word in again(card).split()[1:]]
    file = tmp_path / "numbers.json"
    assert call(*words, "--output", file)[0] == 0
    measured, (shown, *_) = json.loads(file.read_text()), front(card)["model-index"][0]["results"]
    assert measured["n"] == shown["dataset"]["args"]["images"] == 6
    assert measured["top1"] == shown["metrics"][0]["value"]
    assert float(card.split("% | ")[-1].split(" ")[0]) == pytest.approx(measured["loss"], abs=1e-4)


def test_the_figures_are_of_the_step_that_was_kept(run):
    _, opened, trained = run
    lines = [
        {"step": 23, "top1": 0.5, "top5": 0.75, "loss": 1.5},
        {"step": 24, "top1": 0.25, "top5": 0.5, "loss": 2.5},
    ]
    kept = {**trained.checkpoint, "step": 23}
    trained = trained._replace(evaluations=lines, checkpoint=kept)
    card = model_card(opened, "me/digits", "mit", trained)
    metrics = front(card)["model-index"][0]["results"][0]["metrics"]
    assert [m["value"] for m in metrics] == [0.5]
    assert "| 50.00% | 75.00% | 1.5000 |" in card
    assert "at step 23, the best of 2 evaluations" in card
    newest = trained._replace(checkpoint={**kept, "step": 24})
    assert "at step 24." in model_card(opened, "me/digits", "mit", newest)
    never = trained._replace(checkpoint={**kept, "step": 20})
    card = model_card(opened, "me/digits", "mit", never)
    assert "Not known: the checkpoint of step 20 was not evaluated." in card
    assert "model-index" not in front(card)
    assert "%" not in card


def test_weights_alone_say_that_the_rest_is_not_known(tmp_path):
    make_weights(tmp_path / "a.safetensors", preprocessing=None)
    card = model_card(open_weights(tmp_path / "a.safetensors"), "me/net", "mit")
    assert "Not known: these weights were published without the record of a run." in card
    assert front(card) == {
        "license": "mit",
        "library_name": "flax_resnet",
        "pipeline_tag": "image-classification",
        "tags": ["jax", "flax", "resnet", "image-classification"],
    }


def test_what_is_in_names_does_nothing(run):
    _, opened, trained = run
    nasty = "x\n---\nlicense: mit\n| <script>evil</script> [a](b)"
    data = dataclasses.replace(trained.config.data, folder=f"/secret/{nasty}", eval_split=nasty)
    config = dataclasses.replace(trained.config, data=data, weights="hf://you/net@v1")
    card = model_card(opened, "me/net", nasty, trained._replace(config=config))
    about = front(card)
    assert (about["license"], about["base_model"]) == (nasty, "you/net")
    text = "".join(card.split("\n---\n\n# ")[1].split("```")[0::2])
    assert "<script>" not in text
    assert "secret" not in text
    assert "Trained from hf://you/net\\@v1, whose licence counts as well." in text
    assert escaped("a|b\nc <d> [x](y) _z_") == r"a\|b c \<d\> \[x\](y) \_z\_"
