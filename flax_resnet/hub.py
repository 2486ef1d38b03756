"""Weights to and from the Hugging Face hub: with their config, their record and a model card."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_resnet import metrics, provenance
from flax_resnet.card import License, Trained, model_card
from flax_resnet.errors import UserError
from flax_resnet.pretrained import Pretrained, open_weights, write_weights
from flax_resnet.pretrained.fetch import offline
from flax_resnet.pretrained.hub import (
    CONFIG,
    WEIGHTS,
    Repo,
    client,
    fetch_folder,
    one_line,
    parse,
)
from flax_resnet.pretrained.load import open_run
from flax_resnet.record import from_record, to_record

CARD, RESULT = "README.md", "result.json"
OURS = (WEIGHTS, CONFIG, CARD, RESULT)
"""The files of a repository that a push writes, and a pull reads."""
MESSAGE = "Weights, config and card, by flax_resnet"


def push_to_hub(
    source: str | Path | Pretrained,
    repo_id: str,
    *,
    license: str | License,
    private: bool = False,
    revision: str | None = None,
    message: str = MESSAGE,
) -> str:
    """Uploads weights, their config and a model card to the hub, in one commit.

    A repository that is not there yet is made; of one that is, the older commits stay. Files of a
    run are model.safetensors (its best checkpoint), config.json, result.json and README.md, the
    card. The record of a run is published with them: its command line, config, packages and
    devices, with ~ for the home directory. ``write_repository`` shows it all beforehand.

    Args:
      source: a run's working directory, a weight file, "hf://OWNER/NAME", or opened weights.
      repo_id: OWNER/NAME.
      license: of the weights, by the hub's word for it ("apache-2.0"), or a ``card.License``.
      private: of a new repository: only its owner sees it.
      revision: the branch to add the commit to, made where it is not there; None: main.
      message: of the commit.

    Returns:
      "hf://OWNER/NAME@COMMIT", which ``load`` takes as weights.

    Raises:
      UserError: bad arguments, weights that cannot be read, a licence that the hub does not know,
        no token that may write, no network.
    """
    repo, api = _named(repo_id), client()
    if (variable := offline()) is not None:
        raise UserError(
            f"{repo} cannot be pushed to, {variable} is set: unset it, or write a folder (dry run)"
        )
    if not message.strip():
        raise UserError("message='': expected what the commit is to be called")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with tempfile.TemporaryDirectory(prefix="flax_resnet_push_") as folder:
        paths = write_repository(source, repo_id, folder, license=license)
        with one_line(f"{repo} cannot be pushed to"):
            api.create_repo(repo.name, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo.name, branch=revision, exist_ok=True)
            present = {*api.list_repo_files(repo.name, revision=revision)}
            stale = present.intersection(OURS).difference(path.name for path in paths)
            commit = api.create_commit(  # upload_folder neither checks a card nor makes one commit
                repo.name,
                [
                    *(CommitOperationAdd(path.name, str(path)) for path in paths),
                    *(CommitOperationDelete(name) for name in sorted(stale)),
                ],
                commit_message=message,
                revision=revision,
            )
    return f"{repo}@{commit.oid}"


def write_repository(
    source: str | Path | Pretrained,
    repo_id: str,
    directory: str | Path,
    *,
    license: str | License,
) -> list[Path]:
    """Writes what ``push_to_hub`` would upload; needs huggingface_hub and no network.

    Args:
      source: as of ``push_to_hub``.
      repo_id: as of ``push_to_hub``; the card names it.
      directory: made where it is not there; files of these names are replaced.
      license: as of ``push_to_hub``.

    Returns:
      The files.

    Raises:
      UserError: bad arguments, weights that cannot be read, a directory that cannot be written.
    """
    repo, directory = _named(repo_id), Path(directory).expanduser()
    license = License(license) if isinstance(license, str) else license
    opened, trained, record, result = _opened(source)
    prepared = opened.preprocessing
    shape = trained.checkpoint["image_shape"] if trained is not None else None
    shape = prepared.shape if prepared is not None else shape
    config = {
        "library_name": "flax_resnet",
        "library_version": provenance.versions(["flax_resnet"])["flax_resnet"],
        "architecture": opened.name,
        "num_classes": getattr(opened.module, "num_classes", None),
        "input_shape": shape,
        "class_names": opened.class_names,
        "preprocessing": None if prepared is None else to_record(prepared),
        "model": to_record(opened.module),
        "training": record,
    }
    card = model_card(opened, repo.name, license, trained)
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CARD).write_text(card, encoding="utf-8")
        (directory / RESULT).unlink(missing_ok=True)
        for name, value in ((CONFIG, config), (RESULT, result)):
            if value is not None:
                (directory / name).write_text(json.dumps(value, indent=2) + "\n")
    write_weights(
        directory / WEIGHTS,
        opened.module,
        opened.variables,
        preprocessing=prepared,
        class_names=opened.class_names,
        input_shape=shape and tuple(shape),
    )
    return [directory / name for name in OURS if (directory / name).exists()]


def pull_from_hub(repo_id: str, directory: str | Path) -> Path:
    """Downloads a repository's weights, config, record and card, all of one commit.

    They come through huggingface_hub's cache, and out of it alone where the network is not to be
    used; each is compared with the hub's hash. The directory is written whole or not at all.

    Args:
      repo_id: OWNER/NAME or OWNER/NAME@REVISION, with hf:// before it or not.
      directory: to make; it is not there yet, or empty.

    Returns:
      The directory, with model.safetensors and what there is of config.json, result.json,
      README.md and LICENSE.

    Raises:
      UserError: there is no such repository, revision or file, no network, or no disk space.
    """
    repo, directory = parse(repo_id), Path(directory).expanduser()
    with _writing(directory):
        if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
            raise UserError(f"{directory} is there already: name a directory that is not")
    names = (*OURS, "LICENSE")
    folder = fetch_folder(repo, names)
    with _writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".pull_") as temporary:
            complete = Path(temporary) / "complete"
            complete.mkdir()
            for name in names:
                if (folder / name).exists():
                    shutil.copyfile(folder / name, complete / name)
            complete.replace(directory)
    return directory


def _named(repo_id: str) -> Repo:
    """A repository to push to: a revision is an argument of its own."""
    repo = parse(repo_id)
    if repo.revision is not None:
        raise UserError(f"{repo_id}: a commit is added to a branch: give it as the revision")
    return repo


def _opened(
    source: str | Path | Pretrained,
) -> tuple[Pretrained, Trained | None, Any, Any]:
    """(the weights, the run they are of, the content of its config.json and its result.json)."""
    if isinstance(source, Pretrained):
        return source, None, None, None
    workdir = Path(source).expanduser()
    if not workdir.is_dir():
        return open_weights(source), None, None, None
    opened, checkpoint = open_run(workdir)
    record, result = _read_json(workdir / CONFIG), _read_json(workdir / RESULT)
    if record is None:
        raise UserError(f"{workdir} holds no record of a run: expected its {CONFIG}")
    config = from_record(json.loads(without_home(json.dumps(checkpoint["config"]))))
    evaluations = [line for line in metrics.read_metrics(workdir) if line["split"] == "eval"]
    return opened, Trained(config, checkpoint, evaluations), record, result


def _read_json(path: Path) -> Any:
    """Content of a file, with ~ for the home directory; None where there is no such file."""
    try:
        return json.loads(without_home(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): mend or remove it") from error


def without_home(text: str) -> str:
    """A text with ~ for the user's home directory, which is nobody else's business."""
    home = str(Path.home())
    return re.sub(re.escape(home) + r"(?![\w.-])", "~", text) if len(home) > 1 else text


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Turns what the file system raises into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error}): free space there, or name "
                        "another directory") from error  # fmt: skip
