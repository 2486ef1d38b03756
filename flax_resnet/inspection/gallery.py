"""Every picture that is made from a checkpoint: computed, drawn, and said in a line."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flax_resnet import figures
from flax_resnet.errors import UserError
from flax_resnet.inspection import embed, layers, lr_finder, samples
from flax_resnet.inspection.eval_outputs import Predictions, predictions, worst
from flax_resnet.inspection.run import Inspected

MOST_TSNE = 1000


@dataclasses.dataclass(frozen=True)
class Session:
    """An opened run, and how much of it to draw."""

    run: Inspected
    """The run."""
    images: tuple[str, ...] = ()
    """Files and folders for feature maps and Grad-CAM; else images of the evaluation split."""
    count: int = 12
    """Examples in a picture of examples."""
    seed: int = 0
    """Of t-SNE."""
    lowest: float = 1e-5
    """First rate of the learning-rate finder."""
    highest: float = 10.0
    """Last rate of the learning-rate finder."""
    rate_steps: int = 100
    """Steps of the learning-rate finder at most."""
    say: Callable[[str], None] = lambda line: None
    """Is given lines on what was left out."""

    @functools.cached_property
    def predictions(self) -> Predictions:
        """Of the evaluation split, computed once."""
        return predictions(self.run)

    @functools.cached_property
    def pictures(self) -> tuple[list[str], np.ndarray]:
        """(what they are, uint8 (N, H, W, C)) of images to look into."""
        if self.images:
            return samples.folder_images(self.run, self.images, self.count, self.say)
        count = self.run.data.num_eval
        rows = np.linspace(0, count - 1, min(count, self.count)).round().astype(int)
        images, labels = samples.eval_images(self.run, rows.tolist())
        return [f"true: {self.run.class_name(label)}" for label in labels], images

    def title(self, what: str) -> str:
        """A figure's title: network, data, checkpoint, and what."""
        return f"{self.run.title}, step {self.run.step}: {what}"


class Part(NamedTuple):
    """One picture: its heading in a report; draws a PNG, and returns a line on how to read it."""

    heading: str
    draw: Callable[[Session, Path], str]


def draw_confusion(of: Session, path: Path) -> str:
    """The confusion matrix of the evaluation split."""
    found = of.predictions
    known = len(of.run.class_names)
    counts = found.confusion[:known, :known]
    outside = len(found.labels) - int(counts.sum())
    what = f"top-1 {100 * found.top1:.2f} % of {len(found.labels)} evaluation images"
    figures.confusion(counts, of.run.class_names, path, of.title(what))
    odd = f" {outside} images were taken for a class that the data do not have." if outside else ""
    return f"Counts; the shade is the share of the row, the true class.{odd}"


def draw_reliability(of: Session, path: Path) -> str:
    """The reliability diagram of the evaluation split."""
    found = of.predictions
    confidence, correct, counts, error = found.reliability()
    safe, total = np.maximum(counts, 1), len(found.labels)
    what = f"expected calibration error {100 * error:.2f} %, n = {total} evaluation images"
    figures.reliability(confidence / safe, correct / safe, counts, path, of.title(what))
    return "A bar below the diagonal: in that bin the network is surer than it is right."


def draw_filters(of: Session, path: Path) -> str:
    """The first layer's filters."""
    run = of.run
    name, kernel = layers.first_filters(run.module, run.variables, run.image_shape)
    figures.filters(kernel, path, of.title(f"filters of the first layer, {name}"))
    return "In a net that has learned, they are smooth edges and colours; noise is a bad sign."


def draw_maps(of: Session, path: Path) -> str:
    """Feature maps of one image, stage by stage."""
    run, (names, images) = of.run, of.pictures
    found = layers.stage_maps(run.module, run.variables, run.normalized(images[:1]))
    if not found:
        raise UserError(f"{type(run.module).__name__} has no feature maps to draw")
    stages = {name: np.asarray(values[0], np.float32) for name, values in found.items()}
    figures.maps(images[0], stages, path, of.title(f"feature maps of an image ({names[0]})"))
    return "Of each stage the channels with the largest mean, the largest first."


def draw_gradcam(of: Session, path: Path) -> str:
    """Grad-CAM of the class that the network takes each image for."""
    run, (names, images) = of.run, of.pictures
    found, classes, p = layers.grad_cam(run.module, run.variables, run.normalized(images))
    texts = [
        f"{name}\nsays: {run.class_name(k)} ({share:.2f})"
        for name, k, share in zip(names, classes, p, strict=True)
    ]
    over = layers.heat(found, *images.shape[1:3])
    what = f"Grad-CAM of the predicted class, last map {found.shape[1]} x {found.shape[2]}"
    figures.attention(images, over, texts, path, of.title(f"{what}, n = {len(images)} images"))
    return "Red is where the evidence for the predicted class lies; in brackets its probability."


