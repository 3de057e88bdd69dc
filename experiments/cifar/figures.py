"""The two figures of a run on images: learning curves, and the class weights."""

import os
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from ..results import words
from ..results.conditions import Condition
from ..results.labelled import by_loss, loss_name
from ..results.style import BINS, STATIC, STYLES, extremes, finish, ruled
from ..results.summary import summarise

_ROUNDING = 1e-6  # of float32 class weights, which are around 1
_WINDOWS = 100  # the training loss is averaged over at most this many windows
_MOST_LINES = 8  # seeds that are drawn one by one
_DENSE = 6  # passes over all classes beyond which single classes cannot be told apart


def learning_curves(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG: validation accuracy and loss, curvature if observed, and minibatch loss against the step.

    Lines are means over seeds, with a band of ± std, and thin ones the seeds themselves if they are at most eight.
    Diverged members are left out; they, and those that collapsed, are counted in the legend. Of more than six dynamical
    conditions, six are drawn, evenly spread over the grid rather than picked by their result. The figure is returned
    too.
    """
    dynamical, note = _dynamical(dataset, len(STYLES))
    curved = "peak_hessian_max" in dataset and dataset.sizes["observation_step"] > 0
    height = 10.0 + 2.8 * curved + 0.22 * len(dynamical)
    figure = Figure(figsize=(8.5, height), dpi=150, layout="constrained")
    top, second, *middle, bottom = figure.subplots(3 + curved, 1, sharex=True)
    summarised = {(c.amplitude, c.period): c for c in summarise(dataset).conditions}
    for condition, style in zip([dataset.isel(amplitude=0, period=0), *dynamical], (STATIC, *STYLES), strict=False):
        survivors = condition.isel(seed=condition.diverged_at.values < 0)
        amplitude, period = float(condition.amplitude), float(condition.period)
        found = summarised[amplitude, None if amplitude == 1 else period]
        top.plot([], [], **_look(style, 1), label=_label(found))
        if not survivors.sizes["seed"]:
            continue
        accuracy = 100 * survivors.accuracy.sel(split="validation").values
        evaluated = np.isfinite(accuracy).any(0)
        steps, loss = dataset.evaluation_step.values[evaluated], survivors.loss.sel(split="validation").values
        _band(top, steps, accuracy[:, evaluated], style)
        _band(second, steps, loss[:, evaluated], style)
        for axes in middle:
            _curvature(axes, survivors, style)
        steps, means = _windows(survivors.minibatch_loss.values.astype(np.float64))
        _band(bottom, steps, np.log(np.maximum(means, 1e-12)), style, np.exp)

    top.set_ylabel("validation accuracy (%)")
    second.set_ylabel("validation loss,\nno class weights (nats)")
    for axes in middle:
        _thresholds(axes, dataset)
    bottom.set_yscale("log" if dataset.sizes["step"] else "linear")  # a log axis cannot be empty
    low, high = bottom.get_ylim()
    if low > 0 and high < 10 * low:  # within a decade: plain numbers, evenly spaced
        bottom.yaxis.set_major_locator(MaxNLocator(6))
        bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bottom.yaxis.set_minor_locator(NullLocator())
    if not dataset.sizes["evaluation_step"]:
        top.text(0.5, 0.5, "not evaluated yet", transform=top.transAxes, ha="center")
        top.set_yticks([])
    window = max(1, round(dataset.sizes["step"] / _WINDOWS))
    bottom.set_ylabel("minibatch loss as minimised (nats)" + (f",\nmean of {window:,} updates" if window > 1 else ""))
    bottom.set_xlabel("step (optimiser updates)")
    for axes in (top, second, *middle, bottom):
        ruled(axes)
    if "steps_per_epoch" in dataset.attrs:
        length = float(dataset.attrs["steps_per_epoch"])
        epochs = top.secondary_xaxis("top", functions=(lambda step: step / length, lambda epoch: epoch * length))
        epochs.set_xlabel("epoch")
    members = dataset.sizes["seed"]
    bands = f"mean ± std of {members} seeds; bands: ± std (log axes: of the logarithm)"
    seeds = "; thin: every seed" if 1 < members <= _MOST_LINES else ""
    title = "1 seed, no band" if members == 1 else bands + seeds
    figure.legend(
        *top.get_legend_handles_labels(),
        loc="outside lower center",
        handlelength=4.5,
        title=f"last validation accuracy and loss, {title}",
    )
    return finish(figure, "Static and dynamical loss", dataset, note, path)


def _label(found: Condition) -> str:
    """A loss, its last validation accuracy, and what became of its seeds."""
    label, outcome = found.name, found.outcome("validation")
    if len(found.diverged) == found.seeds:
        return f"{label}: diverged for every seed"
    if outcome.mean is not None:
        label += f": {outcome.spread(100, 1)} %, {found.outcome('validation', 'loss').spread()} nats"
    remarks = [f"median {words.number(outcome.median, 100, 1)}"] if found.collapsed and outcome.median else []
    remarks += [f"{len(found.collapsed)} of {found.seeds} seeds collapsed"] if found.collapsed else []
    if found.diverged:
        remarks.append(f"{found.used} of {found.seeds} seeds; the others diverged")
    return label + (f" ({'; '.join(remarks)})" if remarks else "")


def _curvature(axes: Axes, members: xr.Dataset, style: tuple[str, Any, str]) -> None:
    """The largest Hessian eigenvalues of one condition: with a class at its peak, and, thin, of the static loss."""
    steps = members.observation_step.values
    largest = members.peak_hessian_max.transpose("seed", ...).values
    _band(axes, steps, np.log(np.maximum(largest, 1e-12)), style, np.exp)
    if float(members.amplitude) > 1:
        static = members.static_hessian_max.transpose("seed", ...).values
        mean = np.exp(np.log(np.maximum(static, 1e-12)).mean(0))
        axes.plot(steps, mean, **_look(style, len(steps)) | {"linewidth": 1.0, "markerfacecolor": "white"})


def _thresholds(axes: Axes, dataset: xr.Dataset) -> None:
    """What a quadratic loss is stable below: 2/η in gradient descent, and less with Nesterov's momentum (Cohen et al.
    2021, Gradient descent on neural networks typically occurs at the edge of stability, appendix B)."""
    steps, rate, beta = dataset.observation_step.values, dataset.step_size.values, float(dataset.attrs["momentum"])
    axes.plot(steps, 2 / rate, color="0.3", linestyle=(0, (1, 1)), linewidth=1.2, label="2/η")
    limit = (2 + 2 * beta) / (1 + 2 * beta) / rate
    axes.plot(steps, limit, color="0.3", linewidth=1.2, label=f"stable below, with Nesterov momentum {beta:g}")
    axes.set_yscale("log")
    axes.set_ylabel("largest Hessian eigenvalue:\na class at its peak (thin, hollow: static loss)")
    axes.legend(fontsize=8)


def class_weights(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of the class weights of up to four dynamical conditions: the full run, and the first pass over all
    classes with the classes named at their peaks. The figure is returned too."""
    dynamical, note = _dynamical(dataset, 4)
    shown = dynamical or [dataset.isel(amplitude=0, period=0)]
    columns, rows = min(len(shown), 2), (len(shown) + 1) // 2
    figure = Figure(figsize=(9.0 if columns == 1 else 14.0, 1.2 + 5.8 * rows), dpi=150, layout="constrained")
    cells = np.ravel(figure.subfigures(rows, columns, squeeze=False))
    for condition, cell in zip(shown, cells, strict=False):
        whole, zoom = cell.subplots(2, 1)
        weights = condition.class_weights.values  # [steps, classes]
        steps, classes = weights.shape
        period = steps / classes if not dynamical else float(condition.period)
        first = min(steps, round(classes * period) + 1)
        whole.set_title(f"{loss_name(condition)}: full run")
        zoom.set_title("first pass over all classes (grey: the classes whose turn it is not)")
        if steps > _DENSE * classes * period:
            _range(whole, weights, period)
            whole.set_title(f"{loss_name(condition)}: full run, range of all class weights in each period")
        else:
            _lines(whole, weights)
        _lines(zoom, weights[:first])
        _name_peaks(zoom, weights[:first], condition["class"].values.tolist(), period)
        for axes in (whole, zoom):
            axes.axhline(1, color="0.4", linewidth=0.8, zorder=0)
            axes.set_ylabel("class weight Γ")
            axes.margins(x=0.01)
            axes.set_ylim(0, 1.15 * weights.max(initial=1))
            ruled(axes)
        zoom.set_xlabel("step (optimiser updates)")
    return finish(figure, "Class weights of the dynamical loss", dataset, note, path)


