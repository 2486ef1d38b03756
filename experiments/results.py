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
from flax_resnet import TrainConfig, UserError
from flax_resnet.cli import flags
from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.records.configs import flatten, to_record, varying_fields
from flax_resnet.records.files import replacing
from flax_resnet.records.run_dir import CONFIG, finished, read_record, record_errors, write_json
from flax_resnet.training.workdir import free_fields

HERE = Path(__file__).parent
RESULT_FIELDS = ("step", "epochs", "num_train", "num_eval", "top1", "loss", "train_top1",
                 "train_loss", "seconds", "together")  # fmt: skip
"""Fields of result.json that a record keeps; "together" where several networks trained at once."""
DATA_FLAGS = ("--data.data-dir", "--data.folder")
"""Flags whose value a record calls DIR."""
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
    runs: list[Run] = []
    states: dict[tuple[str, int], str] = {}
    for failure in workdir.rglob("failures/*-seed*.txt"):  # a sweep's, begun or not
        variant, _, seed = failure.stem.rpartition("-seed")
        name = (failure.parent.parent / variant).relative_to(workdir).as_posix()
        states[name, int(seed)] = "failed"
    for path in sorted(path.parent for path in workdir.rglob(CONFIG)):
        variant = re.sub(r"(^|/)seed\d+$|^\.$", "", path.relative_to(workdir).as_posix())
        record, result = read_record(path), finished(path)
        with record_errors(path / CONFIG):
            seed, _ = record["config"]["seed"], record["starts"][-1]["argv"][0]
        if result is None:
            states.setdefault((variant, seed), "not finished")
            continue
        runs.append({"variant": variant, "seed": seed, "path": path, **record, "result": result})
        states.pop((variant, seed), None)
    if not runs:
        raise UserError(
            f"{workdir}: no finished run is in it (result.json beside config.json): name the "
            "workdir of a run, of its seeds or of a sweep"
        )
    return runs, [
        f"seed {seed}{f' of {variant}' if variant else ''} {state}"
        for (variant, seed), state in sorted(states.items())
    ]


def collect(
    workdirs: Sequence[Path], note: str = "", data_note: str | None = None
) -> tuple[str, dict[str, Any]]:
    """(the default name of the record of one experiment's finished runs, the record).

    Raises:
      UserError: no finished run, runs of several experiments, a run that is there twice.
    """
    pairs = [find_runs(workdir) for workdir in workdirs]
    runs = sorted(
        (run for runs, _ in pairs for run in runs), key=lambda run: (run["variant"], run["seed"])
    )
    starts = [start for run in runs for start in run["starts"]]
    modules = dict(_module_of(run["path"], s["argv"]) for run in runs for s in run["starts"])
    if len(modules) > 1:
        raise UserError(
            f"runs of {' and '.join(sorted(modules))}: collect one experiment at a time"
        )
    ((name, (module, parameters)),) = modules.items()
    for (variant, seed), times in Counter((r["variant"], r["seed"]) for r in runs).items():
        if times > 1:
            raise UserError(f"{variant or name}, seed {seed}: {times} runs of it; give each once")
    configs = _configs(module, parameters)
    titles, changed, rows = set(), set(), []
    for run in runs:
        flat = flatten(run["config"])
        titles.add(_public(flat["data.folder"] or flat["data.name"]))
        config = configs.get("" if "" in configs else run["variant"])
        changed.update([] if config is None else _differences(flat, config))
        figures = {name: run["result"][name] for name in RESULT_FIELDS if name in run["result"]}
        split = flat["data.train_split"]
        part = {"train_split": split} if "[" in split else {}
        rows.append({"variant": run["variant"], "seed": run["seed"], **figures, **part})
    states = [start["git"] or {"commit": "unknown", "changed": False} for start in starts]
    versions = {n: sorted({start["packages"][n] for start in starts}) for n in ("jax", "flax")}
    return name, {
        "module": module,
        "commands": _commands(module, [start["argv"][1:] for start in starts]),
        "date": max(start["time"] for start in starts)[:10],
        "commits": sorted({state["commit"][:12] for state in states}),
        "uncommitted_changes": any(state["changed"] for state in states),
        "versions": {name: " and ".join(numbers) for name, numbers in versions.items()},
        "hardware": sorted({_hardware(start) for start in starts}),
        "data": data_note or " and ".join(sorted(titles)),
        "changed_fields": sorted(changed),
        "missing_variants": sorted(configs.keys() - {""} - {run["variant"] for run in runs}),
        "unfinished": [line for _, unfinished in pairs for line in unfinished],
        "note": note,
        "runs": rows,
    }


