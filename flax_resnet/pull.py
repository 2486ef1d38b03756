"""Weights and their card downloaded from the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from flax_resnet.classify import flag
from flax_resnet.hub import pull_from_hub


@dataclasses.dataclass(frozen=True)
class Settings:
    """Downloads weights, config, result and model card of a repository on the Hugging Face hub
    into a directory, all of one commit. With HF_HUB_OFFLINE=1 they come from the cache alone.

    Examples:
      flax-resnet pull me/digits digits
      python -m flax_resnet predict PHOTO.png --weights digits/model.safetensors
      python -m flax_resnet predict PHOTO.png --weights hf://me/digits
    """

    repository: Annotated[tyro.conf.Positional[str], flag("OWNER/NAME[@REVISION]")]
    """Repository on the hub, at a branch, a tag or a commit."""
    dest: Annotated[tyro.conf.Positional[str], flag("DEST")]
    """Directory to make."""


def main(given: Settings) -> None:
    """``flax-resnet pull``."""
    print(pull_from_hub(given.repository, given.dest))
