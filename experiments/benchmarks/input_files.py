"""The files that the benchmark of input reads: real photographs, in a folder and as ArrayRecord."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUALITIES = (80, 90, 95)
RECORDS = "photographs"
"""The name of the tfds set beside the folder's splits."""


def originals() -> list[Image.Image]:
    """Real photographs that are installed."""
    from sklearn.datasets import load_sample_images

    found = list(load_sample_images().images)
    with contextlib.suppress(ImportError):
        from skimage import data

        found += [data.astronaut(), data.coffee(), data.chelsea()]
    return [Image.fromarray(pixels) for pixels in found]


def make_photographs(folder: Path, count: int, long_side: int) -> dict[str, int]:
    """Writes photographs of two classes as train/CLASS/NAME.jpg, and two as test.

    One in four stands upright; one in three has its colours at full resolution.

    Returns:
      How many, of how many originals, and their mean size in bytes.
    """
    rng, sources = np.random.default_rng(0), originals()
    sizes = []
    for number in range(count + 2):
        split = "train" if number < count else "test"
        path = folder / split / f"class{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = long_side, 3 * long_side // 4
        if number % 4 == 3:
            width, height = height, width
        image = _window(sources[number % len(sources)], width, height, rng)
        quality = int(rng.choice(QUALITIES))
        image.save(path, quality=quality, subsampling=2 if number % 3 else 0)
        sizes.append(path.stat().st_size)
    return {"count": count, "originals": len(sources), "mean_bytes": round(sum(sizes) / len(sizes))}


def _window(image: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A random part of a photograph, perhaps mirrored; it is enlarged where it is too small."""
    scale = max(1.0, width / image.width, height / image.height)
    if scale > 1:
        enlarged = [round(scale * side + 0.5) for side in image.size]
        image = image.resize((enlarged[0], enlarged[1]), Image.Resampling.BICUBIC)
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    part = image.crop((left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def make_records(folder: Path) -> None:
    """Writes the files of a folder, bit for bit, as a tfds set stored as ArrayRecord, in it."""
    import tensorflow_datasets as tfds

    class Photographs(
        tfds.core.GeneratorBasedBuilder,
        skip_registration=True,  # type: ignore[call-arg]
    ):
        """As tfds's ImageNet is: JPEG files of any size with their labels."""

        VERSION = tfds.core.Version("1.0.0")
        name = RECORDS

        def _info(self) -> tfds.core.DatasetInfo:
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=2)}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in ("train", "test")}

        def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
            for path in sorted((folder / split).glob("class*/*.jpg")):
                label = int(path.parent.name.removeprefix("class"))
                yield path.stem, {"image": path.read_bytes(), "label": label}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(None):
        Photographs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    tfds.enable_progress_bar()
