"""Weights uploaded to the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from flax_resnet.classify import flag
from flax_resnet.hub import CARD, MESSAGE, push_to_hub, write_repository


@dataclasses.dataclass(frozen=True)
class Settings:
    """Uploads weights to the Hugging Face hub in one commit: model.safetensors, config.json, of
    a run its result.json, and a model card written from its record. HF_TOKEN, or what `hf auth
    login` has saved, has to allow it. What a run was started with (command line, config,
    packages, devices) is published with it: look at it first with --dry-run.

    Examples:
      flax-resnet push runs/digits me/digits --license apache-2.0 --dry-run card
      flax-resnet push runs/digits me/digits --license apache-2.0 --private
      flax-resnet push net.safetensors me/net --license cc-by-4.0 --revision trial
    """

    source: Annotated[tyro.conf.Positional[str], flag("SOURCE")]
    """A run's working directory (its best checkpoint) or a weight file."""
    repository: Annotated[tyro.conf.Positional[str], flag("OWNER/NAME")]
    """Repository on the hub; it is made where it is not there."""
    license: Annotated[str, flag("ID")]
    """Of the weights, by the hub's word for it: apache-2.0, mit, cc-by-4.0, ..."""
    private: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """Make a new repository private."""
    revision: Annotated[str | None, flag("BRANCH", "main")] = None
    """Add the commit to this branch, made where it is not there."""
    message: Annotated[str, flag("TEXT")] = MESSAGE
    """Of the commit."""
    dry_run: Annotated[str | None, flag("DIR")] = None
    """Write the files into this directory and upload nothing; needs no network."""


def main(given: Settings) -> None:
    """``flax-resnet push``."""
    source, repository, license = given.source, given.repository, given.license
    if given.dry_run is not None:
        write_repository(source, repository, given.dry_run, license=license)
        print(f"card: {Path(given.dry_run).expanduser() / CARD}\nnothing was uploaded")
        return
    address = push_to_hub(
        source,
        repository,
        license=license,
        private=given.private,
        revision=given.revision,
        message=given.message,
    )
    print(f"pushed: {address}")
