"""The figure of the static loss alone, after the second paper's first: training by network and learning rate."""

import os
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ..results.labelled import by_setting
from ..results.style import STATIC, STYLES, finish, ruled
from .dynamics import band, round_numbers

# Of a network, or of a learning rate if there is one network; beyond seven the markers are hollow.
_LOOKS = (STATIC, *STYLES)
# Of a learning rate; beyond six the lines are thick.
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (10, 2)), (0, (3, 3)))
_MOST = 12  # settings that are drawn
_HIGHEST = 100  # times what a network begins with: where the axes end, or a diverging loss would flatten the others


def static_curves(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of the members of the static loss: train loss and, if it was observed, largest eigenvalue of the
    Hessian against the step, a curve for each of the first twelve settings. The figure is returned too.

    Curves are medians over seeds of means over windows of updates, with a band from the 16th to the 84th percentile.
    Learning rates differ in line style, and networks, i.e. initialisation and width, in colour and marker. Horizontal
    lines mark 2/η, above which gradient descent is unstable.
    """
    parts = [(name, part.isel(amplitude=0, period=0)) for name, part in by_setting(dataset)]
    shown = parts[:_MOST]
    networks = list(dict.fromkeys(_coordinates(members, "init", "width") for _, members in shown))
    rates = list(dict.fromkeys(_coordinates(members, "learning_rate") for _, members in shown))
    thresholds = {f"2/η, η = {rate:.3g}": 2 / rate for (rate,) in filter(None, rates)}
    loss = dataset.attrs.get("loss_function", "cross-entropy")
    panels = [("minibatch_loss", "step", f"train loss ({'nats' if loss == 'cross-entropy' else loss})", {})]
    if "hessian_max" in dataset:
        panels.append(("hessian_max", "observation_step", "largest Hessian eigenvalue", thresholds))
    figure = Figure(figsize=(10, 0.8 + 3.5 * len(panels) + 0.25 * ((len(shown) + 1) // 2)), dpi=150)
    figure.set_layout_engine("constrained")
    cells = np.ravel(figure.subplots(len(panels), 1, sharex=True, squeeze=False))

    for axes, (variable, dim, label, marked) in zip(cells, panels, strict=True):
        begins = np.array([members[variable].values[:, :1] for _, members in shown])
        top = _HIGHEST * max([*begins[np.isfinite(begins)], *marked.values()], default=1.0)
        for i, (name, members) in enumerate(shown):
            network = networks.index(_coordinates(members, "init", "width"))
            rate = rates.index(_coordinates(members, "learning_rate"))
            look = network if len(networks) > 1 else rate
            style = (_LOOKS[look % 7][0], _DASHES[rate % 6])
            # What is off the scale is brought near: an axis cannot be fitted to 10^300, or to infinity.
            values = np.minimum(members[variable].values, 2 * top)
            line = band(axes, dataset[dim].values, values, style, _label(name, members))
            every = max(1, np.size(line.get_xdata()) // 8)
            line.set(marker=_LOOKS[look % 7][2], markersize=5, markevery=(every * i // len(shown), every))
            line.set(markerfacecolor=style[0] if look < 7 else "white", linewidth=1.4 if rate < 6 else 2.8)
        for height in marked.values():
            axes.axhline(height, color="0.35", linewidth=1, linestyle=(0, (8, 4)), zorder=1.5)
        if any(np.any(np.asarray(line.get_ydata()) > 0) for line in axes.lines):
            axes.set_yscale("log")
            axes.set_ylim(top=min(top, axes.get_ylim()[1]))
            round_numbers(axes)
        low, high = axes.get_ylim()
        for text, height in marked.items():
            if 1e-6 * low < height < 1e6 * high:
                place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
                axes.annotate(text, (1.01, height), fontsize=8, **place)
        axes.set_ylabel(label)
        ruled(axes)
    cells[-1].set_xlabel("step (updates)")
    figure.legend(*cells[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=5)

    seeds = dataset.sizes["seed"]
    note = f"median of {seeds} seeds, band: 16th to 84th percentile" if seeds > 1 else "1 seed, no band"
    note += "; means over windows of updates"
    if any((members.diverged_at >= 0).any() for _, members in shown):
        note += "; members that diverged are missing from then on"
    if len(shown) < len(parts):
        note += f"; the first {len(shown)} of {len(parts)} settings shown"
    return finish(figure, "Static loss" + (f", {loss}" if loss != "cross-entropy" else ""), dataset, note, path)


def _coordinates(members: xr.Dataset, *names: str) -> tuple[Any, ...]:
    return tuple(members[name].item() for name in names if name in members.coords)


def _label(name: str, members: xr.Dataset) -> str:
    lost = int((members.diverged_at >= 0).sum())
    return (name or "static loss") + (f" ({lost} of {members.sizes['seed']} diverged)" if lost else "")
