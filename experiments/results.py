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
from flax_resnet import flags
from flax_resnet.config import TrainConfig, free_fields, write_json
from flax_resnet.errors import UserError
from flax_resnet.files import replacing
from flax_resnet.main import one_line_errors
from flax_resnet.record import flatten, to_record, varying_fields

HERE = Path(__file__).parent
KEPT = ("step", "epochs", "num_train", "num_eval", "top1", "loss", "train_top1", "train_loss",
        "seconds", "together")  # fmt: skip
"""Fields of result.json that a record keeps; "together" where several networks trained at once."""
PLACES = {"--data.data-dir": "DIR", "--data.folder": "DIR"}
"""Flags whose values are places, and what a record says in their stead."""
Run = dict[str, Any]
"""A run: "variant" (its path below the directory), "seed", "path", "config", "starts", "result"."""


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


def find_runs(workdir: Path) -> tuple[list[Run], list[str]]:
    """(the finished runs below a directory, a line for each that is not finished).

    Raises:
      UserError: none of them is finished, or a record cannot be read.
    """
    finished: list[Run] = []
    states: dict[tuple[str, int], str] = {}
    for failure in workdir.rglob("failures/*-seed*.txt"):  # a sweep's, begun or not
        variant, _, seed = failure.stem.rpartition("-seed")
        name = (failure.parent.parent / variant).relative_to(workdir).as_posix()
        states[name, int(seed)] = "failed"
    for path in sorted(path.parent for path in workdir.rglob("config.json")):
        parts = path.relative_to(workdir).parts
        seeded = bool(parts) and re.fullmatch(r"seed\d+", parts[-1])
        variant, result = "/".join(parts[:-1] if seeded else parts), path / "result.json"
        try:
            record = json.loads((path / "config.json").read_text())
            run = {"variant": variant, "seed": record["config"]["seed"], "path": path, **record}
            run["starts"][-1]["argv"][0]
            if not result.exists():
                states.setdefault((variant, run["seed"]), "not finished")
                continue
            states.pop((variant, run["seed"]), None)
            finished.append({**run, "result": json.loads(result.read_text())})
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path}: not a run's record ({error!r}): leave it out") from error
    if not finished:
        raise UserError(
            f"{workdir}: no finished run is in it (result.json beside config.json): name the "
            "workdir of a run, of its seeds or of a sweep"
        )
    return finished, [
        f"seed {seed}{f' of {variant}' if variant else ''} {state}"
        for (variant, seed), state in sorted(states.items())
    ]


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
    found = [find_runs(workdir) for workdir in workdirs]
    runs = sorted(
        (run for finished, _ in found for run in finished),
        key=lambda run: (run["variant"], run["seed"]),
    )
    starts = [start for run in runs for start in run["starts"]]
    commands = [_module_of(run["path"], s["argv"]) for run in runs for s in run["starts"]]
    modules = {
        "-".join([module, *(f"{n}{v}" for n, v in given.items())]): (module, given)
        for module, given in commands
    }
    if len(modules) > 1:
        raise UserError(
            f"runs of {' and '.join(sorted(modules))}: collect one experiment at a time"
        )
    (name, (module, parameters)) = next(iter(modules.items()))
    for (variant, seed), times in Counter((r["variant"], r["seed"]) for r in runs).items():
        if times > 1:
            raise UserError(f"{variant or name}, seed {seed}: {times} runs of it; give each once")
    expected, variants = _experiment(module, parameters)
    titles, changed = set(), set()
    for run in runs:
        flat = flatten(run["config"])
        titles.add(_public(flat["data.folder"] or flat["data.name"]))
        config = expected.get(run["variant"] if variants else "")
        changed.update([] if config is None else _differences(flat, config))
    return name, {
        "module": module,
        "commands": _commands(module, [start["argv"] for start in starts]),
        "date": max(start["time"] for start in starts)[:10],
        **_source(starts),
        "hardware": sorted({_hardware(start) for start in starts}),
        "data": data_note or " and ".join(sorted(titles)),
        "changed_fields": sorted(changed),
        "missing_variants": sorted(variants - {run["variant"] for run in runs}),
        "unfinished": [line for _, unfinished in found for line in unfinished],
        "note": note,
        "runs": [_figures(run) for run in runs],
    }


