"""The commands push and pull: weights to and from the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from flax_resnet.cli.flags import Positional, Switch, flag
from flax_resnet.exporting.hub import CARD, pull_from_hub, push_to_hub, write_repository


@dataclasses.dataclass(frozen=True)
class Push:
    """Uploads weights to the Hugging Face hub in one commit: model.safetensors, config.json with
    the record and result of a run, and a model card. HF_TOKEN, or what `hf auth login` has saved,
    has to allow it. What a run was started with (command line, config, packages, devices) is
    published with it: look at it first with --dry-run.

    Examples:
      flax-resnet push runs/digits me/digits --license apache-2.0 --dry-run card
      flax-resnet push runs/digits me/digits --license apache-2.0 --private
      flax-resnet push net.safetensors me/net --license cc-by-4.0 --revision trial
    """

    source: Annotated[Positional[str], flag("SOURCE")]
    """A run's working directory (its best checkpoint) or a weight file."""
    repository: Annotated[Positional[str], flag("OWNER/NAME")]
    """Repository on the hub; it is made where it is not there."""
    license: Annotated[str, flag("ID")]
    """Of the weights, by the hub's word for it: apache-2.0, mit, cc-by-4.0, ..."""
    private: Switch = False
    """Make a new repository private."""
    revision: Annotated[str | None, flag("BRANCH", "main")] = None
    """Add the commit to this branch, made where it is not there."""
    dry_run: Annotated[str | None, flag("DIR")] = None
    """Write the files into this directory and upload nothing; needs no network."""


def push(settings: Push) -> None:
    """``flax-resnet push``."""
    options = dataclasses.asdict(settings)
    source, repository = options.pop("source"), options.pop("repository")
    directory = options.pop("dry_run")
    if directory is not None:
        write_repository(source, repository, directory, license=settings.license)
        print(f"card: {Path(directory).expanduser() / CARD}\nnothing was uploaded")
    else:
        print("pushed:", push_to_hub(source, repository, **options))


@dataclasses.dataclass(frozen=True)
class Pull:
    """Downloads weights, config and model card of a repository on the Hugging Face hub
    into a directory, all of one commit. With HF_HUB_OFFLINE=1 they come from the cache alone.

    Examples:
      flax-resnet pull me/digits digits
      flax-resnet predict PHOTO.png --weights digits/model.safetensors
    """

    repository: Annotated[Positional[str], flag("OWNER/NAME[@REVISION]")]
    """Repository on the hub, at a branch, a tag or a commit."""
    dest: Annotated[Positional[str], flag("DEST")]
    """Directory to make."""


def pull(settings: Pull) -> None:
    """``flax-resnet pull``."""
    print(pull_from_hub(settings.repository, settings.dest))
