"""Lines and tables of text, for the terminal and in Markdown; a result's numbers as rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from flax_resnet.records.files import shown


def say(text: str) -> None:
    """Prints a text on stdout, where characters that its encoding lacks are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(shown(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


def show(
    title: str, rows: Iterable[Sequence[Any]], header: Sequence[str] = (), numbers: int = 0
) -> None:
    """Prints a table, its texts as they are; the last ``numbers`` columns are right-aligned."""
    table = Table(title=shown(title), title_justify="left", show_header=bool(header))
    for i, name in enumerate(header):
        justify: Any = "right" if i >= len(header) - numbers else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(shown(str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120"))
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    with console.capture() as printed:
        console.print(table)
    say(printed.get().removesuffix("\n"))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


class Measure(NamedTuple):
    """How a number of a run's result is written."""

    label: str
    unit: str
    times: float = 1
    digits: int = 4


MEASURES: Mapping[str, Measure] = {
    "top1": Measure("evaluation top-1", "%", 100, 2),
    "top5": Measure("evaluation top-5", "%", 100, 2),
    "loss": Measure("evaluation loss", "nats"),
    "calibration_error": Measure("calibration error", "%", 100, 2),
    "brier": Measure("Brier score", ""),
    "best_top1": Measure("best top-1", "%", 100, 2),
    "train_top1": Measure("training top-1", "%", 100, 2),
    "train_loss": Measure("training loss", "nats"),
    "step": Measure("steps", "", digits=0),
    "seconds": Measure("time", "s", digits=1),
}
"""{field of a result.json or of what ``evaluate`` returns: how it is written}."""


def result_rows(result: Mapping[str, Any]) -> dict[str, str]:
    """{label: text} of the numbers that a result.json, or ``evaluate``, has."""
    notes = {"train_top1": "(last interval)"}
    if "n" in result:
        notes["top1"] = f"of {result['n']} images"
        notes["seconds"] = f"({result['n'] / result['seconds']:.0f} images a second)"
    else:
        notes["top1"] = f"of {result['num_eval']} images"
        notes["best_top1"] = f"at step {result['best_step']}"
        notes["step"] = f"({result['epochs']:g} epochs)"
        notes["seconds"] = "with compilation and evaluation"
    texts = {
        of.label: f"{of.times * result[field]:.{of.digits}f} {of.unit} {notes.get(field, '')}"
        for field, of in MEASURES.items()
        if field in result
    }
    return {label: " ".join(text.split()) for label, text in texts.items()}
