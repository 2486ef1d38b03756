"""tfds builder for scikit-learn's bundled handwritten digits: real images, nothing to download.

Importing this module makes the name known to tfds, as tfds builders do; the library imports
it only when the set is asked for.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_EVERY = 5


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """1,797 images of 8x8 grey pixels, from the test set of UCI's optical digits (13 writers).

    scikit-learn names no split. Here every fifth image of each class, in file order, is the
    test split (355 images) and the others are the training split (1,442), so both hold every
    class in its own share and most likely every writer.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="scikit-learn's bundled 8x8 handwritten digits, grey levels 0 to 255.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = load_digits()
        for index in np.flatnonzero(test_rows(labels) == test):
            png = io.BytesIO()
            Image.fromarray(images[index, :, :, 0]).save(png, format="png")
            # tfds needs TensorFlow to encode an array, and none for encoded bytes.
            yield int(index), {"image": png.getvalue(), "label": int(labels[index])}


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """In file order: uint8 (1797, 8, 8, 1), 0..16 stretched to 0..255, and labels (1797,)."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    return images[..., None], bunch.target


def test_rows(labels: np.ndarray) -> np.ndarray:
    """Bool, True where an example is the fifth, tenth, ... of its class."""
    rows = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return rows
