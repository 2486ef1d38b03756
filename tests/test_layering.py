"""Imports go down the levels of the design, never up or sideways, and never to experiments."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "flax_resnet"
LEVELS = [
    {"errors", "exporting.loader"},
    {"cpu", "files", "seals", "preemption", "profiling", "programs", "datasets.resample"},
    {"clusters", "provenance", "storage", "watch"},
    {"meeting"},
    {"lifeline"},
    {"hosts"},
    {
        "guards",
        "record",
        "pretrained._h5_child",
        "pretrained.untrusted",
        "pretrained.classes",
        "datasets.jpeg",
    },
    {
        "layers",
        "distributed",
        "figures.canvas",
        "regularize",
        "randaugment",
        "cutting",
        "views",
        "tables",
        "licenses",
        "markdown",
        "datasets.decode",
    },
    {"shelf", "tracking.base", "tracking.events"},
    {"tracking.follower"},
    {"tracking.to_mlflow", "tracking.to_wandb"},
    {"tracking"},
    {"metrics"},
    {"checkpoint", "figures.runs", "figures.studies", "figures.pictures"},
    {"figures"},
    {"schedules", "transforms"},
    {"augment", "optim", "models.blocks", "models.mini", "models.speed", "models.dropblock_resnet"},
    {"models.resnet", "datasets.sources"},
    {"models.highway", "models.surgery", "preprocess", "datasets.rows"},
    {"models.zoo", "datasets.stream"},
    {"models", "datasets.prepare", "datasets.sklearn_digits", "datasets"},
    {"data", "summary"},
    {"pretrained.published", "pretrained.hdf5", "pretrained.stored_zip"},
    {"pretrained.download", "pretrained.torch_pickle"},
    {"pretrained.fetch", "pretrained.hub", "pretrained.torch_archive"},
    {"pretrained.tensors", "pretrained.torch_names", "pretrained.keras_names"},
    {"pretrained.weights"},
    {"pretrained.load"},
    {"pretrained"},
    {"step"},
    {"dispatch", "transfer"},
    {"config"},
    {"run", "flags", "grids", "recipes"},
    {"resume"},
    {"setup"},
    {"analysis", "restart"},
    {"train"},
    {"together"},
    {"sweeps"},
    {"classify"},
    {"card"},
    {"hub"},
    {"convert", "predict", "evaluate"},
    {"exporting.source"},
    {"exporting.stablehlo", "exporting.to_onnx", "exporting.to_torch"},
    {"exporting.write"},
    {"exporting", "exporting.command"},
    {"inspection.opened", "inspection.layers", "inspection.embed", "inspection.lr_finder"},
    {"inspection.predictions", "inspection.samples", "inspection.studies"},
    {"inspection.parts"},
    {"inspection"},
    {"report", "compare", "compilation", "serving.answers", "push", "pull"},
    {"serving.page"},
    {"serving"},
    {"main", "doctor", "serve"},
    {"command"},
    {"__main__", ""},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# A builder is asked for by name, at run time, by the module that builds sets.
ALLOWED = {("datasets.prepare", "datasets.sklearn_digits")}


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


def test_every_module_has_a_level():
    modules = {module_name(p) for p in PACKAGE.rglob("*.py")}
    assert modules == set(LEVEL)


def test_imports_go_down():
    found = list(edges())
    assert len(found) > 40
    up = [(a, b) for a, b in found if LEVEL[a] <= LEVEL[b] and (a, b) not in ALLOWED]
    assert up == []


def test_only_the_top_sees_the_whole_config():
    assert {a for a, b in edges() if b == "config"} == {
        "",
        "run",
        "resume",
        "setup",
        "analysis",
        "restart",
        "train",
        "together",
        "grids",
        "sweeps",
        "flags",
        "main",
        "recipes",
        "command",
    }


def test_modules_are_short():
    lengths = {str(p): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {p: n for p, n in lengths.items() if n > 400} == {}
