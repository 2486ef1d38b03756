"""Figures of images and of what a network makes of them.

Each function writes a PNG at ``path``, with ``title`` above the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.figures import canvas

MOST_NAMED_CLASSES = 20
MOST_CHANNELS = 8
"""Channels of a stage's map that are drawn."""


def filters(kernel: np.ndarray, path: Path, title: str) -> None:
    """Draws the filters of a first layer: a kernel (h, w, C, filters).

    Those of 3 channels are in colour, each stretched over its own range; of others the mean over
    the channels is drawn, blue below zero and red above, in shares of its largest weight.
    """
    height, width, channels, count = kernel.shape
    rows, columns = canvas.grid_shape(count, 16)
    figure = canvas.new_figure(max(5.0, 0.6 * columns + 1.2), max(1.8, 0.6 * rows + 1.1))
    drawn = None
    for index, axes in enumerate(canvas.grid(figure, count, 16)):
        one = kernel[..., index].astype(np.float64)
        if channels == 3:
            low, high = np.min(one), np.max(one)
            canvas.tile(axes, (one - low) / max(high - low, 1e-12))
            continue
        one = one.mean(axis=-1)
        shares = one / max(np.abs(one).max(), 1e-12)
        drawn = canvas.tile(axes, shares, cmap="RdBu_r", vmin=-1, vmax=1)
    if drawn is not None:
        figure.colorbar(drawn, ax=figure.axes, label="weight, in shares\nof the filter's largest",
                        aspect=12)  # fmt: skip
    scale = "; red, green and blue, each filter over its own range" if channels == 3 else ""
    figure.supxlabel(f"{count} filters of {height} x {width} pixels{scale}", fontsize=8)
    canvas.finish(figure, title, path)


def maps(image: np.ndarray, stages: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Draws the eight channels of each stage's map of one image with the largest means.

    Args:
      image: uint8 (H, W, C), what the network saw.
      stages: {name: (h, w, channels)}, from the first to the last.
    """
    figure = canvas.new_figure(1.05 * (MOST_CHANNELS + 1) + 1.6, 1.2 * len(stages) + 1.1)
    grid = figure.subplots(len(stages), MOST_CHANNELS + 1, squeeze=False)
    for index, (name, values) in enumerate(stages.items()):
        row = grid[index]
        height, width, _ = values.shape
        order = np.argsort(-values.mean(axis=(0, 1)), kind="stable")[:MOST_CHANNELS]
        low, high = values[..., order].min(), values[..., order].max()
        if index == 0:
            canvas.tile(row[0], image, "input")
        else:
            row[0].axis("off")
        drawn: Any = None
        for axes, channel in zip(row[1:], order, strict=False):
            drawn = canvas.tile(axes, values[..., channel], f"channel {channel}", cmap="viridis",
                                vmin=low, vmax=high)  # fmt: skip
        for axes in row[1 + len(order) :]:
            axes.axis("off")
        row[1].set_ylabel(canvas.plain(f"{name}\n{height} x {width}"), fontsize=canvas.SMALL)
        bar = figure.colorbar(drawn, ax=list(row), fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=canvas.SMALL)
        bar.set_label("activation", fontsize=canvas.SMALL)
    canvas.finish(figure, title, path)


def attention(
    images: np.ndarray, heat: np.ndarray, names: Sequence[str], path: Path, title: str
) -> None:
    """Draws images, and over each where the network looked.

    Args:
      images: uint8 (N, H, W, C).
      heat: (N, H, W) in 0..1.
      names: N lines of text, one over each image.
    """
    rows, columns = canvas.grid_shape(len(images), 4)
    figure = canvas.new_figure(max(5.0, 2.7 * columns + 0.9), 1.65 * rows + 0.9)
    grid = canvas.grid(figure, 2 * len(images), 2 * columns)
    drawn: Any = None
    for plainly, under, image, over, name in zip(
        grid[::2], grid[1::2], images, heat, names, strict=True
    ):
        canvas.tile(plainly, image)
        canvas.tile(under, image)
        drawn = under.imshow(over, cmap="jet", vmin=0, vmax=1, alpha=0.5)
        most = int(2.6 * canvas.CHARACTERS_PER_INCH)
        lines = [canvas.short(line, most) for line in name.split("\n")]
        plainly.set_title("\n".join(lines), fontsize=canvas.SMALL, pad=3, loc="left")
    what = "Grad-CAM,\nin shares of its largest"
    figure.colorbar(drawn, ax=figure.axes, label=what, fraction=0.03, aspect=25)
    canvas.finish(figure, title, path)


def scatter(
    points: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    axes_names: tuple[str, str],
    path: Path,
    title: str,
) -> None:
    """Draws points in the plane, coloured by class.

    Args:
      points: (n, 2).
      labels: int (n,), below the number of class names.
      class_names: names; above 20 a scale of numbers stands for them.
      axes_names: what the axes are.
    """
    from matplotlib import colormaps

    figure = canvas.new_figure(7.4, 5.4)
    axes = figure.subplots()
    if len(class_names) <= MOST_NAMED_CLASSES:
        colors = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
        groups = [
            axes.scatter(at[:, 0], at[:, 1], s=10, color=colors(label), lw=0, alpha=0.8)
            for label in range(len(class_names))
            for at in [points[labels == label]]
        ]
        # As texts of their own: a label that begins with _ is left out of the legend.
        texts = [canvas.short(name, 24) for name in class_names]
        where: Any = {"loc": "outside right center", "frameon": False, "fontsize": 8}
        figure.legend(groups, texts, title="true class", **where)
    else:
        drawn = axes.scatter(
            points[:, 0], points[:, 1], c=labels, s=8, lw=0, cmap="turbo", alpha=0.8
        )
        figure.colorbar(drawn, ax=axes, label=f"true class (0 to {len(class_names) - 1})")
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    axes.grid(alpha=0.3)
    canvas.finish(figure, title, path)


def examples(images: np.ndarray, texts: Sequence[str], path: Path, title: str) -> None:
    """Draws images, uint8 (N, H, W, C), with one of N texts over each."""
    rows, columns = canvas.grid_shape(len(images), 6)
    lines = max(text.count("\n") + 1 for text in texts)
    height = (1.25 + 0.14 * lines) * rows + 0.7
    figure = canvas.new_figure(max(4.5, 1.75 * columns), height)
    for axes, image, text in zip(canvas.grid(figure, len(images), 6), images, texts, strict=True):
        canvas.tile(axes, image, text)
    canvas.finish(figure, title, path)


def rows(
    originals: np.ndarray,
    draws: np.ndarray,
    names: Sequence[str],
    texts: Sequence[Sequence[str]],
    path: Path,
    title: str,
) -> None:
    """Draws each image in a row with what became of it.

    Args:
      originals: uint8 (N, H, W, C).
      draws: uint8 (draws, N, H, W, C).
      names: N, what the originals are.
      texts: for each draw N texts, empty ones too.
    """
    count, several = len(originals), len(draws)
    figure = canvas.new_figure(1.3 * (several + 1) + 0.3, 1.32 * count + 0.8)
    grid = figure.subplots(count, several + 1, squeeze=False)
    for n, row in enumerate(grid):
        canvas.tile(row[0], originals[n], f"original: {names[n]}")
        for d, axes in enumerate(row[1:]):
            canvas.tile(axes, draws[d][n], texts[d][n] or f"draw {d + 1}")
    canvas.finish(figure, title, path)
