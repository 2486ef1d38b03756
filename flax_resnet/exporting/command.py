"""``flax-resnet export``: a trained network with its preprocessing, for use elsewhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from flax_resnet import convert
from flax_resnet.classify import flag
from flax_resnet.exporting.exports import PLATFORMS, check, export


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(convert.Settings):
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

    dest: Annotated[tyro.conf.Positional[str], flag("DEST")]
    """A name that ends in .onnx or .safetensors, or a directory for StableHLO."""
    images: Annotated[tuple[str, ...], flag("IMAGE [IMAGE ...]", "scikit-learn's two")] = ()
    """Photographs, or folders of them, on which the difference is measured."""
    platforms: Annotated[tuple[str, ...], flag("NAME [NAME ...]", "cpu cuda tpu")] = PLATFORMS
    """What StableHLO is for; cpu is one of them."""
    tolerance: float = 1e-4
    """Largest difference of the outputs, as a share of the largest; above it nothing is kept."""


def main(settings: Settings) -> None:
    """Runs the command."""
    dest, platforms, tolerance = settings.dest, settings.platforms, settings.tolerance
    check(Path(dest).expanduser(), platforms, tolerance, settings.overwrite)
    exported = export(
        settings.open(settings.source),
        dest,
        images=settings.images,
        platforms=platforms,
        tolerance=tolerance,
        overwrite=settings.overwrite,
    )
    print(exported)
