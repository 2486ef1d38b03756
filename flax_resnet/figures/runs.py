"""Figures of one run's numbers: curves, confusion, calibration, the search for a rate.

Each function writes a PNG at ``path``, with ``title`` above the figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnet.figures import canvas

MOST_LABELLED_CLASSES = 30


def curves(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws loss and top-1 error of metrics.jsonl against epochs, training and evaluation."""
    figure = canvas.new_figure(9, 3.8)
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
    canvas.finish(figure, title, path)


def confusion(counts: np.ndarray, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draws counts (K, K), true class by predicted class, each row in shares of its class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labelled = len(class_names) <= MOST_LABELLED_CLASSES
    side = 2.2 + 0.42 * len(class_names) if labelled else 8.0
    figure = canvas.new_figure(max(side + 1, 4.5), max(side, 3.8))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted class", ylabel="true class")
    if labelled:
        ticks = range(len(class_names))
        rotate = any(len(name) > 2 for name in class_names)
        names = [canvas.short(name, 24) for name in class_names]
        axes.set_xticks(ticks, names, rotation=45 if rotate else 0,
                        ha="right" if rotate else "center", rotation_mode="anchor")  # fmt: skip
        axes.set_yticks(ticks, names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = shares[row, column] > 0.5
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7,
                      color="white" if dark else "black")  # fmt: skip
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    canvas.finish(figure, title, path)


def reliability(
    confidence: np.ndarray, correct: np.ndarray, counts: np.ndarray, path: Path, title: str
) -> None:
    """Draws accuracy against confidence by bins, and how many examples each bin has.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", figure 1. A bar below the
    diagonal is a network too sure of itself.

    Args:
      confidence: (bins,) mean largest probability of each bin's examples; of an empty bin anything.
      correct: (bins,) share of them that are right.
      counts: (bins,) examples; the bins are equal parts of (0, 1].
    """
    figure = canvas.new_figure(5.4, 6.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges, full = np.linspace(0, 1, len(counts) + 1), counts > 0
    middles, width = (edges[:-1] + edges[1:]) / 2, 1 / len(counts)
    above.plot([0, 1], [0, 1], "--", color="gray", lw=1, label="perfectly calibrated")
    above.bar(middles[full], correct[full], width, edgecolor="white", color="tab:blue",
              label="accuracy of the bin")  # fmt: skip
    above.plot(confidence[full], correct[full], "o", ms=4, color="black",
               label="at the bin's mean confidence")  # fmt: skip
    above.set(ylabel="top-1 accuracy (share)", xlim=(0, 1), ylim=(0, 1.02))
    above.legend(frameon=False, loc="upper left")
    below.bar(middles, 100 * counts / max(counts.sum(), 1), width, edgecolor="white",
              color="tab:gray")  # fmt: skip
    below.set(xlabel="confidence (largest probability)", ylabel="examples (%)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    canvas.finish(figure, title, path)


def learning_rates(
    rates: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    suggestion: float | None,
    path: Path,
    title: str,
) -> None:
    """Draws the loss of a learning-rate range test (Smith 2017, section 3.3) against the rate.

    Args:
      rates: (steps,) learning rate of each step.
      losses: (steps,) nats.
      smoothed: (steps,) nats.
      suggestion: the rate to mark; None: none.
    """
    figure = canvas.new_figure(6.4, 4.5)
    axes = figure.subplots()
    axes.plot(rates, losses, lw=0.8, alpha=0.5, color="tab:blue", label="loss of a batch")
    axes.plot(rates, smoothed, color="tab:blue", label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:red", lw=1, ls="--",
                     label=f"steepest descent: {suggestion:.2g}")  # fmt: skip
    finite = losses[np.isfinite(losses)]
    if finite.size:  # a diverging end would flatten the rest
        low, high = smoothed.min(), max(smoothed[0], finite[0])
        axes.set_ylim(max(0.0, low - 0.3 * (high - low)), high + 1.2 * max(high - low, 0.1))
    axes.set(xscale="log", xlabel="learning rate (logarithmic)", ylabel="training loss (nats)")
    axes.grid(alpha=0.3)
    # Below: wherever it lay within the axes, a rate could be marked there.
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    canvas.finish(figure, title, path)
