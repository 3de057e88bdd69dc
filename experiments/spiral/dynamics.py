"""Figures of the landscape while it moves: the six rows of the paper's Figure 4, for one seed and over seeds."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ..results.labelled import by_loss, by_setting, loss_name, loss_unit
from ..results.style import CLASSES, STATIC, STYLES, extremes, finish, ruled
from . import bifurcation

_STATIC, _DYNAMICAL = ("0.45", (0, (4, 1.5))), (STYLES[0][0], "solid")
_OF_LOSS = (STATIC, *STYLES[:5])
_WINDOWS = 400  # a series is averaged over about this many windows before seeds are compared
_MOST = 12  # conditions that are drawn


def write(dataset: xr.Dataset, directory: Path, seed: int) -> list[Path]:
    """Draws everything: `dynamics…` and `dynamics_over_seeds…` for each dynamical loss, `accuracy`, `bifurcation`."""
    written = []

    def add(draw: Callable[..., Figure], name: str, *arguments: Any) -> None:
        written.append(directory / name)
        draw(*arguments, written[-1])

    pairs = list(_pairs(dataset))
    for name, static, members in pairs[:_MOST]:
        suffix = "" if len(pairs) == 1 else "-" + re.sub("[^A-Za-z0-9.+]+", "-", name.replace(" = ", ""))
        add(one_seed, f"dynamics{suffix}.png", members, seed)
        add(over_seeds, f"dynamics_over_seeds{suffix}.png", static, members)
    add(accuracy, "accuracy.png", dataset)
    if "hessian_max" in dataset:
        add(bifurcation.figure, "bifurcation.png", dataset)
    return written


def _pairs(dataset: xr.Dataset) -> Iterator[tuple[str, xr.Dataset, xr.Dataset]]:
    """For every setting and dynamical loss: its name, the static members, its members. The static loss if it is all."""
    for setting, part in by_setting(dataset):
        static, *dynamical = by_loss(part)
        for members in dynamical or [static]:
            yield f"{setting}, {loss_name(members)}".removeprefix(", "), static, members


def one_seed(members: xr.Dataset, seed: int, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of one member, the whole run on the left and the second period's end on the right, as in the paper:
    class weights, loss, its change from one update to the next, accuracy, largest eigenvalues of Hessian and NTK."""
    member = members.sel(seed=seed)
    figure, rows = _six_rows(members)
    for column, (low, high) in enumerate(_ranges(members)):
        steps = np.arange(low, high)
        loss = member.minibatch_loss.values[low : high + 1]
        _weights(rows["weights"][column], steps, member)
        _series(rows["loss"][column], steps, loss[: len(steps)], column)
        _series(rows["difference"][column], steps[: len(loss) - 1], loss[:-1] - loss[1:], column)
        _series(rows["accuracy"][column], steps, member.minibatch_accuracy.values[low:high], column)
        if "hessian_max" in member:
            seen = member.sel(observation_step=slice(low, high - 1))
            for row in ("hessian_max", "ntk_max"):
                style = {"linestyle": "none", "marker": ".", "markersize": 2.5 if column else 1.2, "color": "black"}
                rows[row][column].plot(seen.observation_step, seen[row], **style)
        rows["difference"][column].set_ylim((-0.25, 0.25) if column == 0 else (-0.15, 0.15))
        rows["accuracy"][column].set_ylim(0, 1.03)
    _finish_rows(rows, members)
    return finish(figure, f"{loss_name(members)}, seed {seed}", members, "", path)


