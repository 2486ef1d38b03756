"""A run in one HTML file: its result, its record and all its pictures. It opens offline."""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_resnet import figures, metrics, tables
from flax_resnet.classify import flag, writing
from flax_resnet.errors import UserError, check_choices
from flax_resnet.inspection import PARTS, Part, Session, open_run, read_record
from flax_resnet.inspection.opened import Which
from flax_resnet.models import network_name
from flax_resnet.record import flatten

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-top: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left; overflow-wrap: anywhere; }
th { font-weight: normal; background: #f4f4f4; }
img { max-width: 100%; height: auto; } figure { margin: 1em 0; }
.absent { color: #777; font-style: italic; } nav a { margin-right: 1em; }
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
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """A run as an HTML page with everything in it.

    What cannot be drawn (the data have gone, the network has no maps) is said in a line at its
    place.

    Args:
      workdir: of a run.
      checkpoint: "best" by evaluation top-1, or "latest".
      images: files and folders for feature maps and Grad-CAM; else images of the evaluation split.
      lr_finder: run the learning-rate finder too, which trains for up to 100 steps.
      seed: of t-SNE.
      say: is given a line for each picture that begins.

    Returns:
      The page.

    Raises:
      UserError: there is no run.
    """
    workdir = Path(workdir).expanduser()
    config, record = read_record(workdir)
    name = f"{network_name(config.model)} on {config.data.title}, seed {config.seed}"
    records = metrics.read_metrics(workdir)

    def draw_curves(path: Path) -> str:
        if not records:
            raise UserError(f"{workdir} has no lines in metrics.jsonl yet")
        figures.curves(records, path, name)
        return "Training figures are of augmented batches, each the mean since the line before."

    @functools.cache
    def session() -> Session:
        return Session(open_run(workdir, checkpoint), tuple(images), seed=seed, say=say)

    def draw(part: Part, path: Path) -> str:
        say(part.heading)
        return part.draw(session(), path)

    pictures = [
        _picture(anchor, part.heading, functools.partial(draw, part))
        for anchor, part in PARTS.items()
        if anchor != "lr" or lr_finder
    ]
    return _page(
        name,
        workdir,
        [
            ("result", "Result", _result(workdir)),
            _picture("curves", "Curves", draw_curves),
            *pictures,
            ("config", "Config", _table(flatten(record["config"]).items())),
            ("environment", "Environment", "\n".join(_starts(record.get("starts", [])))),
        ],
    )


def _picture(name: str, heading: str, draw: Callable[[Path], str]) -> Section:
    """The section of a picture, or of the reason why there is none."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figure.png"
        try:
            caption = html.escape(draw(path))
        except UserError as error:
            return name, heading, _absent(error)
        data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
    figure = f"<figure>{image}\n<figcaption>{caption}</figcaption></figure>"
    return name, heading, figure


def _absent(reason: object, what: str = "Not drawn") -> str:
    return f'<p class="absent">{html.escape(f"{what}: {reason}")}</p>'


def _page(name: str, workdir: Path, sections: Sequence[Section]) -> str:
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
<nav>
{links}
</nav>
{chr(10).join(parts)}
</body>
</html>
"""


def _result(workdir: Path) -> str:
    try:
        found = json.loads((workdir / "result.json").read_text())
        rows = tables.result_rows(found) | {"training images": found["num_train"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "the run is not finished" if isinstance(error, OSError) else repr(error)
        return _absent(f"{reason}.", "No result")
    return _table(rows.items())


def _starts(starts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for number, start in enumerate(starts, 1):
        rows: dict[str, Any] = {}
        for name, value in start.items():
            if isinstance(value, Mapping):
                rows |= {f"{name}: {inner}": v for inner, v in value.items()}
            else:
                rows[name] = " ".join(map(str, value)) if isinstance(value, list) else value
        yield f"<h3>Start {number}</h3>\n{_table(rows.items())}"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return "\n".join(["<table>", *lines, "</table>"])


@dataclasses.dataclass(frozen=True)
class Settings:
    """Writes one HTML file with a run's result, config and environment, its curves, confusion
    matrix and reliability diagram, its worst-classified examples, filters, feature maps,
    Grad-CAM, an embedding of its features, and augmented training images. It needs no network
    to open.

    Examples:
      flax-resnet report runs/digits
      flax-resnet report runs/digits --images PHOTOS --lr-finder --output digits.html
    """

    workdir: Annotated[tyro.conf.Positional[str], flag("WORKDIR")]
    """A run's working directory."""
    output: Annotated[str | None, flag("FILE.html", "WORKDIR/report.html")] = None
    """The file to write, whole or not at all."""
    checkpoint: Which = "best"
    """Look at the best checkpoint by evaluation top-1, or at the latest."""
    images: Annotated[tuple[str, ...], flag("PATH [PATH ...]", "the evaluation split's")] = ()
    """Images, or folders of them, of any size, for feature maps and Grad-CAM."""
    lr_finder: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """Run the learning-rate finder too, which trains for up to 100 steps."""
    seed: int = 0
    """Of t-SNE."""

    def __post_init__(self) -> None:
        check_choices(self)


def main(settings: Settings) -> None:
    """``python -m flax_resnet report``."""
    read_record(settings.workdir)  # before the output is opened
    output = settings.output or str(Path(settings.workdir) / "report.html")
    with writing(output) as file:
        page = report(
            settings.workdir,
            checkpoint=settings.checkpoint,
            images=settings.images,
            lr_finder=settings.lr_finder,
            seed=settings.seed,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        file.write(page)
    print(f"report: {output}")
