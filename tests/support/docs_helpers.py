"""The code blocks of a documentation page, and the small sets that they train on."""

import io
import itertools
import re
import shlex
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from helpers import class_folders
from PIL import Image

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETS = {
    "mnist": ("3.0.1", (28, 28, 1), 10),
    "cifar10": ("3.0.2", (32, 32, 3), 10),
    "cifar100": ("3.0.2", (32, 32, 3), 100),
}
"""Version, image shape and classes, as tfds has them."""
EXAMPLES = {"train": 48, "test": 16}


class Block(NamedTuple):
    """One fenced block.

    Attributes:
      language: after the fence, "python", "bash", "text" or a directive.
      text: what is in it.
      line: of the page, of the first line of the text.
      output: the "text" block that follows with nothing between, or None.
    """

    language: str
    text: str
    line: int
    output: str | None


def blocks(page):
    """The fenced blocks of a page, in order; what a Python block prints is part of it."""
    source, found, end = page.read_text(), [], 0
    for match in FENCE.finditer(source):
        language, text = match[1].strip(), match[2]
        between, end = source[end : match.start()].strip(), match.end()
        if language == "text" and not between and found and found[-1].language == "python":
            found[-1] = found[-1]._replace(output=text)
        else:
            line = source[: match.start()].count("\n") + 2
            found.append(Block(language, text, line, None))
    return found


def commands(block):
    """The command lines of a bash block, those that are continued joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def module_of(command):
    """What a command runs: "experiments.digits", "flax-resnet train", or None."""
    words = shlex.split(command)
    if words[0] == "flax-resnet":
        return " ".join(words[:2])
    modules = [word for flag, word in itertools.pairwise(words) if flag == "-m"]
    return modules[-1] if modules else None  # a launcher is followed by what it starts


def small_sets(directory):
    """Prepares noise under the names and versions of the tutorials' sets."""
    rng = np.random.default_rng(0)
    for name, (version, shape, classes) in SETS.items():
        prepare_noise(name, version, shape, classes, directory, rng)


def prepare_noise(name, version, shape, classes, directory, rng):
    def png():
        data = io.BytesIO()
        pixels = rng.integers(0, 256, shape, dtype=np.uint8).squeeze()
        Image.fromarray(pixels).save(data, format="png")
        return data.getvalue()

    class Noise(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        RELEASE_NOTES = {version: "noise"}
        pkg_dir_path = directory  # tfds looks there for a README of the set

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=classes),
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(n) for split, n in EXAMPLES.items()}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": png(), "label": i % classes}

    Noise.name = name
    tfds.disable_progress_bar()
    Noise(data_dir=str(directory), file_format="array_record").download_and_prepare()
    tfds.enable_progress_bar()


def small_photos(directory):
    """Three classes of six photographs of noise, split: DIR/train/CLASS, DIR/test/CLASS."""
    for split, count in {"train": 4, "test": 2}.items():
        class_folders(directory / split, ("cat", "dog", "owl"), count, (40, 48))