def collect_networks(workdir: Path, note: str = "") -> tuple[str, dict[str, Any]]:
    """The record of experiments.gradient_flow, which trains nothing: (its name, it)."""
    result = json.loads((workdir / "result.json").read_text())
    given, hardware = result["settings"], result["hardware"]
    usual = json.loads(json.dumps(dataclasses.asdict(gradient_flow.Settings())))
    changed = {n: v for n, v in given.items() if v != usual[n] and n != "workdir"}
    words = [f"--{n.replace('_', '-')} {_plain(value)}" for n, value in changed.items()]
    device = f"{hardware['devices']} x {hardware['device']}"
    return "gradient_flow", {
        "module": "gradient_flow",
        "commands": [" ".join(["python -m experiments.gradient_flow", *words])],
        "date": "",
        "commits": [],
        "uncommitted_changes": False,
        "versions": {"jax": hardware["jax"]},
        "hardware": [f"{hardware['cores']}-core CPU" if device.endswith("x cpu") else device],
        "data": "sklearn_digits",
        "changed_fields": [f"{n} {_plain(v)}, not {_plain(usual[n])}" for n, v in changed.items()],
        "missing_variants": [],
        "unfinished": [],
        "note": note,
        "networks": [
            {
                **{name: network[name] for name in ("norm", "connection", "depth")},
                **{q: network[q]["first_over_last"] for q in gradient_flow.QUANTITIES},
                "n": given["seeds"],
            }
            for network in result["networks"]
        ],
    }


def _figures(run: Run) -> dict[str, Any]:
    """What a record keeps of a finished run; the split where it is a part of one."""
    split = flatten(run["config"])["data.train_split"]
    figures = {name: run["result"][name] for name in KEPT if name in run["result"]}
    part = {"train_split": split} if "[" in split else {}
    return {"variant": run["variant"], "seed": run["seed"], **figures, **part}


def _module_of(path: Path, argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(name within experiments, parameters of its get_config on the command line) of a run."""
    parts = Path(argv[0]).with_suffix("").parts
    if "experiments" not in parts[:-1]:
        raise UserError(f"{path}: run by {parts[-1]}: expected one of python -m experiments.NAME")
    last = len(parts) - 1 - parts[::-1].index("experiments")
    name = ".".join(parts[last + 1 :])
    module = importlib.import_module(f"experiments.{name}")
    make = getattr(module, "get_config", None) or getattr(module, "get_base", None)
    given = flags.arguments(make, argv[1:])[0] if make else {}
    defaults = inspect.signature(make).parameters if make else {}
    return name, {n: v for n, v in given.items() if v != defaults[n].default}


def _experiment(
    name: str, parameters: Mapping[str, Any]
) -> tuple[dict[str, TrainConfig], set[str]]:
    """({variant, "" without any: config as the experiment stands}, the variants of an ablation)."""
    module = importlib.import_module(f"experiments.{name}")
    if not hasattr(module, "get_grid"):
        return (
            {"": module.get_config(**parameters)} if hasattr(module, "get_config") else {}
        ), set()
    if not hasattr(module, "get_base"):
        raise UserError(f"{module.__name__} has no get_base, which its runs are compared with")
    grid = module.get_grid(module.get_base(**parameters), 1)
    configs = {run.rpartition("/")[0]: config for run, config in grid.items()}
    return configs, set(configs)


def _public(value: Any) -> Any:
    """A value without a place on this machine."""
    place = isinstance(value, str) and re.match(r"~|\.{0,2}/", value)
    return "PATH" if place else value


def _pairs(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, its values) of each flag of a command line."""
    pairs: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--[a-zA-Z]", word):
            flag, equals, value = word.partition("=")
            pairs.append((flag.replace("_", "-"), [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
    return pairs


def _commands(module: str, argvs: Sequence[Sequence[str]]) -> list[str]:
    """The command lines, each once: without workdirs, places named, seeds of several as S."""
    several = len({str(dict(_pairs(argv[1:])).get("--seed")) for argv in argvs}) > 1
    commands = set()
    for argv in argvs:
        words = ["python", "-m", f"experiments.{module}"]
        for flag, values in _pairs(argv[1:]):
            if flag in PLACES:
                values = [PLACES[flag]]
            elif flag == "--seed" and several:
                values = ["S"]
            words += [] if flag == "--workdir" else [flag, *map(_public, values)]
        commands.add(shlex.join(words))
    return sorted(commands)


def _source(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The commits, whether the checkout was changed, and versions of what computes."""
    states = [start["git"] or {"commit": "unknown", "changed": False} for start in starts]
    packages = {name: {start["packages"][name] for start in starts} for name in ("jax", "flax")}
    return {
        "commits": sorted({state["commit"][:12] for state in states}),
        "uncommitted_changes": any(state["changed"] for state in states),
        "versions": {name: " and ".join(sorted(numbers)) for name, numbers in packages.items()},
    }


def _hardware(start: Mapping[str, Any]) -> str:
    cores = f"{start['cpu_cores']}-core CPU"
    if start["platform"] == "cpu":
        return cores
    devices = [f"{n} x {kind}" for kind, n in Counter(start["devices"]).items()]
    return f"{' and '.join(devices)}, {cores}"


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