def over_seeds(static: xr.Dataset, members: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of the same rows for all seeds: median and the range from the 16th to the 84th percentile, of means
    over windows of updates; of the change from one update to the next, the mean size. Static loss for comparison."""
    figure, rows = _six_rows(members)
    rows["difference"][0].set_ylabel(f"size of the one-step\ndifference{_unit(members)}")
    sides = [("static", static, _STATIC)] * (static.amplitude.item() != members.amplitude.item())
    sides.append((loss_name(members), members, _DYNAMICAL))
    for column, (low, high) in enumerate(_ranges(members)):
        steps = np.arange(low, high)
        _weights(rows["weights"][column], steps, members)
        for label, side, style in sides:
            loss = side.minibatch_loss.values[:, low : high + 1]
            band(rows["loss"][column], steps, loss[:, : len(steps)], style, label)
            band(rows["difference"][column], steps[: loss.shape[1] - 1], abs(np.diff(loss)), style, label)
            band(rows["accuracy"][column], steps, side.minibatch_accuracy.values[:, low:high], style, label)
            if "hessian_max" in side:
                seen = side.sel(observation_step=slice(low, high - 1))
                for row in ("hessian_max", "ntk_max"):
                    band(rows[row][column], seen.observation_step.values, seen[row].values, style, label)
        rows["accuracy"][column].set_ylim(0, 1.03)
    _finish_rows(rows, members, "difference")
    rows["loss"][0].legend(fontsize=7, loc="lower left", ncols=2)
    lost = sum(int((side.diverged_at >= 0).sum()) for _, side, _ in sides)
    seeds = f"median of {members.sizes['seed']} seeds, band: 16th to 84th percentile; means over windows of updates"
    seeds += f"; {lost} members diverged and are missing from then on" if lost else ""
    return finish(figure, loss_name(members), members, seeds, path)


def accuracy(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of the accuracies at the end, a point per seed with mean ± std, by setting and loss."""
    groups = [(setting, by_loss(part)) for setting, part in by_setting(dataset)]
    names = [loss_name(members) for members in groups[0][1]]
    figure = Figure(figsize=(max(7.0, 2.5 + 1.7 * len(groups) * max(1, len(names) / 3)), 7.5), dpi=150)
    figure.set_layout_engine("constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    hollow: dict[str, Any] = {"markersize": 5, "markerfacecolor": "none", "linestyle": "none"}
    for axes, split in ((top, "train"), (bottom, "validation")):
        for index, (_, shown) in enumerate(groups):
            for i, members in enumerate(shown):
                x = index + 0.8 * ((i + 0.5) / len(shown) - 0.5)
                values = members.accuracy.sel(split=split).values[members.diverged_at.values < 0]
                values = values[:, np.isfinite(values).any(0)][:, -1:].ravel()
                values = 100 * values[np.isfinite(values)]
                if len(values) < members.sizes["seed"]:
                    axes.text(x, 26, f"{members.sizes['seed'] - len(values)} left out", fontsize=7, ha="center")
                spread = np.linspace(-0.08, 0.08, len(values)) * min(1, 3 / len(shown))
                style = {"color": _OF_LOSS[i % 6][0], "marker": _OF_LOSS[i % 6][2]}
                axes.plot(x + spread, values, **style, **hollow)
                if len(values) > 1:
                    axes.errorbar(x, values.mean(), values.std(ddof=1), color="black", capsize=5, linewidth=1.2)
                    axes.plot([x - 0.07, x + 0.07], [values.mean()] * 2, color="black", linewidth=2)
        axes.axhline(100 / 3, color="0.5", linewidth=0.8, linestyle=(0, (1, 2)))
        axes.text(-0.48, 100 / 3 + 1, "chance", fontsize=8, color="0.35")
        axes.set_ylabel(f"{split} accuracy (%)")
        axes.set_ylim(25, 112)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.grid(alpha=0.3, axis="y")
    bottom.set_xticks(range(len(groups)), [name.replace(", ", "\n") for name, _ in groups])
    for i, name in enumerate(names):
        bottom.plot([], [], color=_OF_LOSS[i % 6][0], marker=_OF_LOSS[i % 6][2], label=name, **hollow)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(names)))
    return finish(
        figure, "Accuracy at the end", dataset, "a point per seed that did not diverge; bars: mean ± std", path
    )


def _unit(members: xr.Dataset) -> str:
    return f" ({unit})" if (unit := loss_unit(members)) else ""


def _six_rows(members: xr.Dataset) -> tuple[Figure, dict[str, tuple[Axes, Axes]]]:
    """An empty figure: for every row, by name, the axes of the whole run and of the zoom."""
    labels = {
        "weights": "class weight Γ",
        "loss": f"loss F{_unit(members)}",
        "difference": f"F(t) − F(t + 1)\n{_unit(members)}".rstrip(),
        "accuracy": "train accuracy",
        "hessian_max": "largest Hessian\neigenvalue",
        "ntk_max": "largest NTK\neigenvalue",
    }
    if "hessian_max" not in members:
        labels = dict(list(labels.items())[:4])
    figure = Figure(figsize=(12, 1.0 + 2.05 * len(labels)), dpi=150, layout="constrained")
    cells = figure.subplots(len(labels), 2, sharex="col", width_ratios=(3, 2))
    rows = dict(zip(labels, map(tuple, cells), strict=True))
    for name, pair in rows.items():
        pair[0].set_ylabel(labels[name])
        for axes, (low, high) in zip(pair, _ranges(members), strict=True):
            axes.set_xlim(low, high)
            ruled(axes)
    for axes in cells[-1]:
        axes.set_xlabel("step (updates)")
    return figure, rows


