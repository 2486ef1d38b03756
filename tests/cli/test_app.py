"""``flax-resnet COMMAND``: what it trains, what it says."""

import json
import re
import shlex
import subprocess

import numpy as np
import pytest
from helpers import assert_one_line_error
from PIL import Image

import flax_resnet
from flax_resnet.cli import app, flags, train
from flax_resnet.data.config import DataConfig
from flax_resnet.training import recipes

TINY = ("--model.stage-sizes", "1", "--model.num-filters", "8", "--num-steps", "2",
        "--batch-size", "8", "--eval-batch-size", "8")  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch, digits_dir):
    """A directory of its own, with the digits prepared elsewhere."""
    monkeypatch.chdir(tmp_path)
    from tensorflow_datasets.core import constants

    monkeypatch.setattr(constants, "DATA_DIR", digits_dir)
    return tmp_path


def test_the_overview_has_every_command(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    for name, tool in app.TOOLS.items():
        assert f"  {name} " in out
        assert tool.what in out
    assert call() == (0, out, "")
    assert call("--version") == (0, f"flax_resnet {flax_resnet.__version__}\n", "")


@pytest.mark.parametrize("name", app.TOOLS)
def test_what_help_shows_as_examples_parses(name, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    text = out.split("Examples:")[1].split("╭")[0].replace("\\\n", " ")
    lines = [re.split(r"\||>|&&", line)[0].rstrip(' )"') for line in text.splitlines()]
    found = [
        line.split(f"flax-resnet {name}", 1)[1] for line in lines if f"flax-resnet {name}" in line
    ]
    assert found
    for example in found:
        argv = shlex.split(example)
        if name in train.MAKES:
            config = recipes.finetuning(DataConfig(), 5) if name == "finetune" else recipes.digits()
            assert flags.parse(config, "w", argv[1:]).config
        else:
            assert flags.cli(app.TOOLS[name].settings, argv, "", None)


def test_training_the_digits_and_predicting(call, here, rng):
    code, out, err = call("train", "digits", *TINY)
    assert code == 0, err
    workdir = here / "runs" / "digits"
    assert out.endswith("--weights runs/digits (its best checkpoint, of step 2)\n")
    result = json.loads((workdir / "result.json").read_text())
    assert result["num_eval"] == 355
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(here / "eight.png")
    code, out, err = call("predict", "eight.png", "--weights", "runs/digits", "--format", "json")
    assert code == 0, err
    found = json.loads(out)
    assert sorted(found["names"]) == sorted(set(found["names"]))
    assert sum(found["probabilities"]) <= 1 + 1e-6
    code, out, _ = call("train", "digits", *TINY)
    assert code == 0
    assert "is finished: 2 steps" in out
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        (["train"], 'expected what to train on first: "digits", a tfds name, or a folder'),
        (["train", "--batch-size", "8"], "train --batch-size: expected what to train on first"),
        (["train", "digits", "--optimzer", "adamw"], "(did you mean --optimizer?)"),
        (["train", "cifar1o"], "unknown dataset 'cifar1o' (did you mean 'cifar10'?)"),
        (["train", "cifar100", "--data.data-dir", "x"], "prepare cifar100 --data-dir x"),
        (["train", "digits", "--workdir", "/proc/x"], "--workdir /proc/x cannot be written"),
        (["train", "digits", "--workdir", "/dev/null/w"], "--workdir /dev/null/w cannot be"),
        (["summary", "resnet5o"], "did you mean 'resnet56'?"),
        (["prepare", "sklearn_digitz"], "unknown dataset 'sklearn_digitz' (did you mean 'sklearn_"),
        (["prepare", "sklearn_digits", "--data-dir", "/proc/x"], "give a directory that can be"),
    ],
)
def test_bad_input_is_one_line(call, here, arguments, message):
    assert_one_line_error(call(*arguments), message)
    assert list(here.iterdir()) == []


def test_prepare_prints_where_the_set_is(call, digits_dir):
    where = f"{digits_dir}/sklearn_digits/1.0.0\n"
    assert call("prepare", "sklearn_digits", "--data-dir", digits_dir)[:2] == (0, where)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digits", "--data.data-dir"], ["Missing value", "--data.data-dir"]),
        (["summary"], ["NAME"]),
        (["completion", "tcsh"], ["tcsh", "bash"]),
        (["push", "net", "me/new"], ["--license"]),
        (["names", "--weight"], ["--weights"]),
    ],
)
def test_tyro_says_what_is_wrong_with_a_flag(call, here, arguments, words):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    for word in words:
        assert word in err
    assert list(here.iterdir()) == []


def test_flags_that_decide_the_first_config_are_read_before_the_others(call, here, monkeypatch):
    asked = []

    def recipe(data, given, **options):
        asked.append(given)
        return recipes.digits()

    monkeypatch.setitem(train.MAKES, "train", ("", recipe))
    monkeypatch.setattr(app, "start", lambda *chosen, **options: None)
    words = ("--data.data_dir=a", "--num-steps", "2", "--weights", "w", "--model", "resnet20")
    assert call("train", "digits", *words) == (0, "", "")
    assert asked == [recipes.Given("a", "w", "resnet20", num_steps=2)]


def test_bash_completes_commands_flags_and_choices(call, tmp_path):
    (tmp_path / "script").write_text(call("completion", "bash")[1])

    def proposed(*words):
        code = f"""source {tmp_path}/script
COMP_WORDS=(flax-resnet {shlex.join(words)}); COMP_CWORD={len(words)}
_tyro_flax_resnet
printf '%s\\n' ${{#COMPREPLY[@]}} ${{COMPREPLY[@]}}"""
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        count, *found = done.stdout.splitlines()
        assert int(count) == len(found)
        return set(found)

    assert proposed("") == {*app.TOOLS, "-h", "--help"}
    assert proposed("pred") == {"predict"}
    flags_of = proposed("train", "digits", "--optimizer.")
    assert {"--optimizer.momentum", "--optimizer.stage-decay"} <= flags_of
    assert all(flag.startswith("--optimizer.") and " " not in flag for flag in flags_of)
    assert proposed("predict", "--format", "") == {"text", "json", "csv"}
    assert proposed("train", "digits", "--sharding", "z") == {"zero"}
    assert proposed("predict", "READ") == set()  # where bash looks for files


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script(call, shell):
    code, out, _ = call("completion", shell)
    assert code == 0
    assert "COMPLETION_SPEC" in out
