"""Imports go one way between the packages, never to experiments; files and packages are small."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "flax_resnet"
# A line may import only lines above it; packages on one line do not import each other.
ORDER = """
errors
records
optim  xla  distributed  figures  tracking
models  data  checkpoints
weights
training
inference  studies
inspection  exporting
serving
cli
"""
FLOOR = {name: i for i, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
# What published model cards import; they forward to the packages.
FORWARDERS = {"pretrained", "predict"}
# The builder of a set is asked for by name, when a set is built.
ALLOWED = {("flax_resnet.data.preparation", "flax_resnet.data.sklearn_digits")}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path):
    """The modules of this library that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = {name if name in FILES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        for name in names:
            assert name.split(".")[0] != "experiments", f"{path} imports {name}"
            if name.split(".")[0] == "flax_resnet":
                yield name


ARROWS = {(a, b) for a, path in FILES.items() for b in imported(path)}


def package_of(module):
    return module.split(".")[1]


def test_packages_import_those_before_them():
    inner = {n for n in FILES if n.count(".") and package_of(n) not in {"__main__", *FORWARDERS}}
    assert {package_of(name) for name in inner} == set(FLOOR)
    arrows = {(a, b) for a, b in ARROWS if a in inner}
    assert not [(a, b) for a, b in arrows if b == "flax_resnet"]  # the top is for users
    between = {(a, b) for a, b in arrows if package_of(a) != package_of(b)}
    assert not [(a, b) for a, b in between if FLOOR[package_of(a)] <= FLOOR[package_of(b)]]
    assert len({(package_of(a), package_of(b)) for a, b in between}) > 50


def test_imports_never_go_in_a_circle():
    needs = {}
    for a, b in ARROWS - ALLOWED:
        needs.setdefault(a, set()).add(b)
    graphlib.TopologicalSorter(needs).prepare()  # a circle raises CycleError, which names it


def test_the_readme_draws_this_order():
    drawing = (ROOT / "README.md").read_text().split("How it is built")[1].split("```")[1]
    drawn = [line.split("  ") for line in drawing.strip().splitlines()[1:]]
    names = [[w for w in map(str.strip, line) if w in FLOOR] for line in drawn]
    assert [line for line in names if line] == [line.split() for line in ORDER.split("\n") if line]


def test_files_and_packages_are_small():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name: n for name, n in lengths.items() if n > 350} == {}
    folders = [path.parent for path in FILES.values() if path.parent != PACKAGE]
    assert {f.name: folders.count(f) for f in folders if folders.count(f) > 15} == {}
