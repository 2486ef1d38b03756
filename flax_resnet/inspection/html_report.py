"""A run in one HTML file: its result, its record and all its pictures. It opens offline."""

from __future__ import annotations

import base64
import functools
import html
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from flax_resnet import figures
from flax_resnet.errors import UserError
from flax_resnet.inspection import PARTS, Session, open_run
from flax_resnet.inspection.run import Which
from flax_resnet.models import network_name
from flax_resnet.records import run_dir
from flax_resnet.records.configs import flatten
from flax_resnet.records.text_tables import result_rows

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1em; }
table { border-collapse: collapse; } img { max-width: 100%; } nav a { margin-right: 1em; }
th, td { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left; overflow-wrap: anywhere; }
"""
Section = tuple[str, str, str]
"""(anchor, heading, HTML) of one part of a page."""


def report(
    workdir: str | Path,
    *,
    checkpoint: Which = "best",
    images: Sequence[str] = (),
    lr_finder: bool = False,
    seed: int = 0,
    folder: str | None = None,
    data_dir: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """A run as an HTML page with everything in it; a picture that fails is a line with the reason.

    Args:
      workdir: of a run; where there is none, UserError.
      checkpoint: "best" by evaluation top-1, or "latest".
      images: files and folders for feature maps and Grad-CAM; else images of the evaluation split.
      lr_finder: run the learning-rate finder too, which trains for up to 100 steps.
      seed: seed of t-SNE.
      folder: where the run's folder of images is now; None where it was.
      data_dir: where the run's tfds set is now; None where it was.
      say: called with a line for each picture that begins.
    """
    workdir = Path(workdir).expanduser()
    config, record = run_dir.read_config(workdir), run_dir.read_record(workdir)
    title = f"{network_name(config.model)} on {config.data.title}, seed {config.seed}"
    records = run_dir.read_metrics(workdir)

    def draw_curves(path: Path) -> str:
        if not records:
            raise UserError(f"{workdir} has no lines in metrics.jsonl yet")
        figures.curves(records, path, title)
        return "Training figures are of augmented batches, each the mean since the line before."

    @functools.cache
    def session() -> Session:
        run = open_run(workdir, checkpoint, folder=folder, data_dir=data_dir)
        return Session(run, tuple(images), seed=seed, say=say)

    missing: dict[str, list[str]] = {}

    def picture(name: str, heading: str, draw: Callable[[Path], str]) -> Section:
        say(heading)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "figure.png"
            try:
                caption = html.escape(draw(path))
            except UserError as error:
                missing.setdefault(str(error), []).append(heading)
                return name, heading, f"<p>{html.escape(f'Not drawn: {error}')}</p>"
            data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
        return name, heading, f"<figure>{image}\n<figcaption>{caption}</figcaption></figure>"

    sections = [("result", "Result", _result(workdir)), picture("curves", "Curves", draw_curves)]
    for name, part in PARTS.items():
        if name != "lr" or lr_finder:
            sections.append(picture(name, part.heading, lambda path: part.draw(session(), path)))  # noqa: B023
    starts = [_start(number, one) for number, one in enumerate(record["starts"], 1)]
    sections += [
        ("config", "Config", _table(flatten(record["config"]))),
        ("environment", "Environment", "\n".join(starts)),
    ]
    notes = [f"Not drawn: {', '.join(names)}: {reason}" for reason, names in missing.items()]
    for note in notes:
        say(note)
    return _page(title, workdir, sections, notes)


def _page(name: str, workdir: Path, sections: Sequence[Section], notes: Sequence[str]) -> str:
    links = "\n".join(f'<a href="#{a}">{html.escape(heading)}</a>' for a, heading, _ in sections)
    parts = (f'<h2 id="{a}">{html.escape(heading)}</h2>\n{body}' for a, heading, body in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title>
<style>{CSS}</style></head>
<body>
<h1>{html.escape(name)}</h1>
<p>Working directory: {html.escape(str(workdir))}</p>
{chr(10).join(f"<p>{html.escape(note)}</p>" for note in notes)}
<nav>
{links}
</nav>
{chr(10).join(parts)}
</body>
</html>
"""


def _result(workdir: Path) -> str:
    result = run_dir.finished(workdir)
    if result is None:
        return "<p>No result: the run is not finished.</p>"
    with run_dir.record_errors(workdir / run_dir.RESULT):
        return _table(result_rows(result) | {"training images": result["num_train"]})


def _start(number: int, start: Mapping[str, Any]) -> str:
    """What was installed at one start of the run, on what, and by which command."""
    rows = flatten_dict({**start}, sep=": ")
    texts = {k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in rows.items()}
    return f"<h3>Start {number}</h3>\n{_table(texts)}"


def _table(rows: Mapping[str, Any]) -> str:
    cells = ((html.escape(name), html.escape(str(value))) for name, value in rows.items())
    lines = (f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
    return "\n".join(["<table>", *lines, "</table>"])
