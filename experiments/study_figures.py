"""Figures of a study's runs: means over seeds with their spread, and error against depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flax_resnet import UserError
from flax_resnet.figures import canvas

Records = Sequence[Mapping[str, Any]]
Axis = Literal["step", "epoch"]
LABELS = {"step": "step (optimizer updates)", "epoch": "epoch"}


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    """What to call them."""
    runs: tuple[Records, ...]
    """Of each, the lines of its metrics.jsonl."""


def average(
    group: Group, split: Literal["train", "eval"], x: Axis, value: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and standard deviation over runs, at the steps that all of them have logged.

    So runs of several lengths are averaged as far as the shortest goes, and nothing is
    interpolated. ``value`` is "loss" (nats) or "error", the top-1 error (%).

    Returns:
      (places, means, standard deviations of the sample), each (points,); the deviation of one run
      is 0.

    Raises:
      UserError: the runs have no step in common.
    """
    lines = [{r[x]: r for r in run if r["split"] == split} for run in group.runs]
    places = sorted(set.intersection(*map(set, lines))) if lines else []
    kind = {"train": "training", "eval": "evaluation"}[split]
    if not all(lines):
        raise UserError(f"{group.name}: a run of it has no {kind} line yet: wait, or leave it out")
    if not places:
        raise UserError(
            f"{group.name}: its {len(group.runs)} runs have no {kind} line at the same {x}, and "
            "cannot be averaged; give runs logged at the same steps, or draw each alone"
        )
    rows = [
        [100 * (1 - by[p]["top1"]) if value == "error" else by[p][value] for p in places]
        for by in lines
    ]
    values = np.array(rows, np.float64)
    spread = values.std(axis=0, ddof=1) if len(rows) > 1 else np.zeros(len(places))
    return np.array(places, np.float64), values.mean(axis=0), spread


def bands(groups: Sequence[Group], path: Path, title: str, x: Axis = "epoch") -> None:
    """Draws loss and top-1 error, training and evaluation, a colour for each group.

    Lines are means over the runs of a group, the band is one standard deviation either side. Of a
    group of one run without evaluations, or without training lines, the others are drawn.
    """
    figure = canvas.new_figure(10.5, 4.4 + 0.22 * ((len(groups) + 2) // 3))
    axes = figure.subplots(1, 2)
    names = (("loss", "loss (nats)"), ("error", "top-1 error (%)"))
    for one, (value, label) in zip(axes, names, strict=True):
        _lines(one, groups, x, value, width=1.7)
        _finish(one, LABELS[x], label)
    _legend(figure, groups, "training (augmented)", "evaluation")
    canvas.finish(figure, title, path)


def training_and_test(groups: Sequence[Group], path: Path, title: str, x: Axis = "step") -> None:
    """Draws training error thin and dashed, test error bold, against steps.

    As figures 1 and 6 of He et al. 2016, "Deep Residual Learning", have them. Training error is
    that of augmented batches, as training goes.
    """
    figure = canvas.new_figure(7, 4.8 + 0.22 * ((len(groups) + 2) // 3))
    axes = figure.subplots()
    _lines(axes, groups, x, "error", width=2.2)
    _finish(axes, LABELS[x], "top-1 error (%)")
    _legend(figure, groups, "training error (augmented)", "test error")
    canvas.finish(figure, title, path)


def error_by_depth(
    points: Mapping[str, Sequence[tuple[int, float, float | None]]], path: Path, title: str
) -> None:
    """Draws final errors against depth, a colour for each series.

    Args:
      points: for each series, of each run (weighted layers, top-1 error in %, training error in %
        or None); runs of the same depth are averaged, the bar is one standard deviation.
      path: the PNG to write.
      title: above the figure.
    """
    from matplotlib.lines import Line2D

    figure = canvas.new_figure(6.4, 4.8 + 0.22 * ((len(points) + 2) // 3))
    axes = figure.subplots()
    depths = sorted({depth for runs in points.values() for depth, *_ in runs})
    handles: list[Any] = []
    looks: dict[int, Any] = {2: {"ls": "--", "lw": 0.9}, 1: {"ls": "-", "lw": 1.7}}
    for index, (name, runs) in enumerate(points.items()):
        style = _style(index)
        for column, look in looks.items():
            by: dict[int, list[float]] = {}
            for run in runs:
                if run[column] is not None:
                    by.setdefault(run[0], []).append(float(run[column]))  # type: ignore[arg-type]
            if not by:
                continue
            at = sorted(by)
            mean = [float(np.mean(by[d])) for d in at]
            spread = [float(np.std(by[d], ddof=1)) if len(by[d]) > 1 else 0.0 for d in at]
            axes.errorbar(at, mean, spread, **look, **style, marker="o", ms=4, capsize=3)
        label = f"{canvas.plain(name)}, {_runs(len(runs))}"
        handles.append(Line2D([], [], **style, marker="o", ms=4, label=label))
    black: dict[str, Any] = {"color": "black"}
    handles.append(Line2D([], [], **black, lw=1.7, label="test error"))
    if any(train is not None for runs in points.values() for *_, train in runs):
        handles.append(Line2D([], [], **black, **looks[2], label="training error (augmented)"))
    if any(len(runs) > len({d for d, *_ in runs}) for runs in points.values()):
        bar = Line2D([], [], **black, lw=0, marker="|", ms=10)
        bar.set_label("standard deviation over seeds")
        handles.append(bar)
    axes.set_xticks(depths, list(map(str, depths)), rotation=90)  # neighbours would touch
    _finish(axes, "depth (weighted layers)", "top-1 error at the end (%)")
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    canvas.finish(figure, title, path)


def _style(index: int) -> dict[str, Any]:
    from matplotlib import colormaps

    return {"color": colormaps["tab10" if index < 10 else "tab20"](index % 20)}


def _lines(axes: Any, groups: Sequence[Group], x: Axis, value: str, width: float) -> None:
    """A value of each group: of training thin and dashed, of evaluation of this width."""
    looks: dict[Any, dict[str, Any]] = {"train": {"lw": 0.9, "ls": "--"}, "eval": {"lw": width}}
    for index, group in enumerate(groups):
        style, several = _style(index), len(group.runs) > 1
        for split, look in looks.items():
            if not several and not any(line["split"] == split for line in group.runs[0]):
                continue  # a single run is drawn with what it has
            places, mean, spread = average(group, split, x, value)
            marker = {"marker": "o", "ms": 3} if len(places) < 12 else {}
            axes.plot(places, mean, **style, **look, **marker)
            if several:
                axes.fill_between(places, mean - spread, mean + spread, **style, alpha=0.18, lw=0)


def _finish(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def _legend(figure: Any, groups: Sequence[Group], train: str, test: str) -> None:
    """Below the axes: colours are groups, dashes the split, the band what it is."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], **_style(i), lw=2, label=f"{canvas.plain(g.name)}, {_runs(len(g.runs))}")
        for i, g in enumerate(groups)
    ]
    handles.append(Line2D([], [], color="black", lw=0.9, ls="--", label=train))
    handles.append(Line2D([], [], color="black", lw=2, label=test))
    if any(len(group.runs) > 1 for group in groups):
        handles.append(
            Patch(color="black", alpha=0.18, lw=0, label="± 1 standard deviation over seeds")
        )
    widest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 12 / (widest + 6))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
