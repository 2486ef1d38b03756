"""experiments/README.md as text: from the records of results and the experiments' docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_resnet.records.text_tables import markdown_table
from flax_resnet.studies.tables import by_variant, plus_minus

LABELS = ("Claim", "Command", "Hardware", "Published")
MOST_CHANGES = 6
REDUCES = ("data.train_split ", "data.image_size ", "num_steps ", "num_epochs ",
           "model.num_filters ", "model.stage_filters ")  # fmt: skip
"""What a changed field begins with where less is trained, on less or of less."""
Record = Mapping[str, Any]
Document = Mapping[str, str]
HEAD = """# Results

Written by `python -m experiments.results` from the records in `results/` and the experiments'
docstrings, never by hand; a test compares. `python -m experiments.results DIR` adds the finished
runs in DIR.

Figures are mean ± standard deviation (n - 1) over n seeds, of the last step, not of the best.
Training figures are over the last logged interval, of augmented images. "Run as it stands" is a run
of the experiment's own config; of others the fields that differ are named, and so are seeds that
are not finished. DIR is where the data is.
"""


def documents(directory: Path) -> dict[str, dict[str, str]]:
    """{name: {"title", "Claim", ...}} of the experiments in a directory and of its ablations."""
    found = {}
    paths = [*sorted(directory.glob("*.py")), *sorted(directory.glob("ablations/*.py"))]
    for path in paths:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if field(text, "Claim") and field(text, "Published"):
            name = ".".join(path.relative_to(directory).with_suffix("").parts)
            fields = {label: field(text, label) for label in LABELS}
            found[name] = {"title": text.partition("\n")[0], **fields}
    return found


def field(text: str, label: str) -> str:
    """What a docstring says after ``label: ``, in one line; "" where it says nothing.

    It ends before a blank line or another label, and a command also before a line that is not
    indented.
    """
    end = r"\n(?! )" if label == "Command" else rf"\n(?:{'|'.join(LABELS)}): "
    match = re.search(rf"^{label}: (.*?)(?=\n\n|{end}|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(match[1].split()) if match else ""


def render(records: Mapping[str, Record], texts: Mapping[str, Document]) -> str:
    """The README, from the records by name and what ``documents`` found by module."""
    head = ["experiment", "command", "result", "differs", "hardware", "published", "status"]
    rows = []
    for module, text in texts.items():
        of_module = {name: r for name, r in records.items() if r["module"] == module}
        rows += [_row(name, record, text["Published"]) for name, record in of_module.items()]
        if all(_changes(record) for record in of_module.values()):
            not_run = ["", "", text["Hardware"], text["Published"], "not run here"]
            rows.append([f"`{module}`", f"`{text['Command']}`", *not_run])
    parts = [HEAD, markdown_table(head, rows)]
    for name, record in records.items():
        if "networks" in record:
            parts += [f"## {name}\n", _network_table(record["networks"])]
        elif len(by_variant(record["runs"])) > 1:
            parts += [f"## {name}\n", _variant_table(record)]
    if records:
        parts += ["## Records\n", _details(records)]
    return "\n".join(parts)


def _row(name: str, record: Record, published: str) -> list[str]:
    changes, unfinished = _changes(record), record.get("unfinished", [])
    rest = len(changes) - MOST_CHANGES
    shown = [*changes[:MOST_CHANGES], f"and {rest} more"] if rest > 0 else changes
    reduced = any(field.startswith(REDUCES) for field in record["changed_fields"])
    status = "run, reduced" if reduced else "run, changed" if changes else "run as it stands"
    runs = record.get("runs", [])
    result = f"[below](#{re.sub(r'[^a-z0-9_-]', '', name.lower())})"
    if len(by_variant(runs)) == 1:
        top1 = plus_minus([100 * run["top1"] for run in runs])
        images = f"{runs[-1]['num_eval']:,} images, {record['data']}"
        result = f"{top1} % top-1 of {images}; n = {len(runs)}"
    return [
        f"`{name}`",
        "; ".join(f"`{command}`" for command in record["commands"]),
        result,
        "; ".join([*unfinished, *shown]),
        "; ".join(record["hardware"]),
        published,
        status + (", not finished" if unfinished else ""),
    ]


def _changes(record: Record) -> list[str]:
    """What sets the runs of a record apart from the experiment as it stands."""
    missing = record.get("missing_variants")
    without = [f"without {', '.join(missing)}"] if missing else []
    return [*filter(None, [record["note"]]), *without, *record["changed_fields"]]


def _variant_table(record: Record) -> str:
    """A row for each variant: errors, training loss, steps."""
    head = ["variant", "n", "top-1 error, %", "training error, %", "training loss", "steps"]
    rows = []
    for variant, runs in by_variant(record["runs"]).items():
        errors = [plus_minus([100 * (1 - run[k]) for run in runs]) for k in ("top1", "train_top1")]
        loss = plus_minus([run["train_loss"] for run in runs], 4)
        steps = _and(f"{step:,}" for step in sorted({run["step"] for run in runs}))
        rows.append([f"`{variant}`" if variant else "", str(len(runs)), *errors, loss, steps])
    images = f"{record['runs'][0]['num_eval']:,} images of {record['data']}"
    return f"Top-1 error of {images}.\n\n{markdown_table(head, rows)}"


def _network_table(networks: Sequence[Record]) -> str:
    """Gradients at initialisation: first over last, geometric means over seeds."""
    head = ["norm", "network", "layers", "by block output, first / last", "by kernel", "n"]
    cells = "{norm}|{connection}|{depth}|{output:.1e}|{kernel:.1e}|{n}"
    return markdown_table(head, [cells.format(**network).split("|") for network in networks])


def _details(records: Mapping[str, Record]) -> str:
    head = ["record", "date", "commit", "jax", "flax", "data", "training images", "epochs",
            "seconds a run"]  # fmt: skip
    rows = []
    for name, record in records.items():
        runs = record.get("runs", [])
        commits = ", ".join(record.get("commits", []))
        commits += " and uncommitted changes" if record.get("uncommitted_changes") else ""
        images = {
            f"{run['num_train']:,}" + (f" ({run['train_split']})" if "train_split" in run else "")
            for run in runs
        }
        epochs = sorted({round(run["epochs"], 2) for run in runs})
        together = sorted({run["together"] for run in runs if run.get("together", 1) > 1})
        seconds = plus_minus([run["seconds"] for run in runs], 1) if runs else ""
        seconds += f" ({_and(together)} networks in one program)" if together else ""
        versions = [record["versions"].get(package, "") for package in ("jax", "flax")]
        rows.append([f"`{name}`", record.get("date", ""), commits, *versions, record["data"],
                     _and(sorted(images)), _and(f"{e:g}" for e in epochs), seconds])  # fmt: skip
    return markdown_table(head, rows)


def _and(values: Iterable[Any]) -> str:
    return " and ".join(map(str, values))
