"""The results table: records of finished runs, and experiments/README.md written from them.

python -m experiments.results DIR... takes the figures of all finished runs in the directories, one
experiment's, into a record, experiments/results/NAME.json, and writes README.md anew from all
records and the experiments' docstrings. Without DIR it only does the latter. A record says what was
run, on what, over all starts of each run, how that differs from the experiment as it stands, and
which seeds are not finished; it holds nothing of the machine's directories.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import gradient_flow, table
from experiments.found import FINISHED, FoundRun, find_runs, pairs, unfinished
from flax_resnet import flags
from flax_resnet.config import TrainConfig, free_fields, write_json
from flax_resnet.errors import UserError
from flax_resnet.files import replacing
from flax_resnet.main import one_line_errors
from flax_resnet.record import flatten, to_record, varying_fields

HERE = Path(__file__).parent
KEPT = ("step", "epochs", "num_train", "num_eval", "top1", "loss", "train_top1", "train_loss",
        "seconds")  # fmt: skip
KEPT_WHERE_IT_IS = ("together",)  # networks that trained in one program
PLACES = {"--data.data-dir": "DIR", "--data.folder": "DIR"}
"""Flags whose values are places, and what a record says in their stead."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is collected."""

    workdirs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="DIR...")] = ()
    """Working directories of one experiment: of runs, of their seeds, or of a sweep."""
    name: str | None = None
    """Of the record; by default the experiment's, with the parameters that were given."""
    note: str = ""
    """What a reader must know of these runs, such as why they were cut short."""
    data_note: str | None = None
    """What to call the data, where it is not quite what its name says."""
    output: str = str(HERE)
    """Directory that gets results/NAME.json and README.md."""


