"""The first training of somebody's images: five small folders, by `flax-resnet train FOLDER`.

Claim: none; the table says what the config that ``train`` makes from the images reaches, on
scikit-learn's digits as PNG files, on crops of its two photographs, and on a part of CIFAR-10.
One image in five of each class is held out.

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
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from flax_resnet.data import sources
from flax_resnet.data.sklearn_digits import load_digits
from flax_resnet.errors import UserError

ROOT = Path(__file__).parents[1]
CROP = 128
"""Side of a photograph's crops, in pixels; neighbours share half of it."""
CROPS = "crops of two photographs"
RUNS = {
    "digits, 20 a class": [""],
    "digits, 100 a class": [""],
    "digits, all": [""],
    CROPS: ["--num-epochs 3", "--data.image-size 64"],
    "CIFAR-10, 200 a class": [""],
}
"""Flags of each training, by folder."""


def main(argv: list[str] | None = None) -> None:
    """Makes the folders, trains on each, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="gets the folders and the runs")
    parser.add_argument("--data-dir", help="directory that holds cifar10/VERSION")
    parser.add_argument("--before", type=Path, help="another checkout to train with, beside this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="after --: flags of flax-resnet train")
    asked = parser.parse_args(argv)
    checkouts = {"before": asked.before, "after": ROOT} if asked.before else {"after": ROOT}
    columns = " | ".join(f"steps, {name} | top-1, {name}" for name in checkouts)
    print(f"| folder | classes | images | {columns} |\n|{' --- |' * (3 + 2 * len(checkouts))}")
    for folder in make_folders(asked.directory / "images", asked.data_dir):
        classes = [len(list(one.iterdir())) for one in folder.iterdir()]
        for flags in RUNS[folder.name]:
            cells = [f"{folder.name} `{flags}`" if flags else folder.name]
            cells += [str(len(classes)), str(sum(classes))]
            for name, checkout in checkouts.items():
                workdir = asked.directory / name / f"{folder.name}{flags.replace(' ', '=')}"
                command = [*flags.split(), *asked.flags]
                cells += train(checkout, folder, workdir, asked.seeds, command)
            print(f"| {' | '.join(cells)} |", flush=True)


def make_folders(root: Path, data_dir: str | None) -> Iterable[Path]:
    """Writes the sets as root/SET/CLASS/*.png, and gives the folder of each."""
    images, labels = load_digits()
    for count in (20, 100, None):
        name = f"digits, {count} a class" if count else "digits, all"
        yield write(root / name, images[..., 0], labels, [str(digit) for digit in range(10)], count)
    crops, labels = photographs()
    yield write(root / CROPS, crops, labels, ["temple", "flower"], 40)
    try:
        source = sources.open_tfds("cifar10", data_dir, ["train"])[0]
    except UserError as error:
        print(f"CIFAR-10 is left out: {error}", file=sys.stderr)
        return
    encoded, labels = source.read(range(4000))
    images = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in encoded])
    yield write(root / "CIFAR-10, 200 a class", images, labels, source.class_names, 200)


def photographs() -> tuple[np.ndarray, np.ndarray]:
    """(crops uint8 (N, CROP, CROP, 3), labels (N,)) of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    crops, labels = [], []
    for label, image in enumerate(load_sample_images().images):
        for top in range(0, image.shape[0] - CROP + 1, CROP // 2):
            for left in range(0, image.shape[1] - CROP + 1, CROP // 2):
                crops.append(image[top : top + CROP, left : left + CROP])
                labels.append(label)
    return np.stack(crops), np.array(labels)


def write(folder: Path, images, labels, names, count: int | None) -> Path:
    """Writes the first ``count`` images of each class as PNG files; returns the folder."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images[labels == label][:count]):
            Image.fromarray(image).save(folder / name / f"{number:04d}.png")
    return folder


def train(checkout: Path, folder: Path, workdir: Path, seeds: int, flags: list[str]) -> list[str]:
    """[steps, top-1 over the seeds as mean and range], of ``flax-resnet train FOLDER``."""
    command = [sys.executable, "-m", "flax_resnet", "train", str(folder), *flags]
    command += ["--num-seeds", str(seeds), "--workdir", str(workdir)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, check=True, env=environment, cwd=checkout, stdout=sys.stderr)
    paths = sorted(workdir.glob("**/result.json"))  # one seed has no directory of its own
    results = [json.loads(path.read_text()) for path in paths]
    top1 = 100 * np.array([result["top1"] for result in results])
    scores = f"{top1.mean():.1f} ({top1.min():.1f} to {top1.max():.1f}) %"
    print(f"{workdir}: loss {[round(result['loss'], 3) for result in results]}", file=sys.stderr)
    return [str(results[0]["step"]), scores]


if __name__ == "__main__":
    main()
