"""The figure of several phase diagrams: accuracies of static and dynamical loss against the width."""

import os

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from ..results.style import STATIC, STYLES, finish
from .statistics import best, loss_function, over_cells, series, statistics

_LINES = (
    "static loss (A = 1)",
    "dynamical loss, mean of all cells",
    "dynamical loss, best cell by validation accuracy",
)


def gain_by_width(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of the accuracies of static and dynamical loss against the width (or the learning rate, if only that
    varies), mean ± std over seeds; validation above, train below, a column for each other setting."""
    along, groups = series(dataset)
    columns = len(groups)
    figure = Figure(figsize=(2 + 4.6 * columns, 8.5), dpi=150, layout="constrained")
    panels = figure.subplots(2, columns, sharex=True, sharey="row", squeeze=False)
    for (rest, parts), column in zip(groups.items(), panels.T, strict=True):
        x = np.array([part[along].item() for part in parts])
        found = [statistics(part) for part in parts]
        cells = [best(cell.sel(split="validation")) for cell in found]
        for axes, split in zip(column, ("validation", "train"), strict=True):
            at = [each.sel(split=split) for each in found]
            averages = [over_cells(part, split, "outcome") for part in parts]
            curves = (
                [(each.static_mean, each.static_std) for each in at],
                [(each.mean, each.std) for each in averages],
                [(each["mean"][cell], each["std"][cell]) for each, cell in zip(at, cells, strict=True)],
            )
            for i, (label, style, curve) in enumerate(zip(_LINES, (STATIC, *STYLES), curves, strict=False)):
                mean, std = 100 * np.array(curve, float).T
                look = dict(zip(("color", "linestyle", "marker"), style, strict=True))
                axes.errorbar(x * 1.03 ** (i - 1), mean, np.nan_to_num(std), label=label, capsize=4, **look)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(x.tolist()))
            axes.xaxis.set_major_formatter(FixedFormatter([f"{value:g}" for value in x]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
        column[0].set_title(rest)
        column[1].set_xlabel({"width": "width (hidden units or channels)"}.get(along, "learning rate η"))
    panels[0, 0].set_ylabel("validation accuracy (%)")
    panels[1, 0].set_ylabel("train accuracy (%)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center")
    note = f"{dataset.sizes['seed']} seeds, bars: ± std; choosing the best of the cells overstates it"
    return finish(figure, f"Accuracy by {along.replace('_', ' ')}{loss_function(dataset)}", dataset, note, path)