def collect(
    workdirs: Sequence[Path], note: str = "", data_note: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The record of one experiment's finished runs.

    Args:
      workdirs: where they are.
      note: goes into the record.
      data_note: the data's name in the record.

    Returns:
      (the record's name by default, the record).

    Raises:
      UserError: no finished run, runs of several experiments, a run that is there twice.
    """
    everything = [found for workdir in workdirs for found in find_runs(workdir)]
    runs: list[dict[str, Any]] = []
    starts: list[Mapping[str, Any]] = []
    modules, titles, changed = {}, set(), set()
    for run in everything:
        if run.state != FINISHED:
            continue
        for start in run.starts:
            module, parameters = _module_of(run.path, start["argv"])
            modules[_name(module, parameters)] = (module, parameters)
        flat = flatten(run.config)
        runs.append(_figures(run, flat["data.train_split"]))
        starts += run.starts
        titles.add(_public(flat["data.folder"] or flat["data.name"]))
        expected = _expected(module, parameters, run.variant)
        changed.update([] if expected is None else _differences(flat, expected))
    if len(modules) > 1:
        raise UserError(
            f"runs of {' and '.join(sorted(modules))}: collect one experiment at a time"
        )
    (name, (module, parameters)) = next(iter(modules.items()))
    for (variant, seed), times in Counter((r["variant"], r["seed"]) for r in runs).items():
        if times > 1:
            raise UserError(f"{variant or name}, seed {seed}: {times} runs of it; give each once")
    runs.sort(key=lambda run: (run["variant"], run["seed"]))
    return name, {
        "module": module,
        "commands": _commands(module, [start["argv"] for start in starts]),
        "date": max(start["time"] for start in starts)[:10],
        **_source(starts),
        "hardware": sorted({_hardware(start) for start in starts}),
        "data": data_note or " and ".join(sorted(titles)),
        "changed_fields": sorted(changed),
        "missing_variants": _missing(module, {run["variant"] for run in runs}),
        "unfinished": unfinished(everything),
        "note": note,
        "runs": runs,
    }


def collect_networks(workdir: Path, note: str = "") -> tuple[str, dict[str, Any]]:
    """The record of experiments.gradient_flow, which trains nothing: (its name, it)."""
    result = json.loads((workdir / "result.json").read_text())
    given, hardware = result["settings"], result["hardware"]
    usual = json.loads(json.dumps(dataclasses.asdict(gradient_flow.Settings())))
    about = ("norm", "connection", "depth")
    networks = [
        {
            **{name: network[name] for name in about},
            **{q: network[q]["first_over_last"] for q in gradient_flow.QUANTITIES},
            "n": given["seeds"],
        }
        for network in result["networks"]
    ]
    changed = {name: value for name, value in given.items() if value != usual[name]}
    changed.pop("workdir", None)
    words = [f"--{n.replace('_', '-')} {_plain(value)}" for n, value in changed.items()]
    return "gradient_flow", {
        "module": "gradient_flow",
        "commands": [" ".join(["python -m experiments.gradient_flow", *words])],
        "date": "",
        "commits": [],
        "uncommitted_changes": False,
        "versions": {"jax": hardware["jax"]},
        "hardware": [f"{hardware['cores']}-core CPU"]
        if hardware["device"] == "cpu"
        else [f"{hardware['devices']} x {hardware['device']}"],
        "data": "sklearn_digits",
        "changed_fields": [f"{n} {_plain(v)}, not {_plain(usual[n])}" for n, v in changed.items()],
        "missing_variants": [],
        "unfinished": [],
        "note": note,
        "networks": networks,
    }


def _figures(run: FoundRun, train_split: str) -> dict[str, Any]:
    """What a record keeps of a finished run; the split where it is a part of one."""
    kept = {name: run.result[name] for name in KEPT}
    kept |= {name: run.result[name] for name in KEPT_WHERE_IT_IS if name in run.result}
    part = {"train_split": train_split} if "[" in train_split else {}
    return {"variant": run.variant, "seed": run.seed, **kept, **part}


def _module_of(path: Path, argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(name within experiments, parameters of its get_config on the command line) of a run."""
    parts = Path(argv[0]).with_suffix("").parts
    if "experiments" not in parts[:-1]:
        raise UserError(f"{path}: run by {parts[-1]}: expected one of python -m experiments.NAME")
    last = len(parts) - 1 - parts[::-1].index("experiments")
    module = ".".join(parts[last + 1 :])
    found = importlib.import_module(f"experiments.{module}")
    make = getattr(found, "get_config", None) or getattr(found, "get_base", None)
    given = flags.arguments(make, argv[1:])[0] if make else {}
    defaults = inspect.signature(make).parameters if make else {}
    return module, {n: v for n, v in given.items() if v != defaults[n].default}


def _name(module: str, parameters: Mapping[str, Any]) -> str:
    return "-".join([module, *(f"{name}{value}" for name, value in parameters.items())])


def _public(value: Any) -> Any:
    """A value without a place on this machine."""
    place = isinstance(value, str) and re.match(r"~|\.{0,2}/", value)
    return "PATH" if place else value


def _commands(module: str, argvs: Sequence[Sequence[str]]) -> list[str]:
    """The command lines, each once: without workdirs, places named, seeds of several as S."""
    several = len({dict(pairs(argv[1:])).get("--seed") for argv in argvs}) > 1
    found = []
    for argv in argvs:
        words = ["python", "-m", f"experiments.{module}"]
        for flag, value in pairs(argv[1:]):
            if flag == "--workdir":
                continue
            values = [] if value is None else value.split(" ")
            if flag in PLACES:
                values = [PLACES[flag]]
            elif flag == "--seed" and several:
                values = ["S"]
            words += [flag, *(_public(v) for v in values)]
        found.append(shlex.join(words))
    return sorted(set(found))


def _source(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The commits, whether the checkout was changed, and versions of what computes."""
    states = [start["git"] or {"commit": "unknown", "changed": False} for start in starts]
    packages = {name: {start["packages"][name] for start in starts} for name in ("jax", "flax")}
    return {
        "commits": sorted({state["commit"][:12] for state in states}),
        "uncommitted_changes": any(state["changed"] for state in states),
        "versions": {name: " and ".join(sorted(found)) for name, found in packages.items()},
    }


def _hardware(start: Mapping[str, Any]) -> str:
    cores = f"{start['cpu_cores']}-core CPU"
    if start["platform"] == "cpu":
        return cores
    devices = [f"{n} x {kind}" for kind, n in Counter(start["devices"]).items()]
    return f"{' and '.join(devices)}, {cores}"


def _expected(module: str, parameters: Mapping[str, Any], variant: str) -> TrainConfig | None:
    """What the experiment says of a variant; None where it says nothing."""
    found = importlib.import_module(f"experiments.{module}")
    if hasattr(found, "get_grid"):
        return _grid(found, parameters).get(f"{variant}/seed0")
    return found.get_config(**parameters) if hasattr(found, "get_config") else None


def _missing(module: str, variants: set[str]) -> list[str]:
    """Variants of an ablation that were not run."""
    found = importlib.import_module(f"experiments.{module}")
    if not hasattr(found, "get_grid"):
        return []
    wanted = {name.rpartition("/")[0] for name in _grid(found, {})}
    return sorted(wanted - variants)


def _grid(module: Any, parameters: Mapping[str, Any]) -> Mapping[str, TrainConfig]:
    """Every variant of an ablation as it stands, of one seed."""
    if not hasattr(module, "get_base"):
        raise UserError(f"{module.__name__} has no get_base, which its runs are compared with")
    return module.get_grid(module.get_base(**parameters), 1)


def _differences(here: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Fields of a run that differ from the experiment's; one that a record lacks is newer."""
    recipe, free = flatten(to_record(config)), free_fields(config) | {"seed"}
    return [
        f"{name} {_plain(here[name])}, not {_plain(recipe[name])}"
        for name in sorted(varying_fields([here, recipe]))
        if name in here.keys() & recipe.keys() - free
    ]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(_public(value))


def load_records(directory: Path) -> dict[str, dict[str, Any]]:
    """{name: record} of all records in a directory."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> None:
    """Collects, where directories are given, and writes the README."""
    with one_line_errors():
        settings = flags.cli(Settings, argv, __doc__ or "", "python -m experiments.results")
        output = Path(settings.output)
        records = output / "results"
        if settings.workdirs:
            workdirs = [Path(workdir) for workdir in settings.workdirs]
            trains = any(workdirs[0].rglob("config.json")) or len(workdirs) > 1
            name, record = (
                collect(workdirs, settings.note, settings.data_note)
                if trains or not (workdirs[0] / "result.json").exists()
                else collect_networks(workdirs[0], settings.note)
            )
            name = settings.name or name
            if not re.fullmatch(r"[\w.,=+-]+", name):
                raise UserError(f"--name {name!r}: expected letters, digits and any of . , = + -")
            records.mkdir(parents=True, exist_ok=True)
            write_json(records / f"{name}.json", record)
            print(records / f"{name}.json")
        elif settings.name or settings.note or settings.data_note:
            raise UserError("--name, --note and --data-note are of a record: give DIR as well")
        text = table.render(load_records(records), table.documents(HERE))
        with replacing(output / "README.md") as partial:
            partial.write_text(text)
        print(output / "README.md")


if __name__ == "__main__":
    main()
