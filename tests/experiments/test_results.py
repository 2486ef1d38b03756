"""Records of runs, and the table that is written from them."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from helpers import assert_one_line_error

from experiments import cifar10_resnet, digits, results, table
from experiments.ablations import shortcuts
from flax_resnet.errors import UserError
from flax_resnet.records.configs import to_record

EXPERIMENTS = Path(results.__file__).parent
DIGITS = "/home/someone/code/experiments/digits.py"


def leave_run(path, config, argv, top1, seed=0, together=None, **start):
    """A finished run's two files, as training leaves them."""
    path.mkdir(parents=True)
    began = {
        "time": "2026-01-02T03:04:05Z",
        "argv": argv,
        "git": {"commit": "0123456789abcdef", "changed": False},
        "packages": {"jax": "0.10.2", "flax": "0.12.8"},
        "devices": ["cpu"],
        "platform": "cpu",
        "cpu_cores": 2,
    }
    record = {**to_record(config), "seed": seed}
    text = json.dumps({"config": record, "starts": [{**began, **start}]})
    (path / "config.json").write_text(text)
    result = {
        "step": 690, "epochs": 30.0, "num_train": 1442, "num_eval": 355, "top1": top1, "top5": 1.0,
        "loss": 0.5, "train_top1": 0.75, "train_loss": 0.25, "seconds": 12.0, "best_top1": 1.0,
    }  # fmt: skip
    if together:
        result["together"] = together
    (path / "result.json").write_text(json.dumps(result))


@pytest.fixture
def seeds(tmp_path):
    """Three seeds of digits with 90, 92 and 97 %."""
    argv = [DIGITS, "--num-seeds", "3", "--workdir", "/home/someone/w"]
    for seed, top1 in enumerate((0.90, 0.92, 0.97)):
        leave_run(tmp_path / "w" / f"seed{seed}", digits.get_config(), argv, top1, seed)
    return tmp_path / "w"


@pytest.fixture
def ablation(tmp_path):
    """Two seeds of two of the three variants, cut to 7 steps."""
    argv = ["/x/experiments/ablations/shortcuts.py", "--num-steps=7", "--seeds", "2"]
    tops = {"shortcut=A": (0.5, 0.75), "shortcut=B": (0.25, 0.25)}
    for name, config in shortcuts.get_grid(shortcuts.get_base(), 2).items():
        variant, _, seed = name.partition("/seed")
        if variant in tops:
            config = dataclasses.replace(config, num_steps=7)
            leave_run(tmp_path / "a" / name, config, argv, tops[variant][int(seed)], int(seed))
    return tmp_path / "a"


TEXT = {"title": "T", "Claim": "c", "Command": "run | it", "Hardware": "not run here; one GPU.",
        "Published": "8.75 %."}  # fmt: skip


def test_a_record_has_the_figures_and_where_they_come_from(seeds):
    name, record = results.collect([seeds], "a note", "Digits (8x8)")
    assert (name, record["module"], record["data"]) == ("digits", "digits", "Digits (8x8)")
    assert record["commands"] == ["python -m experiments.digits --num-seeds 3"]
    assert (record["date"], record["commits"]) == ("2026-01-02", ["0123456789ab"])
    assert record["hardware"] == ["2-core CPU"]
    assert record["versions"] == {"jax": "0.10.2", "flax": "0.12.8"}
    assert [run["top1"] for run in record["runs"]] == [0.9, 0.92, 0.97]
    assert record["runs"][0]["train_loss"] == 0.25
    assert (record["changed_fields"], record["missing_variants"]) == ([], [])
    assert record["note"] == "a note"
    text = table.render({"digits": {**record, "note": ""}}, {"digits": TEXT})
    # Deviations from 93 are -3, -1 and 4: 26 / 2 is 13.
    assert f"93.00 ± {math.sqrt(13):.2f} % top-1 of 355 images, Digits (8x8); n = 3" in text
    assert "run as it stands" in text
    assert "not run here" not in text


