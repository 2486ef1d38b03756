"""Many runs: grids of configs, several seeds of one, and the sweep that runs them to a table."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from flax_resnet import distributed, tables
from flax_resnet.config import TrainConfig
from flax_resnet.errors import UserError, check_range, did_you_mean
from flax_resnet.files import replacing
from flax_resnet.record import flatten, module_fields, to_record
from flax_resnet.together import train_together, why_not
from flax_resnet.train import finished, train_and_evaluate

Options = Sequence[Any] | Mapping[str, Any]
"""Values of a field, or {label: value}."""


def grid(
    base: TrainConfig, axes: Mapping[str, Options], seeds: int | Sequence[int] = 1
) -> dict[str, TrainConfig]:
    """Every combination of some fields' values, each with every seed.

    Args:
      base: what all else is taken from.
      axes: dotted field, such as "model.shortcut", "optimizer.learning_rate" or "model", to its
        values; of {label: value} the labels name the variants alone. "" is a field of no name:
        its values are {dotted field: value}, set together, and need labels.
      seeds: how many, counted from 0, or which.

    Returns:
      {"shortcut=A,learning_rate=0.1/seed0": config}. Dicts of several grids join by ``|``.

    Raises:
      UserError: an unknown field, no values, two variants of one name, or a value that the config
        refuses.
    """
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise UserError(f"seeds={seeds}: expected one or more")
    choices = [_choices(field, options) for field, options in axes.items()]
    configs: dict[str, TrainConfig] = {}
    for combination in itertools.product(*choices):
        changed = base
        for _, changes in combination:
            for field, value in changes.items():
                changed = replaced(changed, field, value)
        variant = ",".join(label for label, _ in combination) or "base"
        for seed in numbers:
            name = f"{variant}/seed{seed}"
            if name in configs:
                raise UserError(f"two variants are called {variant!r}: give them labels")
            configs[name] = replaced(changed, "seed", seed)
    return configs


def _choices(field: str, options: Options) -> list[tuple[str, dict[str, Any]]]:
    """(label, {field: value}) of each value of one axis."""
    if isinstance(options, str) or not len(options):
        raise UserError(f"{field}={options!r}: expected some values, in a tuple or a dict by label")
    if isinstance(options, Mapping):
        labelled = [(_checked(str(label)), value) for label, value in options.items()]
    else:
        short = field.rpartition(".")[2]
        labelled = [(_checked(f"{short}={_text(value)}"), value) for value in options]
    if field:
        return [(label, {field: value}) for label, value in labelled]
    if not all(isinstance(value, Mapping) for _, value in labelled):
        raise UserError('the axis "": expected {label: {dotted field: value}}')
    return labelled


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "x".join(map(str, value))
    return value.__name__ if isinstance(value, type) else str(value)


def _checked(label: str) -> str:
    if not label or set(label) & set("/\\\n\0") or label.startswith(".") or len(label) > 100:
        raise UserError(
            f"a variant would be called {label:.60}, which is no name of a directory: label its "
            "values, {label: value}"
        )
    return label


def replaced(config: Any, field: str, value: Any) -> Any:
    """``config`` with one dotted field set; fields of the model too.

    Raises:
      UserError: there is no such field, or the value does not fit.
    """
    name, _, rest = field.partition(".")
    module = isinstance(config, nn.Module)
    names = [f.name for f in (module_fields(config) if module else dataclasses.fields(config))]
    if name not in names:
        near = did_you_mean(name, names)
        raise UserError(f"{type(config).__name__} has no field {name!r}{near}")
    if rest:
        inner = getattr(config, name)
        if not dataclasses.is_dataclass(inner):
            raise UserError(f"{name} has no fields, {field!r} names one: set {name!r} itself")
        value = replaced(inner, rest, value)
    if module:
        return config.clone(**{name: value})
    return dataclasses.replace(config, **{name: value})


def sweep(
    configs: Mapping[str, TrainConfig],
    workdir: str | Path,
    *,
    baseline: str | None = None,
    devices: Sequence[jax.Device] | None = None,
    together: bool | None = None,
) -> list[dict[str, Any]]:
    """Runs configs to ``workdir/NAME``, and their table to ``workdir/table.csv`` and ``table.md``.

    What is finished is skipped, what was stopped goes on, and a run that fails is reported and
    leaves the others alone: its traceback is in ``workdir/failures``. The table is written anew
    after each run.

    Args:
      configs: "VARIANT/seedN" to config, as ``grid`` gives.
      workdir: of the sweep.
      baseline: the variant that the others are compared with.
      devices: several share the runs, one run on each at a time; by default all of an
        accelerator, and on a CPU each run has all.
      together: train the seeds of a variant in one program (``train_together``); by default on
        accelerators, where they can.

    Returns:
      Rows of the table: "variant", "seed", "state" ("finished", or how it failed), the fields
      that vary, what result.json holds, and "workdir".

    Raises:
      UserError: a name is not of that form, or the baseline is none of the variants.
    """
    root = Path(workdir).expanduser()
    variants = {_split(name)[0] for name in configs}
    if baseline is not None and baseline not in variants:
        near = did_you_mean(baseline, variants)
        raise UserError(f"baseline={baseline!r} is none of {len(variants)} variants{near}")
    accelerated = jax.default_backend() != "cpu"
    jobs = _jobs(configs, accelerated if together is None else together)
    if devices is None:
        devices = jax.local_devices() if accelerated else ()
    failures: dict[str, str] = {}

    def run(names: Sequence[str], device: jax.Device | None) -> None:
        own = {root / name: configs[name] for name in names}
        try:
            if len(names) > 1:
                train_together(own, root / "together", None if device is None else [device])
            else:
                mesh = None if device is None else distributed.data_mesh([device])
                quiet = device is not None or finished(root / names[0]) is not None
                train_and_evaluate(configs[names[0]], root / names[0], mesh=mesh, quiet=quiet)
            for name in names:
                _failure(root, name).unlink(missing_ok=True)
        except Exception as error:  # whatever it is, the others are not its fault
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            line = " ".join(f"failed: {kind}{error}".split())[:300]
            for name in names:
                failures[name] = line
                _leave(_failure(root, name), traceback.format_exc())
            print(f"{', '.join(names)}: {failures[names[0]]}", flush=True)
        write()

    def write() -> list[dict[str, Any]]:
        with lock:
            rows = table_rows(configs, root, failures)
            if distributed.is_lead():
                root.mkdir(parents=True, exist_ok=True)
                tables.write(rows, root, baseline)
            return rows

    lock = threading.Lock()
    if len(devices) > 1:
        _on_each(devices, jobs, run)
    else:
        for job in jobs:
            run(job, None)
    return write()


def _jobs(configs: Mapping[str, TrainConfig], together: bool) -> list[list[str]]:
    """Names of what runs at once, in the order of seeds: so every variant has some early."""
    groups: dict[str, list[str]] = {}
    for name in configs:
        groups.setdefault(_split(name)[0], []).append(name)
    if together:
        return [
            job
            for names in groups.values()
            for job in (
                [[name] for name in names]
                if why_not([configs[name] for name in names])
                else [names]
            )
        ]
    rounds = itertools.zip_longest(*groups.values())
    return [[name] for names in rounds for name in names if name is not None]


def _on_each(
    devices: Sequence[jax.Device],
    jobs: Sequence[Sequence[str]],
    run: Callable[[Sequence[str], jax.Device], None],
) -> None:
    """Hands jobs to threads, one a device; a program leaves Python while it computes."""
    waiting: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work(device: jax.Device) -> None:
        with jax.default_device(device), contextlib.suppress(queue.Empty):
            while True:
                run(waiting.get_nowait(), device)

    threads = [threading.Thread(target=work, args=[d], daemon=True) for d in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def table_rows(
    configs: Mapping[str, TrainConfig], root: Path, failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each run, as ``sweep`` returns them."""
    flat = {name: flatten(to_record(config)) for name, config in configs.items()}
    fields = list(dict.fromkeys(field for one in flat.values() for field in one))
    varies = [
        field
        for field in fields
        if field != "seed" and len({repr(one.get(field)) for one in flat.values()}) > 1
    ]
    rows = []
    for name, own in flat.items():
        variant, seed = _split(name)
        result = finished(root / name)
        state = failures.get(name) or (tables.FINISHED if result else "not run")
        row = {"variant": variant, "seed": seed, "state": state}
        row |= {field: own.get(field, "") for field in varies}
        row |= {field: (result or {}).get(field, "") for field in tables.RESULTS}
        rows.append({**row, "workdir": name})
    return rows


