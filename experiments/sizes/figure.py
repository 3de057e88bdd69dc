"""The figure of a study of sizes: a column for every loss function, all against the number of parameters."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from ..results.estimate import Estimate
from ..results.labelled import loss_unit
from ..results.style import STATIC, STYLES, finish
from .statistics import Point

_COLOURS = (STATIC[0], *(style[0] for style in STYLES))  # of a loss, the static one first
_RATES: tuple[tuple[Any, str], ...] = (  # line style and marker of a learning rate
    ("solid", "o"),
    ((0, (4, 1.5)), "s"),
    ((0, (1, 1.2)), "^"),
    ((0, (6, 1.5, 1, 1.5)), "D"),
)
_ROWS: dict[str, Callable[[Point], Estimate]] = {
    "validation accuracy (%)": lambda point: point.condition.outcome("validation"),
    "train accuracy (%)": lambda point: point.condition.outcome("train"),
    "paired gain in validation\naccuracy (points)": lambda point: point.condition.difference("validation"),
    "plain train loss\nat the end": lambda point: point.condition.outcome("train", "loss"),
    "largest Hessian eigenvalue\nat the end": lambda point: point.sharpness,
}
_ACCURACIES = 3  # rows in per cent, with one scale for all loss functions


def sizes(points: Sequence[Point], dataset: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of accuracies, paired gain, plain train loss at the end and largest eigenvalue of its Hessian,
    against the number of parameters: means with 95 % confidence intervals, a column for every loss function.

    Colour and filling of the markers tell the losses apart, line style and marker the learning rates. Horizontal lines
    mark no gain, and 2/η. The figure is returned too.
    """
    functions = list(dict.fromkeys(point.loss_function for point in points))
    rates = sorted({point.learning_rate for point in points})
    losses = list(dict.fromkeys(point.loss for point in points))
    height = 1.6 + 2.3 * len(_ROWS) + 0.22 * len(losses) * len(rates) / 3
    figure = Figure(figsize=(1.6 + 4 * max(len(functions), 2), height), dpi=150, layout="constrained")
    panels = figure.subplots(len(_ROWS), max(len(functions), 1), sharex=True, squeeze=False)
    drawn: dict[str, Line2D] = {}
    for name, column in zip(functions, panels.T, strict=False):
        own = [point for point in points if point.loss_function == name]
        for row, (axes, estimate) in enumerate(zip(column, _ROWS.values(), strict=True)):
            for i, loss in enumerate(losses):
                for k, rate in enumerate(rates):
                    along = [p for p in own if p.loss == loss and p.learning_rate == rate and estimate(p).n]
                    if along:
                        values = [estimate(point) for point in along]
                        line = _curve(axes, along, values, i, k, 100 if row < _ACCURACIES else 1)
                        drawn[f"{along[0].name}, η = {rate:g}"] = line
            axes.grid(alpha=0.3)
        column[2].axhline(0, color="0.35", linewidth=1)
        for axes in column[_ACCURACIES:]:
            _logarithmic(axes)
        _mark_thresholds(column[-1], sorted({point.learning_rate for point in own}))
        _label_sizes(column[-1], own)
        column[0].set_title(name + ("" if name == "cross-entropy" else " (ours)"))
    for axes, label in zip(panels[:, 0], _ROWS, strict=True):
        axes.set_ylabel(label)
    if functions and (unit := loss_unit(dataset.sel(loss_function=functions[0]))):
        panels[_ACCURACIES, 0].set_ylabel(f"{list(_ROWS)[_ACCURACIES]} ({unit})")
    for row in panels[:_ACCURACIES]:
        limits = np.array([axes.get_ylim() for axes in row])
        for axes in row:
            axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    ordered = sorted(drawn, key=lambda name: not name.startswith("static"))
    figure.legend(
        [drawn[name] for name in ordered], ordered, loc="outside lower center", ncols=len(rates) or 1, handlelength=5
    )
    note = f"mean of {dataset.sizes['seed']} seeds, band: 95 % CI; dotted: 2/η"
    return finish(figure, "Static and dynamical loss by size of the network", dataset, note, path)


def _curve(axes: Axes, points: Sequence[Point], values: Sequence[Estimate], loss: int, rate: int, scale: int) -> Line2D:
    """Draws means, with intervals where there are any; the markers of the static loss are hollow."""
    x, colour = [point.parameters for point in points], _COLOURS[loss % len(_COLOURS)]
    mean, low, high = (scale * np.array([getattr(e, name) for e in values], float) for name in ("mean", "low", "high"))
    if scale == 1:  # of what is positive: no interval of its logarithm goes below what was seen
        low = np.maximum(low, [min(e.values.values()) for e in values])
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    dashes, marker = _RATES[rate % len(_RATES)]
    (line,) = axes.plot(x, mean, color=colour, linestyle=dashes, marker=marker, linewidth=1.4, markersize=5.5)
    line.set_markerfacecolor(colour if loss else "white")
    return line


def _logarithmic(axes: Axes) -> None:
    """Makes the axis of values logarithmic where there is anything positive to show, with plain numbers."""
    if not any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.lines):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_thresholds(axes: Axes, rates: Sequence[float]) -> None:
    """Marks 2/η, above which gradient descent is unstable, of the learning rates of a loss function."""
    for rate in rates:
        axes.axhline(2 / rate, color="0.35", linewidth=1.2, linestyle=(0, (1, 2)), zorder=1.5)
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False, "fontsize": 8}
        axes.annotate(f"2/η,\nη = {rate:g}", (1.01, 2 / rate), **place)


def _label_sizes(axes: Axes, own: Sequence[Point]) -> None:
    """The axis of sizes: numbers of parameters, and below each the width."""
    widths = {point.parameters: point.width for point in own}
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(widths)))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{n:,}\n({width})" for n, width in widths.items()]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("number of parameters (width)")
