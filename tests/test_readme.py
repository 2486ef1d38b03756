"""The README's commands and Python run as written."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import flax_resnet
from flax_resnet import command, flags, main, models, recipes
from flax_resnet.data import DataConfig

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def module(name):
    return importlib.import_module(f"experiments.{name}")


PAGES = "".join(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))
RUN = re.compile(r"python -m experiments\.([\w.]+)([^\n`|]*)")
RUNS = sorted({*RUN.findall(README), *RUN.findall(PAGES)})
COMMANDS = [run for run in RUNS if hasattr(module(run[0]), "get_config")]
ABLATIONS = [run for run in RUNS if hasattr(module(run[0]), "get_grid")]
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def parse(name, arguments):
    argv = re.sub(r"\bS\b", "2", arguments).split()
    return main.chosen_by(module(name).get_config, f"runs/{name}", argv)


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_every_flag_in_the_readme_is_one(name, arguments):
    parse(name, arguments)


@pytest.mark.parametrize(("name", "arguments"), ABLATIONS)
def test_every_flag_of_an_ablation_is_one(name, arguments):
    own = module(name)
    asked = main.chosen_by(own.get_base, "runs", arguments.split(), flags.SweepInvocation)
    assert own.get_grid(asked.config, asked.seeds)


def test_commands_followed_in_order_do_not_meet_another_configs_workdir():
    configs = {}
    for name, arguments in RUN.findall(README):
        if not hasattr(module(name), "get_config"):
            continue
        chosen = parse(name, arguments)
        assert configs.setdefault(chosen.workdir, chosen.config) == chosen.config
    for name, arguments in TOOLS:
        if name in RECIPES:
            default = f"runs/{arguments.split()[0]}{'' if name == 'train' else '-' + name}"
            chosen = asked(name, arguments, default)
            assert configs.setdefault(chosen.workdir, chosen.config) == chosen.config
    assert len(configs) >= 5


def test_there_are_two_commands_that_install_and_run():
    installs = re.findall(r"^pip install .*", README, re.MULTILINE)
    assert installs == [
        "pip install -e . && python -m experiments.digits",
        "pip install -e '.[test]' && python -m pytest -n auto",
    ]


def test_every_module_that_is_run_is_there():
    for name, _ in RUNS:
        assert (ROOT / "experiments" / f"{name.replace('.', '/')}.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("code", BLOCKS)
def test_the_python_runs(code, tmp_path, digits_dir, clean_environment):
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    environment = clean_environment | quick | {"TFDS_DATA_DIR": digits_dir}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "sweep(" in code:
        assert "| residual=True | 2 | " in done.stdout
    if "train_and_evaluate(" in code:
        assert 0 < float(done.stdout.splitlines()[-1]) <= 1
        assert (tmp_path / "runs" / "python" / "result.json").exists()


def test_every_network_in_the_readme_has_that_name():
    table = README.split("| names | what they are |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", table)
    wanted = {name for name in named if not name.startswith("_") and name != "classes"}
    assert len(wanted) > 15
    assert wanted <= set(models.names())


TOOLS = re.findall(r"^flax-resnet (\w+) (.*)$", README, re.MULTILINE)
RECIPES = {"train": recipes.digits(), "finetune": recipes.finetuning(DataConfig(folder="x"), 5)}


def asked(name, arguments, workdir="runs/x"):
    """What a line of the README asks of ``train`` or ``finetune``."""
    return flags.parse(RECIPES[name], workdir, arguments.split()[1:])


def test_fine_tuning_as_the_readme_says_leaves_batch_norm_as_it_was():
    runs = [asked(name, arguments).config for name, arguments in TOOLS if name == "finetune"]
    assert len(runs) >= 2
    assert {run.model.norm_kind for run in runs} == {"frozen"}


def test_every_tool_in_the_readme_parses():
    wanted = {"train", "finetune", "predict", "report", "compare", "export", "push", "serve"}
    assert wanted <= {name for name, _ in TOOLS} <= command.TOOLS.keys()
    for name, arguments in TOOLS:
        if name in RECIPES:
            assert asked(name, arguments)
        else:
            flags.cli(command.TOOLS[name].settings, arguments.split(), "", None)


def test_every_link_in_the_readme_is_to_a_file_that_is_there():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tags_in_the_readme_are_some():
    tags = re.search(r"a tag such as (.*?) fetches", README, re.DOTALL)[1]
    assert re.findall(r'`"([\w/]+)"`', tags) == ["tv_v1", "keras", "timm/a1", "hf"]
    for name, tag in [("resnet50", "tv_v1"), ("resnet50", "tv_v2"), ("ResNet152", "keras"),
                      ("resnet50", "keras"), ("resnet50d", "timm/a1"),
                      ("resnet152", "hf")]:  # fmt: skip
        assert tag in flax_resnet.tags(name)
    assert flax_resnet.preprocessing("resnet50", "tv_v1").resize == 256
    assert flax_resnet.preprocessing("resnet50", "tv_v2").resize == 232
