"""The bifurcation diagram: which values the loss takes in the end, against the learning rate."""

import os
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..results.style import finish
from . import thresholds

_SHADES = {2: ("0.87", "period 2"), 4: ("0.6", "period 4"), 0: ("0.25", "no period"), -1: ("#D55E00", "diverges")}


def draw(dataset: xr.Dataset, seed: int, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG with a panel for every frozen loss: the values of the loss at the last updates of one seed, a dot
    each, against the learning rate in units of 2/λ, and below in which rates it has which period."""
    names = dataset.frozen.values.tolist()
    figure = Figure(figsize=(10, 1.2 + 3.6 * len(names)), dpi=150, layout="constrained")
    panels = np.ravel(figure.subplots(len(names), 1, sharex=True, squeeze=False))
    for axes, name in zip(panels, names, strict=True):
        part = dataset.sel(frozen=name, seed=seed)
        multiples, loss = part.multiple.values, part.final_loss.values
        axes.plot(np.repeat(multiples, loss.shape[1]), loss.ravel(), ",", color="black", alpha=0.8)
        axes.axvline(1, color="#0072B2", linewidth=1.2, linestyle=(0, (6, 2)), label="η = 2/λ")
        dotted: dict[str, Any] = {"color": "0.4", "linewidth": 0.8, "linestyle": (0, (1, 2))}
        axes.axhline(float(part.initial_loss[0]), label="loss at the start", **dotted)
        _strip(axes, multiples, thresholds.behaviour(loss, part.initial_loss.values))
        largest = float(part.hessian_max)
        title = "static loss" if name == "static" else f"loss frozen at {name}"
        axes.set_title(f"{title}: λ = {largest:.3g}, 2/λ = {2 / largest:.3g}" if np.isfinite(largest) else title)
        axes.set_ylabel("loss at the last updates (nats)")
        if (loss > 0).any():
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
    shown = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=9)
    panels[-1].set_xlabel("learning rate η (units of 2/λ)")
    note = f"the last {dataset.sizes['update']} updates; the strip below says what they are"
    return finish(figure, f"Bifurcations of a frozen loss, seed {seed}", dataset, note, path)


def _strip(axes, multiples: np.ndarray, seen: np.ndarray) -> None:
    """A strip along the bottom, in axes' heights: what the last updates do at every rate."""
    half = (multiples[1] - multiples[0]) / 2
    for value, (colour, label) in _SHADES.items():
        for k, multiple in enumerate(multiples[seen == value]):
            axes.axvspan(multiple - half, multiple + half, 0, 0.05, color=colour, linewidth=0,
                         label=label if k == 0 else None)  # fmt: skip