def draw_pca(of: Session, path: Path) -> str:
    """Principal components of the features."""
    found = of.predictions
    _scatter(
        of, embed.pca(found.features), found.rows, path, "principal components of the head's inputs"
    )
    return "The head's inputs, projected on the two directions in which they vary the most."


def draw_tsne(of: Session, path: Path) -> str:
    """t-SNE of the features."""
    found = of.predictions
    count = min(len(found.rows), MOST_TSNE)
    rows = np.linspace(0, len(found.rows) - 1, count).round().astype(int)
    embedding = embed.tsne(found.features[rows], of.seed)
    _scatter(of, embedding, found.rows[rows], path, f"t-SNE of the head's inputs, seed {of.seed}")
    return "Neighbours are alike to the network; distances between groups mean nothing."


def _scatter(
    of: Session, embedding: embed.Embedding, rows: np.ndarray, path: Path, what: str
) -> None:
    (points, axes), labels = embedding, of.predictions.labels[rows]
    title = of.title(f"{what}, n = {len(rows)} evaluation images")
    figures.scatter(points, labels, of.run.class_names, axes, path, title)


def draw_worst(of: Session, path: Path) -> str:
    """The examples with the largest losses."""
    run, found = of.run, of.predictions
    rows = worst(found, of.count)
    images, labels = samples.eval_images(run, rows.tolist())
    texts = []
    for row, label in zip(rows, labels, strict=True):
        says, p = found.predicted[row], found.probabilities[row]
        texts.append(
            f"true: {run.class_name(label)} ({p[label]:.2g})\n"
            f"says: {run.class_name(says)} ({p[says]:.2f})\n"
            f"no. {row}, loss {found.losses[row]:.2f} nats"
        )
    what = f"the {len(rows)} largest losses of {len(found.labels)} evaluation images"
    figures.examples(images, texts, path, of.title(what))
    return "In brackets probabilities; the number is the place in the evaluation split."


def draw_augmented(of: Session, path: Path) -> str:
    """Training images as training augments them."""
    run = of.run
    found = samples.augmented(run)
    names = [run.class_name(label) for label in found.labels]
    texts = [[""] * len(names) for _ in found.draws]
    if found.mixed is not None and found.shares is not None:
        for line, shares, mixed in zip(texts, found.shares, found.mixed, strict=True):
            line[:] = [
                f"{name}: {share:.2f}, {run.class_name(other)}: {1 - share:.2f}"
                for name, share, other in zip(names, shares, mixed, strict=True)
            ]
    what = f"augmented training images, {len(found.draws)} draws of {len(names)}"
    figures.rows(found.originals, found.draws, names, texts, path, of.title(what))
    same = "" if run.config.augment != type(run.config.augment)() else " This run augments nothing."
    cropped = " The random resized crop is that of step 0." * run.config.data.random_resized_crop
    return (
        "Draw k has the key of step k - 1. The normalisation is undone: zeros, which crops pad "
        f"with and cutout writes, come out as the mean colour.{same}{cropped}"
    )


def draw_lr(of: Session, path: Path) -> str:
    """The learning-rate finder."""
    config = of.run.config
    found = lr_finder.find_rate(
        config, lowest=of.lowest, highest=of.highest, num_steps=of.rate_steps
    )
    end = "it diverged" if found.diverged else "it did not diverge"
    what = (f"learning-rate range test, {type(config.optimizer).__name__}, batch of "
            f"{config.batch_size}, {len(found.rates)} steps, {end}")  # fmt: skip
    figures.learning_rates(
        found.rates, found.losses, found.smoothed, found.suggestion, path,
        f"{of.run.title}: {what}",
    )  # fmt: skip
    if found.suggestion is None:
        return "The smoothed loss does not fall in this range: try lower rates."
    return f"The smoothed loss falls fastest at a rate of {found.suggestion:.2g}."


PARTS: dict[str, Part] = {
    "confusion": Part("Confusion matrix", draw_confusion),
    "reliability": Part("Reliability", draw_reliability),
    "worst": Part("Worst-classified examples", draw_worst),
    "filters": Part("First-layer filters", draw_filters),
    "maps": Part("Feature maps", draw_maps),
    "gradcam": Part("Grad-CAM", draw_gradcam),
    "pca": Part("Features: principal components", draw_pca),
    "tsne": Part("Features: t-SNE", draw_tsne),
    "augmented": Part("Augmented training images", draw_augmented),
    "lr": Part("Learning-rate finder", draw_lr),
}
"""By name. "lr" trains; the others only run the network."""
