"""Runs side by side: what their configs differ in, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.records.configs import flatten, varying_fields
from flax_resnet.records.run_dir import finished, read_metrics, read_record, variants
from flax_resnet.records.text_tables import MEASURES, markdown_table
from flax_resnet.studies.tables import plus_minus

RESULTS = ("top1", "loss", "train_top1", "train_loss", "step", "seconds")


def compare(paths: Sequence[str | Path]) -> str:
    """Tables in Markdown: the fields that differ, and the results.

    Args:
      paths: each a run's working directory, a variant (seed0, seed1, ...), whose results are
        averaged, or a sweep, which holds variants.

    Raises:
      UserError: a directory holds none of these, or there is one run alone.
    """
    found = [variant for path in paths for variant in variants(path)]
    if len(found) < 2:
        raise UserError(
            f"{' '.join(map(str, paths))}: one run alone; expected two or more working "
            "directories, or a sweep's"
        )
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        names = [str(workdirs[0]) for _, workdirs in found]
    configs = [flatten(read_record(workdirs[0])["config"]) for _, workdirs in found]
    fields = [field for field in varying_fields(configs) if field != "seed"]
    rows = [[f"`{f}`", *(str(own.get(f, "-")) for own in configs)] for f in fields]
    rows = rows or [["no field", *("the same" for _ in configs)]]
    results = [[finished(workdir) or {} for workdir in workdirs] for _, workdirs in found]
    counts = [(sum(map(bool, own)), len(own)) for own in results]
    shares = [str(n) if n == runs else f"{n} of {runs}" for n, runs in counts]
    text = markdown_table(["config", *names], rows) + "\n"
    rows = [["runs finished", *shares], *_means(results)]
    text += markdown_table(["result", *names], rows)
    unfinished = [_latest(w) for _, workdirs in found for w in workdirs if not finished(w)]
    return text + "".join(["\n", *unfinished] if unfinished else [])


def _means(results: Sequence[Sequence[Mapping[str, Any]]]) -> Iterator[list[str]]:
    """A row for each number that a variant has: its mean and deviation over the seeds."""
    for field in RESULTS:
        label, unit, times, digits = MEASURES[field]
        values = [[times * r[field] for r in own if r.get(field) is not None] for own in results]
        if any(values):
            heading = f"{label} ({unit})" if unit else label
            yield [heading, *(plus_minus(own, digits) for own in values)]


def _latest(workdir: Path) -> str:
    """How far a run without a result has come."""
    logged = read_metrics(workdir)
    at = f"at step {logged[-1]['step']}" if logged else "before its first log line"
    return f"{workdir} is not finished: {at}\n"