def _ranges(members: xr.Dataset) -> tuple[tuple[int, int], tuple[int, int]]:
    """The steps of the two columns: all, and from 1.6 to 2.1 periods (8,000 to 10,500 in the paper), if there are."""
    steps = int(np.isfinite(members.minibatch_loss.values).any(0).sum())
    period = float(members.period) if float(members.amplitude) > 1 else steps / 4
    low, high = round(1.6 * period), min(round(2.1 * period), steps)
    return (0, steps), (low, high) if high - low > 1 else (0, steps)


def _finish_rows(rows: dict[str, tuple[Axes, Axes]], members: xr.Dataset, *logarithmic: str) -> None:
    """Makes the axes of loss, Hessian and other rows logarithmic where there is anything positive to show, and adds the
    line 2/η, above which gradient descent is unstable."""
    for name in ("loss", "hessian_max", *logarithmic):
        for axes in rows.get(name, ()):
            if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.lines):
                axes.set_yscale("log")
                round_numbers(axes)
    rows["weights"][0].legend(fontsize=7, loc="upper right", ncols=3)
    for axes in rows.get("hessian_max", ()):
        axes.axhline(2 / float(members.learning_rate), color=STYLES[4][0], linewidth=1.2, linestyle=(0, (6, 2)))
        label = f"2/η = {2 / float(members.learning_rate):g}"
        place = (0.995, 2 / float(members.learning_rate))
        axes.annotate(label, place, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)


def round_numbers(axes: Axes) -> None:
    """Labels a logarithmic axis with plain numbers: powers of ten; within two decades also 2 and 5; within a factor of
    five what a linear axis would have."""
    low, high = axes.get_ylim()
    decades = LogLocator(10, (1, 2, 5) if high < 100 * low else (1,))
    axes.yaxis.set_major_locator(MaxNLocator(5) if high < 5 * low else decades)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _weights(axes: Axes, steps: np.ndarray, members: xr.Dataset) -> None:
    """The class weights in the paper's colours, with room for a legend."""
    for i, (colour, dashes) in enumerate(CLASSES):
        series = members.class_weights.values[steps[0] : steps[-1] + 1, i]
        axes.plot(steps, series, color=colour, linestyle=dashes, linewidth=1.3, label=f"class {i}")
    axes.set_ylim(0, 1.25 * float(members.class_weights.max()))


def _series(axes: Axes, steps: np.ndarray, values: np.ndarray, zoom: int) -> None:
    """A line in the long view; points in the zoom, where the branches of an alternating series shall show."""
    if zoom:
        axes.plot(steps, values, linestyle="none", marker=".", markersize=1, color="black")
    else:
        kept, thinned = extremes(values)
        axes.plot(steps[kept], thinned, color="black", linewidth=0.6)


def band(axes: Axes, steps: np.ndarray, values: np.ndarray, style: tuple[str, Any], label: str) -> Line2D:
    """Draws median and 16th to 84th percentile over seeds of `[seeds, steps]`, averaged over windows of steps first.

    A window has at least four of them: single ones of an alternating series would show which of them are odd.
    Returns the median's line, empty if there is nothing to draw.
    """
    edges = np.unique(np.linspace(0, len(steps), np.clip(len(steps) // 4, 1, _WINDOWS) + 1).astype(int))
    lengths = np.diff(edges)
    means = np.add.reduceat(values, edges[:-1], axis=1) / lengths if lengths.size else values
    trained = np.isfinite(means).any(0)
    if not trained.any():
        return axes.plot([], [], color=style[0], linestyle=style[1], label=label)[0]
    x = (np.add.reduceat(steps, edges[:-1]) / lengths)[trained]
    low, middle, high = np.nanquantile(means[:, trained], (0.16, 0.5, 0.84), axis=0)
    (line,) = axes.plot(x, middle, color=style[0], linestyle=style[1], linewidth=1.2, label=label)
    if len(values) > 1:
        axes.fill_between(x, low, high, color=style[0], alpha=0.25, linewidth=0)
    return line
