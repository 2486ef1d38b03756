"""What the repository says of itself agrees with itself.

``python tests/test_packaging.py > tests/public_api.txt`` writes the list of what is public.
"""

import ast
import inspect
import os
import pathlib
import pydoc
import re
import subprocess
import sys
import tomllib

import pytest
from flax import linen as nn

import flax_resnet

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_gpu_requirements_are_the_core_ones_with_cuda():
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    core = [d.replace("jax>=", "jax[cuda13]>=") for d in PROJECT["dependencies"]]
    assert wanted == core


def test_a_directory_of_the_packages_name_does_not_hide_it(tmp_path):
    """As a script finds one that lies beside a checkout, of an editable install."""
    (tmp_path / "flax_resnet").mkdir()
    code = "import flax_resnet; print(flax_resnet.load.__name__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "load\n", done.stderr


def test_extras_are_there():
    extras = {"test", "parity", "prepare", "onnx", "remote", "hub", "mlflow", "wandb", "serve"}
    extras |= {"docs"}
    assert set(PROJECT["optional-dependencies"]) == extras


def test_public_names_are_documented_and_nothing_else_is_there():
    tree = ast.parse((ROOT / "flax_resnet" / "__init__.py").read_text())
    names = [a.asname for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert len(names) == len(set(names)) >= 25
    assert all(getattr(flax_resnet, name).__doc__ for name in names)
    others = [n for n in tree.body if not isinstance(n, (ast.ImportFrom, ast.Expr))]
    assert [ast.unparse(n) for n in others] == [f"__version__ = '{PROJECT['version']}'"]


def test_help_has_a_line_for_each_public_name():
    text = pydoc.plain(pydoc.render_doc(flax_resnet)).split("PACKAGE CONTENTS")[0]
    words = re.findall(r"(?m)^      (\w[\w, ]*?)(?:  |$)", text)
    listed = sorted(name for word in words for name in word.split(", "))
    assert listed == sorted(line.split("(")[0] for line in public())


def public():
    """A line for each public name, with its parameters: "name=" for those with a default."""
    tree = ast.parse((ROOT / "flax_resnet" / "__init__.py").read_text())
    names = [a.asname for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    for name in sorted(names):
        what = getattr(flax_resnet, name)
        if inspect.ismodule(what):
            yield name
            continue
        flaxs = ("parent", "name") if isinstance(what, type) and issubclass(what, nn.Module) else ()
        try:
            parameters = inspect.signature(what).parameters.values()
        except ValueError:  # an exception's, of C
            parameters = ()
        shown, bare = [], False
        for p in parameters:
            if p.name in flaxs:
                continue
            if p.kind is p.KEYWORD_ONLY and not bare:
                shown, bare = [*shown, "*"], True
            stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
            shown.append(f"{stars}{p.name}{'' if p.default is p.empty else '='}")
        yield f"{name}({', '.join(shown)})"


def test_the_public_names_and_their_parameters():
    """A change here is one for whoever uses the library: CHANGELOG.md says so."""
    there = (ROOT / "tests" / "public_api.txt").read_text().splitlines()
    assert list(public()) == there


def test_the_changelog_has_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {PROJECT['version']}" in changes


CONSUMER = """
from typing import assert_type
import jax
import flax_resnet
from flax import linen as nn

state: flax_resnet.TrainState
module, variables = flax_resnet.load("resnet20", num_classes=5)
assert_type(module, nn.Module)
config = flax_resnet.TrainConfig(batch_size=64)
assert_type(config.num_epochs, float)
assert_type(flax_resnet.names(), tuple[str, ...])
assert_type(flax_resnet.cifar_resnet(20), flax_resnet.ResNet)
flax_resnet.TrainConfig(batch_size="64")  # an error
"""


@pytest.mark.slow
def test_types_reach_whoever_uses_the_library(tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "--config-file=", "consumer.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    wrong = [line for line in done.stdout.splitlines() if "consumer.py" in line and "error" in line]
    assert len(wrong) == 1, done.stdout
    assert f':{CONSUMER.count(chr(10))}: error: Argument "batch_size"' in wrong[0]


if __name__ == "__main__":
    print(*public(), sep="\n")
