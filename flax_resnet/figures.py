"""The two figures of every run: learning curves and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_resnet.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELLED_CLASSES = 30


def curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws loss and top-1 error against epochs, training and evaluation.

    Args:
      records: lines of metrics.jsonl.
      path: the PNG to write.
      title: above the figure.
    """
    figure = _figure(9, 3.8)
    loss_axes, error_axes = figure.subplots(1, 2)
    styles: dict[str, dict[str, Any]] = {
        "train": {"lw": 1, "label": "training (augmented)"},
        "eval": {"label": "evaluation"},
    }
    for split, style in styles.items():
        lines = [r for r in records if r["split"] == split]
        marker = {"marker": "o", "ms": 3} if len(lines) < 40 else {}
        epochs = [r["epoch"] for r in lines]
        loss_axes.plot(epochs, [r["loss"] for r in lines], **style, **marker)
        error_axes.plot(epochs, [100 * (1 - r["top1"]) for r in lines], **style, **marker)
    loss_axes.set(xlabel="epoch", ylabel="loss (nats)")
    error_axes.set(xlabel="epoch", ylabel="top-1 error (%)")
    loss_axes.legend(frameon=False)
    for axes in (loss_axes, error_axes):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def confusion(counts: np.ndarray, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draws a confusion matrix, each row in shares of its true class.

    Args:
      counts: int (K, K), true class by predicted class.
      class_names: K names.
      path: the PNG to write.
      title: above the figure.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labelled = len(class_names) <= MOST_LABELLED_CLASSES
    side = 2.2 + 0.42 * len(class_names) if labelled else 8.0
    figure = _figure(max(side + 1, 4.5), max(side, 3.8))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if labelled:
        ticks = range(len(class_names))
        rotate = any(len(name) > 2 for name in class_names)
        axes.set_xticks(ticks, class_names, rotation=45 if rotate else 0,
                        ha="right" if rotate else "center")  # fmt: skip
        axes.set_yticks(ticks, class_names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = shares[row, column] > 0.5
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Half a second to import, at the end of a run and not at its start.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