def collect_networks(workdir: Path, note: str = "") -> tuple[str, dict[str, Any]]:
    """The record of experiments.gradient_flow, which trains nothing: (its name, it)."""
    result = finished(workdir) or {}
    given, hardware = result["settings"], result["hardware"]
    usual = json.loads(json.dumps(dataclasses.asdict(gradient_flow.Settings())))
    changed = {n: v for n, v in given.items() if v != usual[n] and n != "workdir"}
    words = [f"--{n.replace('_', '-')} {_plain(value)}" for n, value in changed.items()]
    device = f"{hardware['devices']} x {hardware['device']}"
    return "gradient_flow", {
        "module": "gradient_flow",
        "commands": [" ".join(["python -m experiments.gradient_flow", *words])],
        "versions": {"jax": hardware["jax"]},
        "hardware": [f"{hardware['cores']}-core CPU" if device.endswith("x cpu") else device],
        "data": "sklearn_digits",
        "changed_fields": [f"{n} {_plain(v)}, not {_plain(usual[n])}" for n, v in changed.items()],
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


def _module_of(path: Path, argv: Sequence[str]) -> tuple[str, tuple[str, dict[str, Any]]]:
    """(a record's name, (name within experiments, parameters of its get_config)) of a run."""
    place = re.fullmatch(r"(?:.*/)?experiments/(.+)\.py$", Path(argv[0]).as_posix())
    if not place:
        ran = Path(argv[0]).stem
        raise UserError(f"{path}: run by {ran}: expected one of python -m experiments.NAME")
    name = place[1].replace("/", ".")
    module = importlib.import_module(f"experiments.{name}")
    make = getattr(module, "get_config", None) or getattr(module, "get_base", None)
    given = flags.arguments(make, argv[1:])[0] if make else {}
    defaults = inspect.signature(make).parameters if make else {}
    changed = {n: v for n, v in given.items() if v != defaults[n].default}
    return "-".join([name, *(f"{n}{v}" for n, v in changed.items())]), (name, changed)


def _configs(name: str, parameters: Mapping[str, Any]) -> dict[str, TrainConfig]:
    """{variant of an ablation, else "": config as the experiment stands}; {} without get_config."""
    module = importlib.import_module(f"experiments.{name}")
    if not hasattr(module, "get_grid"):
        return {"": module.get_config(**parameters)} if hasattr(module, "get_config") else {}
    if not hasattr(module, "get_base"):
        raise UserError(f"{module.__name__} has no get_base, which its runs are compared with")
    grid = module.get_grid(module.get_base(**parameters), 1)
    return {run.rpartition("/")[0]: config for run, config in grid.items()}


def _public(value: Any) -> Any:
    """A value without a place on this machine."""
    place = isinstance(value, str) and re.match(r"~|\.{0,2}/", value)
    return "PATH" if place else value


def _commands(module: str, argvs: Sequence[Sequence[str]]) -> list[str]:
    """The command lines, each once: without workdirs, places named, seeds of several as S."""
    commands = set()
    for argv in argvs:
        flag, words = "", []
        for arg in argv:
            value: str = arg
            if arg.startswith("--"):
                name, equals, value = arg.partition("=")
                flag = name.replace("_", "-")
                words += [] if flag == "--workdir" else [flag]
                if not equals:
                    continue
            if flag != "--workdir":
                words.append("DIR" if flag in DATA_FLAGS else _public(value))
        commands.add(shlex.join(["python", "-m", f"experiments.{module}", *words]))
    seed = re.compile(r"(?<= --seed )\S+")
    several = len({str(seed.findall(command)) for command in commands}) > 1
    return sorted({seed.sub("S", command) for command in commands} if several else commands)


def _hardware(start: Mapping[str, Any]) -> str:
    cores = f"{start['cpu_cores']}-core CPU"
    devices = [f"{n} x {kind}" for kind, n in Counter(start["devices"]).items()]
    return cores if start["platform"] == "cpu" else f"{' and '.join(devices)}, {cores}"


def _differences(flat: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Fields of a run that differ from the experiment's; one that a record lacks is newer."""
    recipe, free = flatten(to_record(config)), free_fields(config) | {"seed"}
    return [
        f"{name} {_plain(flat[name])}, not {_plain(recipe[name])}"
        for name in sorted(varying_fields([flat, recipe]))
        if name in flat.keys() & recipe.keys() - free
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
        output, workdirs = Path(settings.output), list(map(Path, settings.workdirs))
        records = output / "results"
        if workdirs:
            trains = any(workdirs[0].rglob(CONFIG)) or len(workdirs) > 1
            if trains or not finished(workdirs[0]):
                name, record = collect(workdirs, settings.note, settings.data_note)
            else:
                name, record = collect_networks(workdirs[0], settings.note)
            path = records / f"{settings.name or name}.json"
            if not re.fullmatch(r"[\w.,=+-]+", settings.name or name):
                raise UserError(f"--name {settings.name!r}: expected letters, digits, . , = + -")
            records.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
            print(path)
        elif settings.name or settings.note or settings.data_note:
            raise UserError("--name, --note and --data-note are of a record: give DIR as well")
        text = table.render(load_records(records), table.documents(HERE))
        with replacing(output / "README.md") as partial:
            partial.write_text(text)
        print(output / "README.md")


if __name__ == "__main__":
    main()
