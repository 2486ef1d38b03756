"""Figures of images and of what a network makes of them."""

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
    """Draws the filters of a first layer.

    Those of 3 channels are in colour, each stretched over its own range; of other numbers of
    channels each filter's mean over them is drawn, blue below zero and red above, in shares of
    that filter's largest weight.

    Args:
      kernel: (h, w, C, filters).
      path: the PNG to write.
      title: above the figure.
    """
    height, width, channels, count = kernel.shape
    rows, columns = canvas.grid_shape(count, 16)
    figure = canvas.new_figure(max(5.0, 0.6 * columns + 1.2), max(1.8, 0.6 * rows + 1.1))
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    drawn = None
    for index, axes in enumerate(grid):
        if index >= count:
            axes.axis("off")
            continue
        one = kernel[..., index].astype(np.float64)
        if channels == 3:
            low, high = np.min(one), np.max(one)
            canvas.tile(axes, (one - low) / max(high - low, 1e-12))
            continue
        one = one.mean(axis=-1)
        shares = one / max(np.abs(one).max(), 1e-12)
        drawn = canvas.tile(axes, shares, cmap="RdBu_r", vmin=-1, vmax=1)
    if drawn is not None:
        figure.colorbar(drawn, ax=list(grid), label="weight, in shares\nof the filter's largest",
                        aspect=12)  # fmt: skip
    scale = "red, green and blue, each filter over its own range" if channels == 3 else ""
    figure.supxlabel(
        f"{count} filters of {height} x {width} pixels" + (f"; {scale}" if scale else ""),
        fontsize=8,
    )
    canvas.finish(figure, title, path)


def maps(image: np.ndarray, stages: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Draws the eight channels of each stage's map of one image with the largest means.

    Args:
      image: uint8 (H, W, C), what the network saw.
      stages: {name: (h, w, channels)}, from the first to the last.
      path: the PNG to write.
      title: above the figure.
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
    images: np.ndarray,
    heat: np.ndarray,
    names: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Draws images, and over each where the network looked.

    Args:
      images: uint8 (N, H, W, C).
      heat: (N, H, W) in 0..1.
      names: N lines of text, one over each image.
      path: the PNG to write.
      title: above the figure.
    """
    rows, columns = canvas.grid_shape(len(images), 4)
    figure = canvas.new_figure(max(5.0, 2.7 * columns + 0.9), 1.65 * rows + 0.9)
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    drawn: Any = None
    for index in range(rows * columns):
        plainly, under = grid[index // columns, 2 * (index % columns) :][:2]
        if index >= len(images):
            plainly.axis("off")
            under.axis("off")
            continue
        canvas.tile(plainly, images[index])
        canvas.tile(under, images[index])
        drawn = under.imshow(heat[index], cmap="jet", vmin=0, vmax=1, alpha=0.5)
        most = int(2.6 * canvas.CHARACTERS_PER_INCH)
        lines = [canvas.short(line, most) for line in names[index].split("\n")]
        plainly.set_title("\n".join(lines), fontsize=canvas.SMALL, pad=3, loc="left")
    figure.colorbar(drawn, ax=grid, label="Grad-CAM,\nin shares of its largest", fraction=0.03,
                    aspect=25)  # fmt: skip
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
      path: the PNG to write.
      title: above the figure.
    """
    from matplotlib import colormaps

    figure = canvas.new_figure(7.4, 5.4)
    axes = figure.subplots()
    if len(class_names) <= MOST_NAMED_CLASSES:
        colors = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
        for label, name in enumerate(class_names):
            at = points[labels == label]
            axes.scatter(at[:, 0], at[:, 1], s=10, color=colors(label), lw=0, alpha=0.8,
                         label=canvas.short(name, 24))  # fmt: skip
        figure.legend(title="true class", loc="outside right center", frameon=False, fontsize=8)
    else:
        drawn = axes.scatter(
            points[:, 0], points[:, 1], c=labels, s=8, lw=0, cmap="turbo", alpha=0.8
        )
        figure.colorbar(drawn, ax=axes, label=f"true class (0 to {len(class_names) - 1})")
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    axes.grid(alpha=0.3)
    canvas.finish(figure, title, path)


def examples(images: np.ndarray, texts: Sequence[str], path: Path, title: str) -> None:
    """Draws images with a text over each.

    Args:
      images: uint8 (N, H, W, C).
      texts: N, of one line or more.
      path: the PNG to write.
      title: above the figure.
    """
    rows, columns = canvas.grid_shape(len(images), 6)
    lines = max(text.count("\n") + 1 for text in texts)
    height = (1.25 + 0.14 * lines) * rows + 0.7
    figure = canvas.new_figure(max(4.5, 1.75 * columns), height)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, image, text in zip(grid, images, texts, strict=False):
        canvas.tile(axes, image, text)
    for axes in grid[len(images) :]:
        axes.axis("off")
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
      path: the PNG to write.
      title: above the figure.
    """
    count, several = len(originals), len(draws)
    figure = canvas.new_figure(1.3 * (several + 1) + 0.3, 1.32 * count + 0.8)
    grid = figure.subplots(count, several + 1, squeeze=False)
    for n, row in enumerate(grid):
        canvas.tile(row[0], originals[n], f"original: {names[n]}")
        for d, axes in enumerate(row[1:]):
            canvas.tile(axes, draws[d][n], texts[d][n] or f"draw {d + 1}")
    canvas.finish(figure, title, path)
