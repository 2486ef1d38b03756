"""Weights written in another format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import tyro

from flax_resnet.classify import PreparedFlags, flag
from flax_resnet.errors import UserError
from flax_resnet.weights import Pretrained, write_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(PreparedFlags):
    """Writes weights in another format: .safetensors has torchvision's names, .weights.h5 is
    Keras 3's, for the networks that Keras has.

    What images go through before and the classes' names are kept in the metadata of .safetensors;
    Keras's format has no place for them. The flags from --size on change what is kept.

    Examples:
      flax-resnet convert runs/digits digits.safetensors
      flax-resnet convert imagenet resnet50.weights.h5 --model ResNet50
    """

    source: Annotated[tyro.conf.Positional[str], flag("SOURCE")]
    """A tag such as "imagenet" (with --model), a weight file, a run's working directory, or
    hf://OWNER/NAME[@REVISION]."""
    dest: Annotated[tyro.conf.Positional[str], flag("DEST")]
    """File to write; it ends in .safetensors or .weights.h5."""
    overwrite: Annotated[tyro.conf.FlagCreatePairsOff[bool], flag("")] = False
    """Replace DEST where it is there already."""


def main(settings: Settings) -> None:
    """``python -m flax_resnet convert``."""
    dest = Path(settings.dest).expanduser()
    if dest.exists() and not settings.overwrite:  # said before anything is fetched
        raise UserError(f"{settings.dest} is there already: give another name, or --overwrite")
    print(convert(settings.open(settings.source), dest))


def convert(opened: Pretrained, dest: str | Path) -> str:
    """``write_weights`` of an opened network; returns a line that says what was written."""
    write_weights(
        dest,
        opened.module,
        opened.variables,
        preprocessing=opened.preprocessing,
        class_names=opened.class_names,
        input_shape=opened.input_shape,
    )
    parameters = sum(x.size for x in jax.tree.leaves(opened.variables["params"]))
    return f"{opened.name}, {parameters:,} parameters, written to {dest}"
