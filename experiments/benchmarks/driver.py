"""What the benchmarks' commands share: checks of flags, lines of JSON, the table for people.

The processes of other frameworks never import it: it imports this library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from experiments.benchmarks import common
from flax_resnet import UserError
from flax_resnet.cli import flags
from flax_resnet.cli.experiment import one_line_errors
from flax_resnet.errors import check_range, did_you_mean
from flax_resnet.records.text_tables import markdown_table
from flax_resnet.xla.backend import usable_cores

Settings = TypeVar("Settings")
Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
"""{heading: the cell of a row}."""


def check_least(settings: Any, least: float, *names: str) -> None:
    """Raises UserError unless these fields, where they are given, are ``least`` or more."""
    for name in names:
        check_range("--" + name.replace("_", "-"), getattr(settings, name), least)


def check_names(flag: str, words: Sequence[str], known: Collection[str]) -> None:
    """Raises UserError unless the words of a flag are one or more of the known ones."""
    if not words:
        raise UserError(f"{flag}: expected one or more of {', '.join(known)}")
    for word in words:
        if word not in known:
            near = did_you_mean(word, known)
            raise UserError(f"{flag} {word!r}: expected some of {', '.join(known)}{near}")


def check_cores(cores: int | None) -> None:
    """Raises UserError unless this process may use so many cores."""
    check_range("--cores", cores, 1)
    if cores is not None and cores > usable_cores():
        raise UserError(f"--cores {cores}: there are {usable_cores()}")


def note(text: str) -> None:
    """Says what goes on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def timing_cell(field: str) -> Callable[[Row], str]:
    """The cell of a field that holds a Timing, or nothing."""
    return lambda row: str(common.Timing(**row[field])) if row[field] else ""


def table(columns: Columns, rows: Sequence[Row], keys: int = 1) -> str:
    """The table for people; of a row with an "error" the first cells, and below why."""
    lines, failed = [], ""
    for row in rows:
        cells = list(columns.values())[: keys if row.get("error") else None]
        line = [cell(row) for cell in cells]
        lines.append(line + [""] * (len(columns) - len(line)))
        failed += f"{', '.join(line)}: {row['error']}\n" if row.get("error") else ""
    return markdown_table(list(columns), lines) + failed


def run(
    name: str,
    settings: type[Settings],
    about: str,
    argv: Sequence[str] | None,
    measure: Callable[[Settings], Iterable[Row]],
    report: Callable[[Sequence[Row]], str] | None = None,
) -> list[Row]:
    """A benchmark's command: the rows that ``measure`` yields, as lines of JSON with "hardware".

    ``report`` makes what people are shown at the end, on standard error.
    """
    with one_line_errors():
        chosen = flags.cli(settings, argv, about, f"python -m experiments.benchmarks.{name}")
        rows = []
        for row in measure(chosen):
            # Of the devices nothing is asked before the first row: they are the workers' at times.
            facts = {} if "hardware" in row else {"hardware": common.hardware()}
            rows.append({"benchmark": name, **row, **facts})
            print(json.dumps(rows[-1]), flush=True)  # what is stopped leaves what it has
        if report is not None:
            note(", ".join(f"{name} {value}" for name, value in rows[-1]["hardware"].items()))
            note(report(rows).rstrip())
    return rows
