"""The commands convert and export: weights and networks for use elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

from flax_resnet.cli.flags import Positional, Switch, flag
from flax_resnet.cli.weight_flags import PreparedFlags
from flax_resnet.errors import UserError
from flax_resnet.exporting.exports import PLATFORMS, check, convert, export


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(PreparedFlags):
    """Writes weights in another format: .safetensors has torchvision's names, .weights.h5 is
    Keras 3's, for the networks that Keras has.

    What images go through before and the classes' names are kept in the metadata of .safetensors;
    Keras's format has no place for them. The flags from --size on change what is kept.

    Examples:
      flax-resnet convert runs/digits digits.safetensors
      flax-resnet convert imagenet resnet50.weights.h5 --model ResNet50
    """

    source: Annotated[Positional[str], flag("SOURCE")]
    """A tag such as "imagenet" (with --model), a weight file (FILE#NAME for one of several networks
    in it), a run's working directory, or hf://OWNER/NAME[@REVISION]."""
    dest: Annotated[Positional[str], flag("DEST")]
    """File to write; it ends in .safetensors or .weights.h5."""
    overwrite: Switch = False
    """Replace DEST where it is there already."""


def convert_weights(settings: Convert) -> None:
    """``flax-resnet convert``."""
    dest = Path(settings.dest).expanduser()
    if dest.exists() and not settings.overwrite:  # said before anything is fetched
        raise UserError(f"{settings.dest} is there already: give another name, or --overwrite")
    print(convert(settings.open(settings.source), dest))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Convert):
    """Writes a trained network for use elsewhere, and prints how far its outputs are from the
    network's on real photographs; if that is too far, nothing is left.

    DEST says the format. A directory gets StableHLO: a program for any batch size with its
    weights, the classes' names, how images are prepared, and load.py, which runs it where jax
    and flatbuffers are installed, without this library. DEST.onnx is one file for onnxruntime,
    with the same inside (needs pip install 'flax_resnet[onnx]'). Both take uint8 images (batch,
    height, width, channels), resized and cropped, and normalise them. DEST.safetensors is what
    `convert` writes.

    Examples:
      flax-resnet export runs/digits digits_net
      flax-resnet export imagenet resnet50.onnx --model resnet50 --images PHOTOS
      flax-resnet export runs/digits digits.safetensors --overwrite
    """

    dest: Annotated[Positional[str], flag("DEST")]
    """A name that ends in .onnx or .safetensors, or a directory for StableHLO."""
    images: Annotated[tuple[str, ...], flag("IMAGE [IMAGE ...]", "scikit-learn's two")] = ()
    """Photographs, or folders of them, on which the difference is measured."""
    platforms: Annotated[tuple[str, ...], flag("NAME [NAME ...]", "cpu cuda tpu")] = PLATFORMS
    """What StableHLO is for; cpu is one of them."""
    tolerance: float = 1e-4
    """Largest difference of the outputs, as a share of the largest; above it nothing is kept."""


def export_network(settings: Export) -> None:
    """``flax-resnet export``."""
    dest = Path(settings.dest).expanduser()
    options = {n: getattr(settings, n) for n in ("platforms", "tolerance", "overwrite")}
    check(dest, **options)  # before anything is fetched
    print(export(settings.open(settings.source), dest, images=settings.images, **options))