def _dynamical(dataset: xr.Dataset, limit: int) -> tuple[list[xr.Dataset], str]:
    """At most `limit` dynamical conditions, evenly spread over the grid, and a remark if there are more."""
    dynamical = by_loss(dataset)[1:]
    picked = np.unique(np.linspace(0, len(dynamical) - 1, min(limit, len(dynamical))).round().astype(int))
    note = f"{len(picked)} of {len(dynamical)} dynamical conditions shown" if len(picked) < len(dynamical) else ""
    return [dynamical[i] for i in picked], note


def _look(style: tuple[str, Any, str], points: int) -> dict[str, Any]:
    """Line properties; markers sit at about ten of the points, others for every style, so that equal curves show."""
    colour, dashes, marker = style
    every = max(1, points // 10)
    return {
        "color": colour,
        "linestyle": dashes,
        "linewidth": 1.8,
        "marker": marker,
        "markersize": 5,
        "markevery": (every * (STATIC, *STYLES).index(style) // 7, every),
    }


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, style: tuple[str, Any, str], transform: Any = np.asarray):
    """Draws the mean of `[seeds, points]` through `transform` and, for more than one seed, mean ± std and the seeds."""
    mean = values.mean(0)
    axes.plot(x, transform(mean), **_look(style, len(x)))
    if len(values) > 1:
        std = values.std(0, ddof=1)
        axes.fill_between(x, transform(mean - std), transform(mean + std), color=style[0], alpha=0.12, linewidth=0)
    if 1 < len(values) <= _MOST_LINES:
        axes.plot(x, transform(values.T), color=style[0], linestyle=style[1], linewidth=0.6, alpha=0.5, zorder=1.5)


def _windows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of `[seeds, steps]` over at most 100 windows of steps, and the windows' middles."""
    steps = values.shape[1]
    edges = np.unique(np.linspace(0, steps, min(steps, _WINDOWS) + 1).astype(int))
    return (edges[:-1] + edges[1:] - 1) / 2, np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)