def _split(name: str) -> tuple[str, int]:
    variant, _, seed = name.rpartition("/seed")
    if not variant or not seed.isdecimal():
        raise UserError(f"a run is called {name!r}: expected VARIANT/seedN, as grid() gives")
    return variant, int(seed)


def _failure(root: Path, name: str) -> Path:
    return root / "failures" / (name.replace("/", "-") + ".txt")


def _leave(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def train_seeds(
    config: TrainConfig,
    workdir: str | Path,
    num_seeds: int,
    *,
    learning_rate: Sequence[float] | None = None,
    weight_decay: Sequence[float] | None = None,
    together: bool | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> list[dict[str, Any]]:
    """Trains one config from several seeds, ``config.seed`` and those after it.

    On a CPU they run one after another; on accelerators the same initialisation and step are
    mapped over a seed axis, so that S networks train in one program.

    Args:
      config: the run.
      workdir: gets seedN/, an ordinary workdir of each, and a table.
      num_seeds: S.
      learning_rate: S peak rates in place of the config's.
      weight_decay: S weight decays, likewise.
      together: in one program or in turn; by default in one on accelerators.
      devices: those that share the networks, by default all.

    Returns:
      What each result.json holds.

    Raises:
      UserError: bad input.
    """
    check_range("num_seeds", num_seeds, 1)
    seeds = range(config.seed, config.seed + num_seeds)
    configs = [replaced(config, "seed", seed) for seed in seeds]
    for field, values in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if values is not None and len(values) != num_seeds:
            raise UserError(f"{field}={values}: expected {num_seeds} values, one a seed")
        for i, value in enumerate(values or ()):
            configs[i] = replaced(configs[i], f"optimizer.{field}", value)
    root = Path(workdir).expanduser()
    runs = {root / f"seed{seed}": c for seed, c in zip(seeds, configs, strict=True)}
    reason = why_not(configs)
    wanted = jax.default_backend() != "cpu" and reason is None if together is None else together
    if wanted and num_seeds > 1:
        results = train_together(runs, root / "together", devices)
    else:
        mesh = None if devices is None else distributed.data_mesh(devices)
        results = [train_and_evaluate(c, path, mesh=mesh) for path, c in runs.items()]
    named = {f"{root.name}/seed{seed}": c for seed, c in zip(seeds, configs, strict=True)}
    rows = table_rows(named, root.parent, {})
    tables.write([{**row, "workdir": f"seed{row['seed']}"} for row in rows], root)
    return results