def test_a_record_says_what_every_start_ran_on(seeds):
    """Begun on a GPU at another commit, and ended on a CPU."""
    path = seeds / "seed1"
    shutil.rmtree(path)
    gpu = {"devices": ["NVIDIA H200"], "platform": "gpu", "cpu_cores": 16}
    argv = [DIGITS, "--num-seeds", "3", "--model.dtype", "bfloat16"]
    leave_run(path, digits.get_config(), argv, 0.5, 1, time="2026-01-01T00:00:00Z", **gpu,
              git={"commit": "f" * 40, "changed": True},
              packages={"jax": "0.10.1", "flax": "0.12.8"})  # fmt: skip
    record, other = (
        json.loads((run / "config.json").read_text()) for run in (path, seeds / "seed0")
    )
    record["starts"] += other["starts"]
    (path / "config.json").write_text(json.dumps(record))
    _, record = results.collect([seeds])
    assert record["hardware"] == ["1 x NVIDIA H200, 16-core CPU", "2-core CPU"]
    assert record["commits"] == ["0123456789ab", "f" * 12]
    assert "ffffffffffff and uncommitted changes" in table.render({"digits": record}, {})
    assert record["versions"] == {"jax": "0.10.1 and 0.10.2", "flax": "0.12.8"}
    assert record["date"] == "2026-01-02"
    assert record["commands"] == [
        "python -m experiments.digits --num-seeds 3",
        "python -m experiments.digits --num-seeds 3 --model.dtype bfloat16",
    ]


def test_runs_of_a_sweep_that_failed_are_said(ablation):
    """One that had not begun, one that was tried again and is finished; one is not finished."""
    (ablation / "failures").mkdir()
    for run in ("shortcut=C-seed0", "shortcut=A-seed0"):
        (ablation / "failures" / f"{run}.txt").write_text("Traceback")
    (ablation / "shortcut=B" / "seed1" / "result.json").unlink()
    name, record = results.collect([ablation])
    assert record["unfinished"] == [
        "seed 1 of shortcut=B not finished", "seed 0 of shortcut=C failed",
    ]  # fmt: skip
    assert [(run["variant"], run["seed"]) for run in record["runs"]] == [
        ("shortcut=A", 0), ("shortcut=A", 1), ("shortcut=B", 0),
    ]  # fmt: skip
    text = table.render({name: record}, {name: TEXT})
    assert "| seed 1 of shortcut=B not finished; seed 0 of shortcut=C failed; " in text
    assert "num_steps 7, not 64000 |" in text
    assert "| run, reduced, not finished |" in text


def test_what_sets_a_run_apart_is_found_and_said(tmp_path):
    base = digits.get_config()
    data = dataclasses.replace(base.data, train_split="train[:20%]")
    config = dataclasses.replace(base, data=data, num_epochs=2.0, eval_every_epochs=1.0)
    leave_run(tmp_path / "w", config, [DIGITS], 0.5, together=2)
    name, record = results.collect([tmp_path / "w"])
    assert record["changed_fields"] == [
        "data.train_split train[:20%], not train", "num_epochs 2.0, not 30",
    ]  # fmt: skip
    text = table.render({name: record}, {"digits": TEXT})
    assert "| run, reduced |" in text
    assert (
        "| sklearn_digits | 1,442 (train[:20%]) | 30 | 12.0 (2 networks in one program) |" in text
    )
    line = "| `digits` | `run \\| it` |  |  | not run here; one GPU. | 8.75 %. | not run here |"
    assert line in text


def test_runs_given_one_by_one_are_seeds_of_one_and_places_are_hidden(tmp_path):
    data = dataclasses.replace(digits.get_config().data, folder="/home/someone/photos")
    config = dataclasses.replace(digits.get_config(), data=data, weights="~/nets/a.npz")
    for seed in (0, 1):
        argv = [DIGITS, "--seed", str(seed), "--workdir", f"/home/someone/{seed}",
                "--data.folder", "/home/someone/photos", "--weights", "~/nets/a.npz"]  # fmt: skip
        leave_run(tmp_path / str(seed), config, argv, 0.5, seed)
    _, record = results.collect([tmp_path / "0", tmp_path / "1"])
    assert record["commands"] == [
        "python -m experiments.digits --seed S --data.folder DIR --weights PATH"
    ]
    assert [(run["variant"], run["seed"]) for run in record["runs"]] == [("", 0), ("", 1)]
    assert "someone" not in json.dumps(record)
    assert "nets" not in json.dumps(record)


def test_parameters_are_part_of_the_name_and_of_what_is_compared_with(tmp_path):
    argv = ["/x/experiments/cifar10_resnet.py", "--depth", "56"]
    leave_run(tmp_path / "w", cifar10_resnet.get_config(56), argv, 0.9)
    name, record = results.collect([tmp_path / "w"])
    assert name == "cifar10_resnet-depth56"
    assert record["changed_fields"] == []


