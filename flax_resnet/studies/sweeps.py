"""Many runs: a sweep of named configs to a table, and several seeds of one config."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import queue
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flax_resnet.distributed import sharding
from flax_resnet.distributed.preemption import Preempted, Signals
from flax_resnet.errors import UserError, check_range, did_you_mean
from flax_resnet.records import text_tables
from flax_resnet.records.configs import flatten, to_record, varying_fields
from flax_resnet.records.files import replacing, shown
from flax_resnet.records.run_dir import finished
from flax_resnet.studies import tables
from flax_resnet.studies.grids import check_name, replaced
from flax_resnet.studies.vmapped import train_together, why_not
from flax_resnet.training.config import TrainConfig
from flax_resnet.training.guards import Diverged
from flax_resnet.training.loop import train_and_evaluate


def sweep(
    configs: Mapping[str, TrainConfig],
    workdir: str | Path,
    *,
    baseline: str | Mapping[str, str] | None = None,
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
      baseline: the variant that the others are compared with, or {variant: its own reference}.
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
    variants = {_split(name)[0] for name in configs}
    references = [baseline] if isinstance(baseline, str) else (baseline or {}).values()
    for name in references:
        if name not in variants:
            near = did_you_mean(name, variants)
            raise UserError(f"baseline={name!r} is none of {len(variants)} variants{near}")
    if devices is None:
        # Several processes train each run together, or each would train all of them.
        alone = jax.default_backend() != "cpu" and jax.process_count() == 1
        devices = jax.local_devices() if alone else ()
    root = Path(workdir).expanduser()
    configs = {  # each with a place of its own where checkpoints are not in the workdir
        name: replaced(config, "checkpoint.directory", shared and f"{shared}/{name}")
        for name, config in configs.items()
        for shared in [config.checkpoint.directory]
    }
    one = _Sweep(configs, root, baseline, together, parallel=len(devices) > 1)
    jobs = _jobs(configs, together)
    if len(devices) > 1:
        _on_each(devices, jobs, one)
    else:
        for job in jobs:
            one.run(job, devices[0] if devices else None)
    return one.write()


@dataclasses.dataclass
class _Sweep:
    """A sweep under way."""

    configs: Mapping[str, TrainConfig]
    root: Path
    baseline: str | Mapping[str, str] | None
    together: bool | None
    parallel: bool
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    lock: Any = dataclasses.field(default_factory=threading.Lock)
    stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

    def run(self, names: Sequence[str], device: jax.Device | None) -> None:
        """Runs one job, on one device or on all, and writes the table."""
        try:
            self._train(names, device)
        except Exception as error:  # whatever it is, the others are not its fault
            if jax.process_count() > 1 and not isinstance(error, Diverged):
                raise  # perhaps of this process alone, and the others wait for it
            if len(names) > 1 and not self.together and not isinstance(error, Diverged):
                for name in names:
                    self.run([name], device)
                return
            self._failed(names, error)
        else:
            for name in names:
                self._failure(name).unlink(missing_ok=True)
        self.write()

    def _train(self, names: Sequence[str], device: jax.Device | None) -> None:
        own = {self.root / name: self.configs[name] for name in names}
        if len(own) > 1:
            devices = None if device is None else [device]
            train_together(own, self.root / "together", devices, stop=self.stopped.is_set)
            return
        ((workdir, config),) = own.items()
        mesh = None if device is None else sharding.data_mesh([device])
        quiet = self.parallel or finished(workdir) is not None
        train_and_evaluate(config, workdir, mesh=mesh, quiet=quiet, stop=self.stopped.is_set)

    def _failed(self, names: Sequence[str], error: Exception) -> None:
        if not sharding.is_lead():
            return
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        line = " ".join(f"failed: {kind}{error}".split())[:300]
        text_tables.say(f"{', '.join(names)}: {line}")
        for name in names:
            if len(names) > 1 and finished(self.root / name) is not None:
                continue  # before the others failed
            self.failures[name] = line
            path = self._failure(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_text(shown(traceback.format_exc()), encoding="utf-8")

    def write(self) -> list[dict[str, Any]]:
        """Writes the table; its rows."""
        with self.lock:
            rows = table_rows(self.configs, self.root, self.failures)
            if sharding.is_lead():
                self.root.mkdir(parents=True, exist_ok=True)
                tables.write(rows, self.root, self.baseline)
            return rows

    def _failure(self, name: str) -> Path:
        return self.root / "failures" / (name.replace("/", "-") + ".txt")


def _jobs(configs: Mapping[str, TrainConfig], together: bool | None) -> list[list[str]]:
    """Names of what runs at once, in the order of seeds: so every variant has some early."""
    groups: dict[str, list[str]] = {}
    for name in configs:
        groups.setdefault(_split(name)[0], []).append(name)
    if together or (together is None and jax.default_backend() != "cpu"):
        able = [names for names in groups.values()
                if together or not why_not([configs[name] for name in names])]  # fmt: skip
        alone = [[name] for names in groups.values() if names not in able for name in names]
        return able + alone
    rounds = itertools.zip_longest(*groups.values())
    return [[name] for names in rounds for name in names if name is not None]


def _on_each(
    devices: Sequence[jax.Device], jobs: Sequence[Sequence[str]], sweeping: _Sweep
) -> None:
    """Hands jobs to threads, one a device; a program leaves Python while it computes."""
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def work(job: Sequence[str]) -> None:
        device = free.get()
        try:
            with jax.default_device(device), contextlib.suppress(Preempted):
                if not sweeping.stopped.is_set():
                    sweeping.run(job, device)
        finally:
            free.put(device)

    with Signals() as signals, concurrent.futures.ThreadPoolExecutor(len(devices), "sweep") as pool:
        running = [pool.submit(work, job) for job in jobs]
        try:
            while concurrent.futures.wait(running, 0.2).not_done:
                if signals():
                    raise Preempted
            for run in running:
                run.result()
        except KeyboardInterrupt as error:
            sweeping.stopped.set()  # each run saves and ends after its step, the pool waits
            raise Preempted from error


def table_rows(
    configs: Mapping[str, TrainConfig], root: Path, failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each run in ``root/NAME``, as ``sweep`` returns them; ``failures`` by name."""
    flat = {name: flatten(to_record(config)) for name, config in configs.items()}
    varies = [
        field
        for field in varying_fields(list(flat.values()))
        if field not in ("seed", "checkpoint.directory")
    ]
    rows = []
    for name, own in flat.items():
        variant, seed = _split(name)
        result = finished(root / name)
        state = failures.get(name) or (tables.FINISHED if result else "not run")
        row = {"variant": variant, "seed": seed, "state": state}
        taken = (*tables.RESULTS, *row)  # columns that a field of the config does not get
        row |= {f"config.{f}" if f in taken else f: own.get(f, "") for f in varies}
        row |= {field: (result or {}).get(field, "") for field in tables.RESULTS}
        rows.append({**row, "workdir": name})
    return rows


