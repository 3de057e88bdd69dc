"""The figures of a comparison: accuracies and losses of all loss functions of all runs, and their learning curves."""

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results.style import STATIC, STYLES, ruled
from ..results.words import spread
from .comparison import Comparison, Row, Run, select

MOST_DRAWN = 40  # rows of the figure
MOST_CURVES = 8
_PANELS = (("validation", "accuracy"), ("validation", "loss"), ("train", "accuracy"))
_DASHES = ("solid", *(dashes for _, dashes, _ in STYLES), (0, (12, 2, 3, 2)))


def draw_outcomes(comparison: Comparison, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of accuracies and validation loss at the last evaluation: a small mark for each seed of every
    condition of every run, and below, mean and 95 % confidence interval. At most 40 conditions are drawn. The figure is
    returned too."""
    rows = select(comparison, MOST_DRAWN)
    styles = _styles(rows)
    ticks: dict[float, str] = {}
    positions, headings, borders, y = [], [], [], 0.0  # y in units of a row, downwards
    for i, row in enumerate(rows):
        if i == 0 or row.run is not rows[i - 1].run:
            heading = _heading(row.run, comparison)
            borders += [y - 0.35] if i else []
            headings.append(len(ticks))
            ticks[y + 0.3 * (len(heading) - 1)] = "\n".join(heading)
            y += 0.6 * len(heading) + 0.2
        ticks[y] = row.name
        positions.append(y)
        y += 1
    figure = Figure(figsize=(14, 2.2 + 0.34 * y), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (split, metric) in zip(panels, _PANELS, strict=True):
        for row, at in zip(rows, positions, strict=True):
            axes.axhline(at, color="0.9", linewidth=0.8, zorder=0)
            _draw_row(axes, row, split, metric, at, styles[row.loss])
        for border in borders:
            axes.axhline(border, color="0.4", linewidth=0.8)
        unit = comparison.unit(metric)
        axes.set_xlabel(f"{split} {metric}" + (f" ({unit})" if unit else ""))
        axes.margins(x=0.06)
        low, high = axes.get_xlim()  # the interval of two seeds can go far beyond what is possible
        axes.set_xlim(max(low, -2 if metric == "accuracy" else 0), min(high, _most(rows, split, metric)))
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(list(ticks), list(ticks.values()))
    panels[0].set_ylim(y - 0.4, -0.5)
    for i in headings:
        panels[0].get_yticklabels()[i].set_fontweight("bold")
    figure.supxlabel("small marks: single seeds; large mark and bar: mean, its 95 % confidence interval", fontsize=10)
    note = f"{len(rows)} of {len(comparison.rows)} rows shown" if len(rows) < len(comparison.rows) else ""
    return _finish(figure, "Accuracy and loss at the last evaluation", comparison, note, path)


def _most(rows: Sequence[Row], split: str, metric: str) -> float:
    """Where an axis has to end: a little above 100 %, or above the largest loss of a seed."""
    if metric == "accuracy":
        return 102.0
    return 1.2 * max((v for row in rows for v in row.condition.outcome(split, metric).values.values()), default=1.0)


def _draw_row(axes: Axes, row: Row, split: str, metric: str, y: float, style: tuple[str, str]) -> None:
    colour, marker = style
    estimate, scale = row.condition.outcome(split, metric), 100 if metric == "accuracy" else 1
    if estimate.mean is None:
        text = "diverged for every seed" if len(row.condition.diverged) == row.condition.seeds else "not evaluated"
        axes.text(0.5, y, text, transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=8)
        return
    seeds = scale * np.array(list(estimate.values.values()))
    axes.plot(seeds, np.full(len(seeds), y - 0.18), marker, color=colour, alpha=0.5, markersize=4, markeredgewidth=0)
    axes.plot(scale * estimate.mean, y + 0.18, marker, color=colour, markersize=8, markeredgecolor="white")
    if estimate.low is not None and estimate.high is not None:
        interval = [scale * estimate.low, scale * estimate.high]
        axes.plot(interval, [y + 0.18] * 2, "|-", color=colour, linewidth=1.6, zorder=1)


def draw_curves(comparison: Comparison, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of validation accuracy against updates, mean over seeds with a band of ± std. Colour and marker tell
    the losses apart, dashes the runs. At most eight curves are drawn. The figure is returned too."""
    rows = select(comparison, MOST_CURVES, least=2)  # the static loss alone would be of no use
    styles, groups = _styles(rows), list(dict.fromkeys((row.run.name, row.condition.setting) for row in rows))
    figure = Figure(figsize=(9, 5.6 + 0.25 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        estimate = row.condition.outcome("validation")
        survivors = list(estimate.values)
        accuracy = 100 * row.members.accuracy.sel(split="validation", seed=survivors)
        accuracy = accuracy.dropna("evaluation_step", how="all")
        x, mean = accuracy.evaluation_step.values, accuracy.mean("seed").values
        colour, marker = styles[row.loss]
        every = max(1, len(x) // 10)
        look: dict[str, Any] = {
            "marker": marker,
            "markersize": 5,
            "markevery": (every * i // len(rows), every),
            "linestyle": _DASHES[groups.index((row.run.name, row.condition.setting))],
        }
        label = f"{row.run.name}: {row.name}"
        if not survivors:
            label += ", nothing to draw"
        elif len(survivors) == 1:
            label += f": {mean[-1]:.1f} %"
        else:
            std = accuracy.std("seed", ddof=1).values
            axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
            label += f": {spread(mean[-1], std[-1], digits=1)} %"
        label = "\n".join(textwrap.wrap(_text(label), 95))
        axes.plot(x, mean, color=colour, label=label, **look)
    axes.set_xlabel("optimiser updates")
    axes.set_ylabel("validation accuracy (%)")
    ruled(axes)
    title = "last validation accuracy, mean ± std over seeds (bands: ± std)"
    figure.legend(loc="outside lower center", handlelength=4.5, title=title)
    note = f"{len(rows)} of {len(comparison.rows)} curves shown" if len(rows) < len(comparison.rows) else ""
    return _finish(figure, "Learning curves", comparison, note, path)


def _styles(rows: Sequence[Row]) -> dict[tuple[float, float | None], tuple[str, str]]:
    """Colour and marker of every loss, the same in all runs; up to 36 dynamical losses differ."""
    dynamical = dict.fromkeys(row.loss for row in rows if row.condition.period is not None)
    n = len(STYLES)
    styles = {loss: (STYLES[i % n][0], STYLES[(i + i // n) % n][2]) for i, loss in enumerate(dynamical)}
    return styles | {(1.0, None): (STATIC[0], STATIC[2])}


def _heading(run: Run, comparison: Comparison) -> list[str]:
    """The lines above the conditions of a run."""
    parts = [run.name, *[run.data] * comparison.mixed, *["INTERRUPTED"] * (not run.summary.finished)]
    return [_text(line) for part in parts for line in textwrap.wrap(part, 40)]


def _text(name: str) -> str:
    """A name that matplotlib prints as it is: dollars would be mathematics, a first underscore not in the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _finish(figure: Figure, title: str, comparison: Comparison, note: str, path: str | os.PathLike[str]) -> Figure:
    """Adds the title, which names the data sets and the interrupted runs, and writes the PNG."""
    lines = [f"{title}: {comparison.data}"]
    lines += ["DIFFERENT DATA SETS: do not compare them"] if comparison.mixed else []
    interrupted = [run.name for run in comparison.runs if not run.summary.finished]
    lines += [f"INTERRUPTED: {', '.join(interrupted)}"] if interrupted else []
    lines += [note] if note else []
    width = int(8.5 * figure.get_figwidth())  # characters
    wrapped = [part for line in lines for part in textwrap.wrap(_text(line), width)]
    figure.suptitle("\n".join(wrapped), fontsize=13, fontweight="bold")
    figure.savefig(path, format="png", metadata={"Title": "; ".join(lines)})
    return figure
