"""Imports never go in a circle, and never to experiments; few modules see the whole config."""

import ast
import graphlib
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "flax_resnet"
# A builder is asked for by name, at run time, by the module that builds sets.
ALLOWED = {("data.preparation", "data.sklearn_digits")}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def imports(path):
    """Names of this library's modules that a file imports, wherever in it."""
    modules = {module_name(p) for p in PACKAGE.rglob("*.py")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            assert name.split(".")[0] != "experiments", f"{path} imports {name}"
            if name == "flax_resnet" and path.name != "__init__.py":
                assert isinstance(node, ast.ImportFrom), f"{path}: import flax_resnet"
                public = {alias.name for alias in node.names} - modules
                assert not public, f"{path} imports {public} from the top"
            inner = name.removeprefix("flax_resnet").removeprefix(".")
            # from package.module import x is no import of the package's own names.
            parent = isinstance(node, ast.ImportFrom) and name == node.module
            deeper = parent and any(f"{inner}.{alias.name}" in modules for alias in node.names)
            if name.startswith("flax_resnet.") and inner in modules and not deeper:
                yield inner


def edges():
    for path in sorted(PACKAGE.rglob("*.py")):
        for imported in imports(path):
            yield module_name(path), imported


def test_imports_never_go_in_a_circle():
    needs = {}
    for a, b in edges():
        if (a, b) not in ALLOWED:
            needs.setdefault(a, set()).add(b)
    assert sum(map(len, needs.values())) > 200
    graphlib.TopologicalSorter(needs).prepare()  # a circle raises CycleError, which names it


def test_modules_are_short():
    lengths = {str(p): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {p: n for p, n in lengths.items() if n > 400} == {}