def _split(name: str) -> tuple[str, int]:
    """(variant, seed) of VARIANT/seedN; runs called seedN are of the variant "seeds"."""
    variant, slash, last = name.rpartition("/")
    seed = last.removeprefix("seed")
    if seed == last or not seed.isdecimal():
        raise UserError(f"a run is called {name!r}: expected VARIANT/seedN, as grid() gives")
    return check_name(variant) if slash else "seeds", int(seed)


def train_seeds(
    config: TrainConfig,
    workdir: str | Path,
    num_seeds: int,
    *,
    together: bool | None = None,
) -> list[dict[str, Any]]:
    """Trains one config from several seeds, ``config.seed`` and those after it: a sweep of one.

    On a CPU they run one after another; on accelerators the same initialisation and step are
    mapped over a seed axis, so that S networks train in one program.

    Args:
      config: the run.
      workdir: gets seedN/, an ordinary workdir of each, and a table.
      num_seeds: S.
      together: in one program or in turn; by default in one on accelerators.

    Returns:
      What each result.json holds.

    Raises:
      UserError: bad input, or runs that failed, once the others are finished.
    """
    check_range("num_seeds", num_seeds, 1)
    seeds = range(config.seed, config.seed + num_seeds)
    configs = {f"seed{seed}": replaced(config, "seed", seed) for seed in seeds}
    rows = sweep(configs, workdir, devices=(), together=together)
    if sharding.is_lead():
        check_finished(rows, workdir)
    return [finished(Path(workdir).expanduser() / name) or {} for name in configs]


def check_finished(rows: Sequence[Mapping[str, Any]], workdir: str | Path) -> None:
    """Raises UserError where a run of a sweep has failed."""
    if failed := [row for row in rows if row["state"] != tables.FINISHED]:
        raise UserError(
            f"{len(failed)} of {len(rows)} runs failed: {workdir}/failures says why, and the same "
            "command tries them again"
        )
