"""The first training of somebody's images: five small folders, by `flax-resnet train FOLDER`.

Claim: none; the table says what the config that ``train`` makes from the images reaches on
scikit-learn's digits as PNG files, on crops of its two photographs, and on a part of CIFAR-10 (of
a JPEG copy, where the images in DATA are JPEGs). One image in five of each class is held out.

Command: python -m experiments.first_photographs DIR --data-dir DATA --before CHECKOUT
Hardware: a 2-core CPU.
Published: none.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flax_resnet.data import sources
from flax_resnet.data.sklearn_digits import load_digits
from flax_resnet.records.text_tables import markdown_table
from flax_resnet.studies.tables import plus_minus

ROOT = Path(__file__).parents[1]
CROP = 128
"""Side of a photograph's crops, in pixels; neighbours share half of it."""
CROPS = "crops of two photographs"
FLAGS = {CROPS: ("--num-epochs 3", "--data.image-size 64")}
"""Flags of each training on a folder; none where it is not named."""


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the folders, trains on each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="gets the folders and the runs")
    parser.add_argument("--data-dir", help="directory that holds cifar10/VERSION; else without it")
    parser.add_argument("--before", type=Path, help="another checkout to train with, beside this")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args(argv)
    checkouts = {"before": asked.before, "after": ROOT} if asked.before else {"after": ROOT}
    pairs = [f"{what}, {name}" for name in checkouts for what in ("steps", "top-1, %")]
    rows = []
    for folder in make_folders(asked.directory / "images", asked.data_dir):
        counts = [len(list(directory.iterdir())) for directory in folder.iterdir()]
        for flags in FLAGS.get(folder.name, ("",)):
            title = f"{folder.name} {flags}".strip()
            rows.append([title, str(len(counts)), str(sum(counts))])
            for name, checkout in checkouts.items():
                workdir = asked.directory / name / title
                command = [
                    sys.executable,
                    "-m",
                    "flax_resnet",
                    "train",
                    str(folder),
                    *flags.split(),
                ]
                command += ["--num-seeds", str(asked.seeds), "--workdir", str(workdir)]
                environment = {**os.environ, "PYTHONPATH": str(checkout)}
                subprocess.run(command, check=True, env=environment, cwd=checkout)
                results = [json.loads(path.read_text()) for path in workdir.glob("**/result.json")]
                top1 = plus_minus([100 * result["top1"] for result in results], 1)
                rows[-1] += [str(results[0]["step"]), top1]
    print(markdown_table(["folder", "classes", "images", *pairs], rows))


def make_folders(root: Path, data_dir: str | None) -> Iterable[Path]:
    """Writes the sets as root/SET/CLASS/*.png, and gives the folder of each."""
    images, labels = load_digits()
    for count in (20, 100, None):
        name = f"digits, {count} a class" if count else "digits, all"
        yield write(root / name, images[..., 0], labels, map(str, range(10)), count)
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # both 427 x 640
    windows = [np.s_[top : top + CROP, left : left + CROP]
               for top in range(0, 427 - CROP, CROP // 2)
               for left in range(0, 640 - CROP + 1, CROP // 2)]  # fmt: skip
    crops = np.stack([image[window] for image in photographs for window in windows])
    labels = np.repeat([0, 1], len(windows))
    yield write(root / CROPS, crops, labels, ["temple", "flower"], 40)
    if data_dir is None:
        print("without --data-dir: CIFAR-10 is left out", file=sys.stderr)
    else:
        (source,) = sources.open_tfds("cifar10", data_dir, ["train"])
        encoded, labels = source.read(range(4000))
        opened = [Image.open(io.BytesIO(data)) for data in encoded]
        copy = " (JPEG copy)" if opened[0].format == "JPEG" else ""
        images = np.stack([np.asarray(image) for image in opened])
        folder = root / f"CIFAR-10{copy}, 200 a class"
        yield write(folder, images, labels, source.class_names, 200)


def write(folder: Path, images, labels, names: Iterable[str], count: int | None) -> Path:
    """Writes the first ``count`` images of each class as PNG files; returns the folder."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images[labels == label][:count]):
            Image.fromarray(image).save(folder / name / f"{number:04d}.png")
    return folder


if __name__ == "__main__":
    main()
