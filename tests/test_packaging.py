"""What the repository says of itself agrees with itself."""

import ast
import pathlib
import tomllib

import flax_resnet

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_gpu_requirements_are_the_core_ones_with_cuda():
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    core = [d.replace("jax>=", "jax[cuda13]>=") for d in PROJECT["dependencies"]]
    assert wanted == core


def test_extras_are_there():
    extras = {"test", "parity", "prepare", "export", "remote", "hub", "mlflow", "wandb", "serve"}
    extras |= {"docs", "browser"}
    assert set(PROJECT["optional-dependencies"]) == extras


def test_version_is_the_packages():
    assert flax_resnet.__version__ == PROJECT["version"]


def test_public_names_are_documented_and_nothing_else_is_there():
    tree = ast.parse((ROOT / "flax_resnet" / "__init__.py").read_text())
    names = [a.asname for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]
    assert len(names) == len(set(names)) >= 25
    assert all(getattr(flax_resnet, name).__doc__ for name in names)
    others = [n for n in tree.body if not isinstance(n, (ast.ImportFrom, ast.Expr))]
    assert [ast.unparse(n) for n in others] == [f"__version__ = '{PROJECT['version']}'"]


def test_every_test_module_names_what_it_tests():
    modules = {p.stem for p in (ROOT / "flax_resnet").glob("*.py")} | {"models", "datasets"}
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    assert modules - tested - {"__init__", "__main__"} == set()
