"""The photographs of the input benchmark, and the process of one way to read them.

The files are real photographs, in a folder and as ArrayRecord. A way makes its batches anew each
time it is asked.

All read the same files and hand over batches of uint8 crops in main memory, in a shuffled order
that does not end. Each imports its own framework and no other's. Nothing is kept from turn to turn,
so that nothing is read ahead while another is timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.benchmarks import workers

QUALITIES = (80, 90, 95)
"""Of the JPEG files."""
RECORDS = "photographs"
"""The name of the tfds set beside the folder's splits."""
Crop = Literal["random", "centre"]
CENTRE = 0.875
"""The centre crop's share of the shorter side."""
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of random crops (Szegedy et al. 2015)."""
ATTEMPTS = 10
WINDOWS = 8
"""That tf.data and torch take of each photograph."""
Batches = Callable[[], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a way (a key of WAYS) is to read of a folder, train/CLASS/NAME.jpg.

    ``read_ahead`` batches are passed over before any is timed: they were made before the first was
    asked for.
    """

    way: str
    folder: str
    size: int
    crop: Crop
    batch_size: int
    cores: int
    read_ahead: int

    @property
    def paths(self) -> list[str]:
        """The training photographs."""
        return sorted(map(str, Path(self.folder, "train").glob("*/*.jpg")))


def ours(
    task: Task, *, processes: bool = False, records: bool = False
) -> tuple[dict[str, str], Batches]:
    """Data.train_batches: Grain's processes or threads, and the batch put on a device."""
    import grain
    import jax

    from flax_resnet import Data, DataConfig
    from flax_resnet.data import decode
    from flax_resnet.distributed import sharding
    from flax_resnet.records.provenance import versions

    config = DataConfig(
        name=RECORDS,
        data_dir=task.folder,
        folder=None if records else task.folder,
        image_size=task.size,
        crop_ratio=CENTRE,
        random_resized_crop=task.crop == "random",
        resident_mb=0,
        num_workers=task.cores if processes else 0,
    )
    opened = Data(config, sharding.data_mesh(jax.devices()[:1]), 2)

    def batches() -> Iterator[Any]:
        made = opened.train_batches(0, task.batch_size, 0, 10**6)
        with contextlib.closing(made):  # type: ignore[type-var]
            for batch in made:
                yield jax.block_until_ready(batch)

    return {"grain": grain.__version__, **versions(decode.PACKAGES)}, batches


def decoder(task: Task) -> tuple[dict[str, str], Batches]:
    """The decoder by itself, in one thread."""
    from flax_resnet.data import decode
    from flax_resnet.records.provenance import versions

    crop = decode.Decoder(3, task.size, CENTRE, random_crop=task.crop == "random")

    def batches() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        paths = itertools.cycle(rng.permutation(task.paths))
        while True:
            batch = np.empty((task.batch_size, task.size, task.size, 3), np.uint8)
            for row, path in zip(batch, paths, strict=False):
                row[:] = crop(Path(path).read_bytes(), rng)
            yield batch

    return versions(decode.PACKAGES), batches


def windows(task: Task) -> np.ndarray:
    """Top, left, height and width of WINDOWS crops of each photograph, int32 (n, 4)."""
    from PIL import Image

    rng, found = np.random.default_rng(0), []
    for path in task.paths:
        with Image.open(path) as image:
            width, height = image.size
        for _ in range(WINDOWS):
            area = width * height * rng.uniform(*AREA, size=ATTEMPTS)
            aspect = np.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), ATTEMPTS))
            sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], 1).round()
            fit = sides[(sides <= (height, width)).all(1)].astype(int)
            if task.crop == "random" and len(fit):
                h, w = fit[0]
                found.append((rng.integers(height - h + 1), rng.integers(width - w + 1), h, w))
            else:
                side = round((CENTRE if task.crop == "centre" else 1) * min(width, height))
                found.append(((height - side) // 2, (width - side) // 2, side, side))
    return np.array(found, np.int32)


def tf_data(task: Task, *, antialias: bool = False) -> tuple[dict[str, str], Batches]:
    """tf.data: decode_and_crop_jpeg with the fast DCT, and a bilinear resize.

    Its windows are drawn beforehand: tf.image.sample_distorted_bounding_box draws a height evenly,
    not an area, and so smaller crops.
    """
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    import tensorflow as tf

    tf.random.set_seed(0)
    paths = np.repeat(task.paths, WINDOWS)
    shown = windows(task)

    def read(path: Any, window: Any) -> Any:
        data = tf.io.read_file(path)
        part = tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_FAST")
        resized = tf.image.resize(part, (task.size, task.size), antialias=antialias)
        return tf.cast(resized, tf.uint8)

    made = tf.data.Dataset.from_tensor_slices((paths, shown)).shuffle(len(paths)).repeat()
    made = made.map(read, num_parallel_calls=task.cores).batch(task.batch_size)
    options = tf.data.Options()
    options.threading.private_threadpool_size = task.cores
    options.threading.max_intra_op_parallelism = 1
    made = made.prefetch(tf.data.AUTOTUNE).with_options(options)
    return {"tensorflow": tf.__version__}, made.as_numpy_iterator


class Photographs:
    """A torch data set of crops: Pillow's decode, crop and resize, as torchvision does them."""

    def __init__(self, task: Task):
        self._side, self._windows = (task.size, task.size), windows(task)
        self._paths = np.repeat(task.paths, WINDOWS)

    def __len__(self) -> int:
        """Number of crops."""
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        """A crop, uint8 (3, size, size)."""
        import torch
        from PIL import Image

        with Image.open(self._paths[index]) as stored:
            image = stored.convert("RGB")
        top, left, height, width = map(int, self._windows[index])
        image = image.crop((left, top, left + width, top + height))
        image = image.resize(self._side, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def torch_loader(task: Task) -> tuple[dict[str, str], Batches]:
    """torch's DataLoader, with a process for each core."""
    import PIL
    import torch
    from torch.utils.data import DataLoader, RandomSampler

    photographs: Any = Photographs(task)

    def batches() -> Iterator[Any]:
        sampler = RandomSampler(photographs, replacement=True, num_samples=10**8)
        yield from DataLoader(photographs, task.batch_size, sampler=sampler, num_workers=task.cores)

    return {"torch": torch.__version__, "pillow": PIL.__version__}, batches


WAYS: dict[str, Callable[[Task], tuple[dict[str, str], Batches]]] = {
    "ours": functools.partial(ours, processes=True),
    "ours, threads": ours,
    "ours, threads, ArrayRecord": functools.partial(ours, records=True),
    "tf.data": tf_data,
    "tf.data, antialias": functools.partial(tf_data, antialias=True),
    "torch": torch_loader,
    "decoder": decoder,
}
"""By the names that the benchmark gives them."""


def build(task: Mapping[str, Any]) -> workers.Built:
    """In a worker: prepares a way."""
    found = Task(**task)
    versions, batches = WAYS[found.way](found)

    def turn(steps: int) -> float:
        made = batches()
        for _ in range(found.read_ahead):
            next(made)
        start = time.perf_counter()
        for _ in range(steps):
            next(made)
        seconds = time.perf_counter() - start
        if isinstance(made, Iterator) and hasattr(made, "close"):
            made.close()
        return seconds / steps

    return workers.Built({"versions": versions}, turn)


def originals() -> list[Any]:
    """Real photographs that are installed."""
    from PIL import Image
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


def _window(image: Any, width: int, height: int, rng: np.random.Generator) -> Any:
    """A random part of a photograph, perhaps mirrored; it is enlarged where it is too small."""
    from PIL import Image

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