def test_an_ablation_has_a_row_for_each_variant(ablation):
    name, record = results.collect([ablation])
    assert (name, record["missing_variants"]) == ("ablations.shortcuts", ["shortcut=C"])
    assert record["changed_fields"] == ["num_steps 7, not 64000"]
    text = table.render({name: record}, {name: TEXT})
    # Of 50 and 25 %: mean 37.5, deviation 25 / sqrt(2).
    assert "| `shortcut=A` | 2 | 37.50 ± 17.68 | 25.00 ± 0.00 | 0.2500 ± 0.0000 | 690 |" in text
    assert "| `shortcut=B` | 2 | 75.00 ± 0.00 | 25.00 ± 0.00 | 0.2500 ± 0.0000 | 690 |" in text
    assert "[below](#ablationsshortcuts) | without shortcut=C; num_steps 7, not 64000 |" in text


def test_gradients_are_collected_from_their_own_result(tmp_path):
    network = {"norm": "batch", "init": "x", "connection": "plain", "depth": 20,
               "kernel": {"first_over_last": 10.09},
               "output": {"first_over_last": 17.99}}  # fmt: skip
    settings = {"workdir": "/home/someone/w", "depths": [20], "seeds": 3, "batch_size": 32,
                "image_size": 32}  # fmt: skip
    hardware = {"device": "cpu", "devices": 1, "processor": "x", "cores": 2, "jax": "0.10.2"}
    result = {"settings": settings, "hardware": hardware, "networks": [network]}
    (tmp_path / "result.json").write_text(json.dumps(result))
    name, record = results.collect_networks(tmp_path)
    assert record["commands"] == ["python -m experiments.gradient_flow --depths 20"]
    assert record["changed_fields"] == ["depths 20, not 20 56 110"]
    assert "someone" not in json.dumps(record)
    text = table.render({name: record}, {name: TEXT})
    assert "| batch | plain | 20 | 1.8e+01 | 1.0e+01 | 3 |" in text


def test_bad_directories_are_refused_in_one_line(tmp_path, seeds, ablation):
    for directories, message in {
        (tmp_path / "absent",): "no finished run is in it",
        (seeds, ablation): r"ablations.shortcuts and digits: collect one",
        (seeds, seeds): "digits, seed 0: 2 runs of it",
    }.items():
        with pytest.raises(UserError, match=message):
            results.collect(directories)
    leave_run(tmp_path / "own", digits.get_config(), ["/x/mine.py"], 0.5)
    with pytest.raises(UserError, match=r"run by mine: expected one of python -m"):
        results.collect([tmp_path / "own"])
    (tmp_path / "own" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a run's record"):
        results.collect([tmp_path / "own"])


def test_the_command_writes_record_and_readme(tmp_path, seeds):
    output = tmp_path / "out"
    results.main([str(seeds), "--output", str(output), "--name", "digits-three"])
    record = json.loads((output / "results" / "digits-three.json").read_text())
    assert record == results.collect([seeds])[1]
    first = (output / "README.md").read_text()
    assert "`digits-three`" in first
    results.main(["--output", str(output)])
    assert (output / "README.md").read_text() == first


def test_a_docstrings_fields_end_where_they_should():
    text = "T\n\nClaim: a: b\nc.\n\nCommand: x --y\n    --z\nMore: --w\nHardware: h\nPublished: p"
    found = {label: table.field(text, label) for label in table.LABELS}
    assert found == {"Claim": "a: b c.", "Command": "x --y --z", "Hardware": "h", "Published": "p"}


def test_the_readme_is_what_the_records_and_docstrings_give_and_holds_nothing_private():
    records, texts = results.load_records(EXPERIMENTS / "results"), table.documents(EXPERIMENTS)
    assert (EXPERIMENTS / "README.md").read_text() == table.render(records, texts)
    for path in (EXPERIMENTS / "results").glob("*.json"):
        text = path.read_text()
        assert not re.search(r'"(/|~)|/(home|tmp|work|root)/', text), path
        assert json.loads(text)["module"] in texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--note", "n"], "give DIR as well"),
        (["{seeds}", "--name", "a/b"], "--name 'a/b': expected letters"),
    ],
)
def test_bad_flags_end_the_command_in_one_line(arguments, message, seeds, tmp_path, capsys):
    words = [word.format(seeds=seeds) for word in arguments]
    with pytest.raises(SystemExit) as stop:
        results.main([*words, "--output", str(tmp_path / "out")])
    assert_one_line_error((stop.value.code, *capsys.readouterr()), message)
    assert not (tmp_path / "out" / "README.md").exists()
