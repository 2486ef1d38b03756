"""A run's directory: config.json, metrics.jsonl and result.json are written and read here alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.records.configs import from_record, untracked
from flax_resnet.records.files import error_as_one_line, replacing

CONFIG, METRICS, RESULT = "config.json", "metrics.jsonl", "result.json"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def record_errors(path: Path) -> AbstractContextManager[None]:
    """Turns whatever is wrong with a file of a run into a UserError of one line."""
    return error_as_one_line(
        lambda error: f"{path} is not a run's record ({error!r}): name another directory"
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The dict that ``write_json`` wrote; None where there is no such file."""
    with record_errors(path):
        return {**json.loads(path.read_text())} if path.exists() else None


def read_record(workdir: str | Path) -> dict[str, Any]:
    """Contents of config.json: "config" as JSON values, and "starts", a dict for each start.

    Raises:
      UserError: there is no run, or its record cannot be read.
    """
    path = Path(workdir).expanduser() / CONFIG
    record = read_json(path)
    if record is None:
        raise UserError(f"{workdir} holds no run: expected a {CONFIG} there")
    with record_errors(path):
        _ = record["config"]["class"], record["starts"]
    return record


def read_config(workdir: str | Path) -> Any:
    """TrainConfig of a run, with the default tracker; raises what ``read_record`` raises."""
    record = read_record(workdir)
    with record_errors(Path(workdir).expanduser() / CONFIG):
        return from_record(untracked(record["config"]))


def data_config(workdir: str | Path, config: Any, folder: str | None = None) -> Any:
    """The DataConfig of a run's TrainConfig, with the place where its folder of images is now.

    Raises:
      UserError: its folder is not there.
    """
    data = dataclasses.replace(config.data, folder=folder or config.data.folder)
    if data.folder is not None and not Path(data.folder).expanduser().is_dir():
        raise UserError(
            f"{workdir} was trained on the folder {config.data.folder}; {data.folder} is not "
            "there: name the place where the same images are now (--data.folder DIR)"
        )
    return data


def finished(workdir: Path) -> dict[str, Any] | None:
    """Contents of a finished run's result.json; None while the run is not finished."""
    return read_json(workdir / RESULT)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of a workdir's metrics.jsonl; a last line cut off by a crash is left out."""
    path, records = workdir / METRICS, []
    with record_errors(path):
        lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def variants(path: str | Path) -> list[tuple[str, list[Path]]]:
    """[(name, working directories of its seeds)] of a run, a variant or a sweep, else UserError."""
    path = Path(path).expanduser()
    if (path / CONFIG).is_file():
        return [(path.name, [path])]
    files = [*path.glob(f"seed*/{CONFIG}")] or [*path.glob(f"*/seed*/{CONFIG}")]
    if not files:
        raise UserError(
            f"{path} holds no run: expected a working directory ({CONFIG}), a variant "
            f"(seedN/{CONFIG}) or a sweep (VARIANT/seedN/{CONFIG})"
        )
    seeds = sorted((f.parent for f in files), key=lambda p: (p.parent, len(p.name), p.name))
    groups = itertools.groupby(seeds, lambda seed: seed.parent)
    return [(variant.name, [*members]) for variant, members in groups]
