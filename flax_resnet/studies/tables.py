"""Results of runs as tables: mean and deviation over seeds, differences and their significance.

A row is a run; a variant is what its seeds have in common.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.records.files import replacing
from flax_resnet.records.text_tables import markdown_table

Row = Mapping[str, Any]
FINISHED = "finished"
RESULTS = ("top1", "top5", "loss", "train_top1", "train_loss", "parameters", "seconds")
# What a table shows of a variant: heading, field, whether it is a share of right answers (which
# becomes an error), digits.
SHOWN: tuple[tuple[str, str, bool, int], ...] = (
    ("evaluation error (%)", "top1", True, 2),
    ("training error (%)", "train_top1", True, 2),
    ("evaluation loss (nats)", "loss", False, 3),
)


def by_variant(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each variant, in the order in which variants come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def errors(rows: Sequence[Row], field: str, share: bool) -> dict[int, float]:
    """{seed: value} of the finished rows; a share of right answers becomes an error in percent."""
    return {
        int(row["seed"]): 100 * (1 - float(row[field])) if share else float(row[field])
        for row in rows
        if row["state"] == FINISHED
    }


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """(mean, sample deviation, of n - 1); of one value the deviation is NaN."""
    x = np.array(list(values), float)
    return float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan


def paired_test(a: Mapping[int, float], b: Mapping[int, float]) -> dict[str, float]:
    """Student's paired t-test over the seeds that {seed: value} a and b both have.

    Returns:
      "n" pairs, "difference" (mean of a - b), "half_width" of its 95 % confidence interval, and
      the two-sided "p"; the last two are NaN where every pair differs by the same.
    """
    from scipy import stats

    seeds = sorted(a.keys() & b.keys())
    n, first, second = len(seeds), [a[s] for s in seeds], [b[s] for s in seeds]
    d = np.subtract(first, second)
    found = {"n": n, "difference": float(d.mean()) if n else math.nan}
    if n < 2 or np.ptp(d) <= 1e-12 * max(1.0, float(np.abs(d).max())):
        return {**found, "half_width": math.nan, "p": math.nan}
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    return {**found, "half_width": float(high - low) / 2, "p": float(test.pvalue)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for so many comparisons (1979); NaN stays, and is not counted."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected


def markdown(rows: Sequence[Row], baseline: str | Mapping[str, str] | None = None) -> str:
    """A table with a line for each variant; ``baseline`` is that of ``sweep``."""
    variants = by_variant(rows)
    if not isinstance(baseline, Mapping):
        baseline = {name: baseline for name in variants if baseline not in (None, name)}
    pairs = {name: of for name, of in baseline.items() if {name, of} <= variants.keys()}
    tests = {
        name: paired_test(*(errors(variants[v], "top1", True) for v in (name, of)))
        for name, of in pairs.items()
    }
    corrected = dict(zip(tests, holm([test["p"] for test in tests.values()]), strict=True))
    header = ["variant", "n", *(heading for heading, *_ in SHOWN)]
    lines = []
    for name, own in variants.items():
        finished = sum(row["state"] == FINISHED for row in own)
        count = str(finished) if finished == len(own) else f"{finished} of {len(own)}"
        cells = [plus_minus(errors(own, f, share).values(), d) for _, f, share, d in SHOWN]
        if name in tests:
            cells += [pairs[name], *_compared(tests[name], corrected[name])]
        elif tests:
            cells += ["", "", ""]
        lines.append([name, count, *cells])
    notes = ["Mean ± standard deviation over n seeds. Training error is that of the last interval, "
             "of augmented images."]  # fmt: skip
    if tests:
        header += ["against", "difference", "p"]
        counted = sum(not math.isnan(p) for p in corrected.values())
        notes.append(
            "Differences of evaluation error in percentage points with a 95 % confidence interval; "
            "p of Student's test paired by seed, corrected by Holm for so many comparisons: "
            f"{counted}."
        )
    failed = [f"{row['variant']}/seed{row['seed']}: {row['state']}" for row in rows
              if row["state"] != FINISHED]  # fmt: skip
    if failed:
        notes.append("Not finished: " + "; ".join(failed) + ".")
    return markdown_table(header, lines) + "\n" + "\n".join(notes) + "\n"


def _compared(test: Mapping[str, float], p: float) -> list[str]:
    """The cells of a difference and of its p."""
    if not test["n"]:
        return ["-", "-"]
    width = "" if math.isnan(test["half_width"]) else f" ± {test['half_width']:.2f}"
    shown = "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.2g}"
    return [f"{test['difference']:+.2f}{width}", shown]


def plus_minus(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± deviation; of no values a dash."""
    values = list(values)
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def write(
    rows: Sequence[Row], directory: Path, baseline: str | Mapping[str, str] | None = None
) -> None:
    """Writes table.csv (a line for each run) and table.md (a line for each variant)."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, text in (("table.csv", file.getvalue()), ("table.md", markdown(rows, baseline))):
        with replacing(directory / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def read(directory: Path) -> list[dict[str, str]]:
    """The rows of a directory's table.csv, all values as text."""
    with (directory / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
