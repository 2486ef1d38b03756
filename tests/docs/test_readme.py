"""The README's commands parse, and what it names is there; test_docs runs its Python."""

import importlib
import pathlib
import re

import pytest

import flax_resnet
from flax_resnet import models
from flax_resnet.cli import app, experiment, flags
from flax_resnet.data.config import DataConfig
from flax_resnet.training import recipes

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def module(name):
    return importlib.import_module(f"experiments.{name}")


RUN = re.compile(r"python -m experiments\.([\w.]+)([^\n`|]*)")
RUNS = sorted(set(RUN.findall(README)))
COMMANDS = [run for run in RUNS if hasattr(module(run[0]), "get_config")]


def parse(name, arguments):
    argv = re.sub(r"\bS\b", "2", arguments).split()
    return experiment.chosen_by(module(name).get_config, f"runs/{name}", argv)


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_every_flag_in_the_readme_is_one(name, arguments):
    parse(name, arguments)


def test_every_network_in_the_readme_has_that_name():
    table = README.split("| names | what they are |")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", table)
    wanted = {name for name in named if not name.startswith("_") and name != "classes"}
    assert len(wanted) > 15
    assert wanted <= set(models.names())


TOOLS = re.findall(r"^flax-resnet (\w+) (.*)$", README, re.MULTILINE)
RECIPES = {"train": recipes.digits(), "finetune": recipes.finetuning(DataConfig(folder="x"), 5)}


def test_every_tool_in_the_readme_parses():
    wanted = {"train", "finetune", "predict", "report", "compare", "export", "push", "serve"}
    assert wanted <= {name for name, _ in TOOLS} <= app.TOOLS.keys()
    for name, arguments in TOOLS:
        if name in RECIPES:
            assert flags.parse(RECIPES[name], "runs/x", arguments.split()[1:])
        else:
            flags.cli(app.TOOLS[name].settings, arguments.split(), "", None)


def test_every_link_in_the_readme_is_to_a_file_that_is_there():
    links = re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tags_in_the_readme_are_some():
    tags = re.search(r"a tag such as (.*?) fetches", README, re.DOTALL)[1]
    assert re.findall(r'`"([\w/]+)"`', tags) == ["tv_v1", "keras", "timm/a1", "hf"]
    for tag in ("tv_v1", "keras", "hf"):  # any tag of timm is one
        assert tag in flax_resnet.tags("resnet50")