def _lines(axes: Axes, weights: np.ndarray) -> None:
    """A line per class of `[steps, classes]` while its weight is above 1, and grey for the rest.

    Six colours and five line styles give 30 distinct pairs.
    """
    styles = (STATIC, *STYLES[:5])
    for i, series in enumerate(weights.T, start=1):
        steps, thinned = extremes(series)
        active = np.where(thinned >= 1 - _ROUNDING, thinned, np.nan)
        axes.plot(steps, active, color=styles[i % 6][0], linestyle=styles[i % 5][1], linewidth=1.5)
        resting = np.where(thinned <= 1 + _ROUNDING, thinned, np.nan)
        axes.plot(steps, resting, color="0.6", linewidth=1, zorder=2.5)


def _range(axes: Axes, weights: np.ndarray, period: float) -> None:
    """The range of all weights `[steps, classes]` in bins no shorter than a period, where lines would be a blur."""
    bins = max(1, min(BINS, int(len(weights) / period)))
    edges = np.unique(np.linspace(0, len(weights), bins + 1).astype(int))
    low, high = np.minimum.reduceat(weights.min(1), edges[:-1]), np.maximum.reduceat(weights.max(1), edges[:-1])
    axes.stairs(high, edges, baseline=low, fill=True, color="0.85")
    axes.stairs(high, edges, baseline=low, color="black", linewidth=0.8)


def _name_peaks(axes: Axes, weights: np.ndarray, names: list[str], period: float) -> None:
    """Writes each class's name above its peak, if the peak falls inside `[steps, classes]`."""
    for i, name in enumerate(names):
        peak = int(weights[:, i].argmax()) if len(weights) else 0
        if len(weights) and weights[peak, i] > 1 + _ROUNDING:
            axes.annotate(name, (peak, weights[peak, i]), (0, 4), textcoords="offset points", ha="center", fontsize=8)
