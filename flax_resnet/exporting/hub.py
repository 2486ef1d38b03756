"""Weights to and from the Hugging Face hub: with their config, their record and a model card."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flax_resnet.errors import UserError
from flax_resnet.exporting.card import Trained, model_card
from flax_resnet.records import provenance
from flax_resnet.records.configs import from_record, to_record, untracked
from flax_resnet.records.files import os_error_as_one_line, replacing_tree, shown
from flax_resnet.records.run_dir import finished, read_metrics, read_record
from flax_resnet.weights import Pretrained, open_weights, write_weights
from flax_resnet.weights.hub import CONFIG, PREFIX, WEIGHTS, client, fetch_folder, one_line, parse
from flax_resnet.weights.loading import open_run_weights
from flax_resnet.weights.published_cache import offline

CARD, RESULT = "README.md", "result.json"
MESSAGE = "Weights, config and card, by flax_resnet"


def push_to_hub(
    source: str | Path | Pretrained,
    repo_id: str,
    *,
    license: str,
    private: bool = False,
    revision: str | None = None,
    message: str = MESSAGE,
) -> str:
    """Uploads weights, their config and a model card to the hub, in one commit.

    A repository that is not there yet is made; of one that is, the older commits stay. The record
    of a run is published with its weights: its command line, config, packages and devices, with ~
    for the home directory. ``write_repository`` shows it all beforehand.

    Args:
      source: a run's working directory (its best checkpoint), a weight file, "hf://OWNER/NAME", or
        opened weights.
      repo_id: OWNER/NAME.
      license: of the weights, by the hub's word for it ("apache-2.0").
      private: of a new repository: only its owner sees it.
      revision: the branch to add the commit to, made where it is not there; None: main.
      message: of the commit.

    Returns:
      "hf://OWNER/NAME@COMMIT", which ``load`` takes as weights.

    Raises:
      UserError: weights that cannot be read, or the hub refuses them or cannot be reached.
    """
    (name, given), api, variable = parse(repo_id), client(), offline()
    if given is not None:
        raise UserError(f"{repo_id}: a commit is added to a branch: give it as the revision")
    if variable is not None:
        raise UserError(f"{repo_id} cannot be pushed to: {variable} is set")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with tempfile.TemporaryDirectory(prefix="flax_resnet_push_") as folder:
        paths = write_repository(source, name, folder, license=license)
        with one_line(f"{PREFIX}{name} cannot be pushed to"):
            api.create_repo(name, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(name, branch=revision, exist_ok=True)
            files: list[Any] = [CommitOperationAdd(path.name, str(path)) for path in paths]
            if api.file_exists(name, RESULT, revision=revision):
                files.append(CommitOperationDelete(RESULT))  # of a version that pushed it apart
            # upload_folder makes several commits where hf_xet is installed.
            commit = api.create_commit(name, files, commit_message=message, revision=revision)
    return f"{PREFIX}{name}@{commit.oid}"


def write_repository(
    source: str | Path | Pretrained, repo_id: str, directory: str | Path, *, license: str
) -> list[Path]:
    """Writes what ``push_to_hub`` would upload; needs huggingface_hub and no network.

    Args:
      source, repo_id, license: as of ``push_to_hub``.
      directory: made where it is not there; files of these names are replaced.

    Returns:
      The files: model.safetensors, README.md (the card) and config.json.
    """
    name, directory = parse(repo_id)[0], Path(directory).expanduser()
    opened, trained, record, result = _opened(source)
    prepared = opened.preprocessing
    shape = tuple(trained.checkpoint["image_shape"]) if trained else opened.input_shape
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
        "result": result,
    }
    card = model_card(opened, name, license, trained)
    with os_error_as_one_line(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CARD).write_text(shown(card), encoding="utf-8")
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    about: dict[str, Any] = {"preprocessing": prepared, "class_names": opened.class_names}
    write_weights(directory / WEIGHTS, opened.module, opened.variables, input_shape=shape, **about)
    return [directory / file for file in (WEIGHTS, CARD, CONFIG)]


def pull_from_hub(repo_id: str, directory: str | Path) -> Path:
    """Downloads a repository's weights, config, record and card, all of one commit.

    They come through huggingface_hub's cache, and each is compared with the hub's hash. The
    directory is written whole or not at all.

    Args:
      repo_id: OWNER/NAME or OWNER/NAME@REVISION, with hf:// before it or not.
      directory: to make; it is not there yet, or empty.

    Returns:
      The directory, with model.safetensors and what there is of config.json, README.md, LICENSE,
      and result.json (of earlier versions).

    Raises:
      UserError: there is no such repository, revision or file, no network, or no disk space.
    """
    directory, names = Path(directory).expanduser(), [WEIGHTS, CONFIG, CARD, RESULT, "LICENSE"]
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise UserError(f"{directory} is there already: name a directory that is not")
    folder = fetch_folder(f"{PREFIX}{repo_id.removeprefix(PREFIX)}", names)
    with os_error_as_one_line(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with replacing_tree(directory) as partial:
            shutil.copytree(folder, partial, ignore=lambda _, found: {*found} - {*names})
    return directory


def _opened(source: str | Path | Pretrained) -> tuple[Pretrained, Trained | None, Any, Any]:
    """(the weights, the run they are of, the content of its config.json and its result.json)."""
    if isinstance(source, Pretrained):
        return source, None, None, None
    workdir = Path(source).expanduser()
    if not workdir.is_dir():
        return open_weights(source), None, None, None
    opened, checkpoint = open_run_weights(workdir)
    home = re.escape(str(Path.home())) + r"(?![\w.-])"  # which is nobody else's business
    text = json.dumps([read_record(workdir), finished(workdir)], ensure_ascii=False)
    record, result = json.loads(re.sub(home, "~", text))
    config = from_record(untracked(record["config"]))
    evaluations = [line for line in read_metrics(workdir) if line["split"] == "eval"]
    return opened, Trained(config, checkpoint, evaluations), record, result
