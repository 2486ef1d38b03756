"""Images of a run: of its evaluation split, of a folder, and as training augments them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from flax_resnet.data.decode import DECODE_ERRORS, reason
from flax_resnet.data.folders import find_images
from flax_resnet.data.normalization import normalize
from flax_resnet.errors import UserError
from flax_resnet.inspection.run import Inspected
from flax_resnet.records.files import shown
from flax_resnet.training.step import step_keys

IMAGES, DRAWS = 6, 6
"""Training images that are shown augmented, and how often each."""


def eval_images(run: Inspected, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (N, H, W, C), labels int (N,)) of rows of the evaluation split."""
    return run.data.examples("eval", np.asarray(rows, int))


def folder_images(
    run: Inspected,
    paths: Iterable[str | Path],
    most: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[str], np.ndarray]:
    """(names, uint8 (N, H, W, C)) of the first ``most`` images, of any size, decoded as the run's.

    Args:
      run: an opened run, of square images.
      paths: image files, and folders of them.
      most: images at most; further ones are not read.
      say: is given a line for each image that cannot be read, and it is left out.

    Raises:
      UserError: a path that is not there, none can be read, or the run's images are not square.
    """
    height, width, channels = run.image_shape
    decoder = run.config.data.decoder(channels)
    if decoder.size is None:
        if height != width:
            raise UserError(f"the run's images are {height}x{width}: give a run of square ones")
        decoder = dataclasses.replace(decoder, size=height - 2 * decoder.pad)
    names, images = [], []
    for path in find_images(paths):
        try:
            images.append(decoder(path.read_bytes()))
        except DECODE_ERRORS as error:
            say(f"skipped {shown(path)}: {reason(error)}")
            continue
        names.append(shown(path.name))
        if len(images) == most:
            break
    if not images:
        raise UserError(f"none of the images in {' '.join(map(str, paths))} could be read")
    return names, np.stack(images)


@dataclasses.dataclass(frozen=True)
class Augmented:
    """Training images, and what training makes of them."""

    originals: np.ndarray
    """uint8 (N, H, W, C)."""
    labels: np.ndarray
    """int (N,)."""
    draws: np.ndarray
    """uint8 (draws, N, H, W, C)."""
    mixed: np.ndarray | None
    """Labels mixed in, int (draws, N); None where none are."""
    shares: np.ndarray | None
    """Share of the image's own label in the target, (draws, N)."""


def augmented(run: Inspected) -> Augmented:
    """The first images of the run's first batch, augmented as its steps do it.

    Draw k uses the key of step k; the first draw is what step 0 was trained on. A random resized
    crop is drawn when an image is decoded, so it is the same in the original and all draws.
    """
    config, size = run.config, run.config.batch_size
    batch = next(iter(run.data.train_batches(config.seed, size, 0, 1)))

    @jax.jit
    def draw(step: jax.Array) -> dict[str, jax.Array]:
        augment_key, _ = step_keys(run.key, step)
        pixels = config.augment.pixels(augment_key, batch["image"], run.stats)
        images, run_key = normalize(pixels, run.stats), jax.random.wrap_key_data(run.key)
        return config.augment(augment_key, {**batch, "image": images}, run_key)

    found = [jax.device_get(draw(np.uint32(step))) for step in range(DRAWS)]
    drawn = {name: np.stack([one[name][:IMAGES] for one in found]) for name in found[0]}
    return Augmented(
        originals=np.asarray(batch["image"])[:IMAGES],
        labels=np.asarray(batch["label"])[:IMAGES],
        draws=displayed(drawn["image"], run),
        mixed=drawn.get("label_mixed"),
        shares=drawn.get("mix"),
    )


def displayed(normalized: np.ndarray, run: Inspected) -> np.ndarray:
    """Normalised images (..., H, W, C) back to uint8, the inverse of ``normalize``."""
    mean, std = (np.asarray(run.stats[name], np.float64) for name in ("mean", "std"))
    values = np.asarray(normalized, np.float64) * std + mean
    if "order" in run.stats:
        values = values[..., np.argsort(np.asarray(run.stats["order"]))]
    return np.clip(np.round(255 * values), 0, 255).astype(np.uint8)
