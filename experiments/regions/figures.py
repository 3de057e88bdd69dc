"""Figures of decision regions: static and dynamical loss side by side while they learn, and as an animation."""

import os
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eqx_dynloss.train import Dataset

from ..problems import spiral
from ..results.labelled import by_loss, loss_name
from ..results.style import CLASSES, finish

_MARKERS = ("o", "s", "^")


def regions(dataset: xr.Dataset, seed: int, count: int, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG: a row for the static and for the dynamical loss, one seed, and a column for each of `count` evenly
    spaced steps; what a network decides in the colour of the class, the stronger the surer it is."""
    both = by_loss(dataset.squeeze(["init", "width", "learning_rate"]))
    frames = np.linspace(0, dataset.sizes["observation_step"] - 1, count).round().astype(int)
    figure = Figure(figsize=(max(7.5, 1.2 + 2.2 * count), 6.3), dpi=150, layout="constrained")
    panels = figure.subplots(len(both), count, squeeze=False, sharex=True, sharey=True)
    for row, members in zip(panels, both, strict=True):
        row[0].set_ylabel(f"{loss_name(members)}\ny")
        for axes, frame in zip(row, frames, strict=True):
            _panel(axes, members.sel(seed=seed), int(frame))
    for axes in panels[-1]:
        axes.set_xlabel("x")
    _legend(figure)
    return finish(figure, f"Decision regions, seed {seed}", dataset, "", path)


def animation(dataset: xr.Dataset, seed: int, path: str | os.PathLike[str]) -> None:
    """Writes a GIF of all steps, static loss on the left and dynamical loss on the right, four to a second."""
    both = by_loss(dataset.squeeze(["init", "width", "learning_rate"]))
    figure = Figure(figsize=(9, 5.6), dpi=80, layout="constrained")
    panels = figure.subplots(1, len(both), sharey=True)
    _legend(figure)

    def draw(frame: int) -> list[Axes]:
        for axes, members in zip(panels, both, strict=True):
            axes.clear()
            axes.set_xlabel("x")
            _panel(axes, members.sel(seed=seed), frame, f"{loss_name(members)}\n")
        panels[0].set_ylabel("y")
        return list(panels)

    frames = dataset.sizes["observation_step"]
    FuncAnimation(figure, draw, frames, init_func=lambda: []).save(os.fspath(path), PillowWriter(fps=4))


def _panel(axes: Axes, member: xr.Dataset, frame: int, lead: str = "") -> None:
    seen = member.isel(observation_step=frame)
    colours = np.array([to_rgb(colour) for colour, _ in CLASSES])
    decision = seen.decision.transpose("y", "x").values
    strength = (np.nan_to_num(seen.confidence.transpose("y", "x").values, nan=1 / 3) - 1 / 3) * 3 / 2
    strength = np.where(decision < 0, 0, 0.08 + 0.72 * strength)[..., None]
    picture = 1 - strength + strength * colours[decision]
    x, y = seen.x.values, seen.y.values
    axes.imshow(picture, extent=(x[0], x[-1], y[0], y[-1]), origin="lower", interpolation="nearest")
    if len(np.unique(decision)) > 1:
        for one in range(len(CLASSES)):
            axes.contour(x, y, decision == one, levels=[0.5], colors="black", linewidths=0.5)
    for data, filled in ((spiral.spiral(0), True), (spiral.spiral(1), False)):
        _points(axes, data, filled)
    step = int(seen.observation_step)
    evaluated = member.sel(split="validation").accuracy
    reached = float(evaluated.sel(evaluation_step=step)) if step in evaluated.evaluation_step else np.nan
    axes.set_title(f"{lead}step {step:,}" + (f": {100 * reached:.0f} %" if np.isfinite(reached) else ""), fontsize=9)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])


def _points(axes: Axes, data: Dataset, filled: bool) -> None:
    for one, ((colour, _), marker) in enumerate(zip(CLASSES, _MARKERS, strict=True)):
        at = np.asarray(data.inputs)[np.asarray(data.labels) == one]
        face: dict[str, Any] = {
            "markerfacecolor": colour if filled else "white",
            "markeredgecolor": "white" if filled else colour,
        }
        axes.plot(*at.T, linestyle="none", marker=marker, markersize=3 if filled else 2.2, markeredgewidth=0.4, **face)


def _legend(figure: Figure) -> None:
    look: list[tuple[str, dict[str, Any]]] = [
        (f"class {one}", {"marker": marker, "markerfacecolor": colour})
        for one, ((colour, _), marker) in enumerate(zip(CLASSES, _MARKERS, strict=True))
    ]
    look.append(("hollow: validation points", {"marker": "o", "markerfacecolor": "white"}))
    handles = [Line2D([], [], linestyle="none", color="black", label=label, **style) for label, style in look]
    title = "colour: the network's decision, the stronger the surer; %: validation accuracy"
    figure.legend(handles=handles, title=title, loc="outside lower center", ncols=len(handles), fontsize=9)
