"""Weights to and from the Hugging Face hub: with their config, their record and a model card."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_resnet import metrics, models, provenance, storage
from flax_resnet.card import Trained, model_card
from flax_resnet.errors import UserError
from flax_resnet.licenses import License
from flax_resnet.pretrained import Pretrained, open_weights, write_weights
from flax_resnet.pretrained.hub import (
    WEIGHTS,
    Repo,
    commit_of,
    endpoint,
    explained,
    fetch_file,
    fetch_optional,
    library,
    offline,
    parse,
)
from flax_resnet.pretrained.load import open_run
from flax_resnet.record import from_record, to_record

CONFIG, CARD, RESULT = "config.json", "README.md", "result.json"
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
      license: of the weights, by the hub's word for it ("apache-2.0"), or a ``licenses.License``.
      private: of a new repository: only its owner sees it.
      revision: the branch to add the commit to, made where it is not there; None: main.
      message: of the commit.

    Returns:
      "hf://OWNER/NAME@COMMIT", which ``load`` takes as weights.

    Raises:
      UserError: bad arguments, weights that cannot be read, no token that may write, no network.
    """
    repo = _named(repo_id)
    license = License(license) if isinstance(license, str) else license
    client = library()
    if (why := offline()) is not None:
        raise UserError(f"{repo} cannot be pushed to, {why}: unset it, or write a folder (dry run)")
    if not message.strip():
        raise UserError("message='': expected what the commit is to be called")
    api = client.HfApi(endpoint=endpoint(), library_name="flax_resnet")
    with tempfile.TemporaryDirectory(prefix="flax_resnet_push_") as folder:
        paths = write_repository(source, repo_id, folder, license=license)
        with explained(repo, f"{repo} cannot be pushed to"):
            api.create_repo(repo.name, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo.name, branch=revision, exist_ok=True)
            there = set(api.list_repo_files(repo.name, revision=revision))
            gone = (there & set(OURS)) - {path.name for path in paths}
            commit = api.create_commit(
                repo.name,
                [
                    *(client.CommitOperationAdd(path.name, str(path)) for path in paths),
                    *(client.CommitOperationDelete(name) for name in sorted(gone)),
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
    """Writes what ``push_to_hub`` would upload; needs neither a network nor huggingface_hub.

    Args:
      source: as of ``push_to_hub``.
      repo_id: likewise; the card names it.
      directory: made where it is not there; files of these names are replaced.
      license: as of ``push_to_hub``.

    Returns:
      The files.

    Raises:
      UserError: bad arguments, weights that cannot be read, a directory that cannot be written.
    """
    repo, directory = _named(repo_id), Path(directory).expanduser()
    license = License(license) if isinstance(license, str) else license
    opened, trained, record = _opened(source)
    shape = _input_shape(opened, trained)
    texts = {
        CONFIG: _json(_config(opened, shape, record)),
        CARD: model_card(opened, repo.name, license, trained),
    }
    if trained is not None and trained.result is not None:
        texts[RESULT] = _json(trained.result)
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if RESULT not in texts:
            (directory / RESULT).unlink(missing_ok=True)
    write_weights(
        directory / WEIGHTS,
        opened.module,
        opened.variables,
        preprocessing=opened.preprocessing,
        class_names=opened.class_names,
        input_shape=shape,
    )
    with _writing(directory):
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in (WEIGHTS, *texts)]


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
      UserError: there is no such repository, revision or file, no network, or no room.
    """
    repo, directory = parse(repo_id), Path(directory).expanduser()
    with _writing(directory):
        if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
            raise UserError(f"{directory} is there already: name a directory that is not")
    weights = fetch_file(repo)
    pinned = dataclasses.replace(repo, revision=commit_of(weights) or repo.revision)
    others = [fetch_optional(pinned, name) for name in (CONFIG, CARD, RESULT, "LICENSE")]
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with _writing(directory):
            partial.mkdir(parents=True)
            for path in filter(None, [weights, *others]):
                shutil.copyfile(path, partial / path.name)
            partial.replace(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _named(repo_id: str) -> Repo:
    """A repository to push to: a revision is an argument of its own."""
    repo = parse(repo_id)
    if repo.revision is not None:
        raise UserError(f"{repo_id}: a commit is added to a branch: give it as the revision")
    return repo


def _opened(
    source: str | Path | Pretrained,
) -> tuple[Pretrained, Trained | None, Mapping[str, Any] | None]:
    """(the weights, the run they are of, what its config.json holds)."""
    if isinstance(source, Pretrained):
        return source, None, None
    workdir = Path(source).expanduser()
    if not workdir.is_dir():
        return open_weights(source), None, None
    opened, checkpoint = open_run(workdir)
    record, result = _read_json(workdir / CONFIG), _read_json(workdir / RESULT)
    if record is None:
        raise UserError(f"{workdir} holds no record of a run: expected its {CONFIG}")
    config = from_record(checkpoint["config"])
    evaluations = [line for line in metrics.read_metrics(workdir) if line["split"] == "eval"]
    trained = Trained(config, record.get("starts", ()), checkpoint, evaluations, result)
    return opened, trained, record


def _read_json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): mend or remove it") from error


def _input_shape(opened: Pretrained, trained: Trained | None) -> tuple[int, int, int]:
    if opened.preprocessing is None and trained is not None:
        return models.check_shape(trained.checkpoint["image_shape"])
    return opened.input_shape


def _config(
    opened: Pretrained, shape: tuple[int, int, int], record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """config.json: the network, what it takes and gives, and of a run its own config.json."""
    prepared = opened.preprocessing
    return {
        "library_name": "flax_resnet",
        "library_version": provenance.versions(["flax_resnet"])["flax_resnet"],
        "architecture": opened.name,
        "num_classes": getattr(opened.module, "num_classes", None),
        "input_shape": shape,
        "class_names": opened.class_names,
        "preprocessing": None if prepared is None else to_record(prepared),
        "model": to_record(opened.module),
        "training": _at_home(record),
    }


def _at_home(value: Any) -> Any:
    """JSON values with ~ for the home directory in every text."""
    if isinstance(value, Mapping):
        return {name: _at_home(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_at_home(inner) for inner in value]
    return provenance.without_home(value) if isinstance(value, str) else value


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


@contextlib.contextmanager
def _writing(directory: Path) -> Any:
    """Turns what the file system raises into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({storage.reason(error)})") from error
