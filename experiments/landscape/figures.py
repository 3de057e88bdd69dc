"""Figures of a landscape that moves: cuts along the leading eigenvector, and planes with the trajectory in them."""

import os
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..results.labelled import by_loss, loss_name
from ..results.style import STATIC, STYLES, finish
from . import cuts, statistics

_DASHES = ("solid", (0, (6, 1.5)), (0, (2, 1.2)), (0, (6, 1.5, 1, 1.5)))


def write(dataset: xr.Dataset, directory: Path, seed: int) -> list[Path]:
    """Draws `lines.png` and `planes.png` for a seed, the former with all seeds below."""
    paths = [directory / "lines.png", directory / "planes.png"]
    lines(dataset, seed, paths[0])
    planes(dataset, seed, paths[1])
    return paths


def lines(dataset: xr.Dataset, seed: int, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG. Above: the loss along the leading eigenvector at every step, one seed, static loss and dynamical
    one, with the parabola of slope and eigenvalue. Below: lowest loss, width and sharpness of the valley over the
    period, every seed a thin line."""
    both = by_loss(dataset.squeeze(["init", "width", "learning_rate"]))[:2]  # of merged runs the first amplitude
    figure = Figure(figsize=(11, 9.5), dpi=150, layout="constrained")
    axes = figure.subplot_mosaic("aaabbb;ccddee", height_ratios=(1.45, 1))
    seen = np.concatenate([members.sel(seed=seed).loss_along.values.ravel() for members in both])
    seen = seen[seen > 0]
    for panel, members in zip("ab", both, strict=True):
        _cuts(axes[panel], members.sel(seed=seed))
        axes[panel].set_yscale("log")
        if seen.size:
            axes[panel].set_ylim(0.7 * seen.min(), 1.4 * seen.max())
        axes[panel].set_title(f"{loss_name(members)}, seed {seed}", fontsize=10)
    axes["a"].legend(fontsize=8, title="phase of the turn", title_fontsize=8, loc="upper center", ncols=2)
    rows = (("c", "lowest", "lowest loss along v₁ (nats)"), ("d", "width", "width 0.1 nats above that (‖θ‖)"),
            ("e", "sharpness", "largest Hessian eigenvalue"))  # fmt: skip
    outcomes = [statistics.outcomes(members) for members in both]
    for panel, name, label in rows:
        for members, found, (colour, dashes, marker) in zip(both, outcomes, (STATIC, STYLES[0]), strict=True):
            phases, values = statistics.phases(members), found[name]
            axes[panel].plot(phases, values.values.T, color=colour, linewidth=0.5, alpha=0.4)
            style = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4}
            axes[panel].plot(phases, values.median("seed"), **style, label=loss_name(members))
        axes[panel].set_xlabel("phase of the turn (periods T)")
        axes[panel].set_ylabel(label)
        axes[panel].grid(alpha=0.3)
    threshold = 2 / dataset.learning_rate.item()
    axes["e"].axhline(threshold, color="0.35", linewidth=1, linestyle=(0, (8, 4)), label="2/η")
    axes["e"].legend(fontsize=8)
    note = "dotted: parabola of slope and eigenvalue; below: thin lines are seeds, thick ones medians"
    return finish(figure, "The loss along the leading eigenvector v₁", dataset, note, path)


def _cuts(axes: Axes, member: xr.Dataset) -> None:
    colours = colormaps["viridis"](np.linspace(0, 0.85, member.sizes["observation_step"]))
    predicted = cuts.parabola(member)
    for k, (phase, colour) in enumerate(zip(statistics.phases(member), colours, strict=True)):
        cut = member.isel(observation_step=k)
        axes.plot(cut.distance, cut.loss_along, color=colour, linestyle=_DASHES[k % 4], label=f"{phase:.3g} T")
        parabola = predicted.isel(observation_step=k).values
        near = abs(cut.distance.values) <= 0.3 * float(cut.distance.max())
        axes.plot(cut.distance[near], parabola[near], color=colour, linestyle=(0, (1, 2)), linewidth=0.9)
        axes.plot(0, cut.loss_here, marker="o", color=colour, markersize=3)
    axes.set_xlabel("distance along v₁ (norms ‖θ‖ of the parameters)")
    axes.set_ylabel("loss with the step's class weights (nats)")
    axes.grid(alpha=0.3)


def planes(dataset: xr.Dataset, seed: int, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG: for every step a panel with the loss of the dynamical one's network in the plane of the two leading
    eigenvectors, and the updates that follow, projected into it."""
    member = by_loss(dataset.squeeze(["init", "width", "learning_rate"]))[1].sel(seed=seed)
    count = member.sizes["observation_step"]
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 + 3.1 * columns, 1.6 + 3.1 * rows), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    finite = member.loss_in_plane.values[np.isfinite(member.loss_in_plane.values)]
    low, high = (max(finite.min(), 1e-3), finite.max()) if finite.size else (0.1, 1)
    levels, shades = np.geomspace(low, max(high, 1.001 * low), 13), None
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    for axes, step, phase in zip(panels.flat, member.observation_step.values, statistics.phases(member), strict=False):
        cut = member.sel(observation_step=step)
        grid = cut.distance_in_plane.values, cut.second.values
        if np.isfinite(cut.loss_in_plane).all():
            values = np.clip(cut.loss_in_plane.transpose("second", "distance_in_plane"), levels[0], levels[-1])
            shades = axes.contourf(*grid, values, levels=levels, cmap="Greys", norm="log")
            axes.contour(*grid, values, levels=levels, colors="0.35", linewidths=0.4)
        first, second = cut.trajectory.transpose("direction", "update").values
        axes.plot(first, second, color="#D55E00", linewidth=0.8, marker=".", markersize=3)
        axes.plot(first[:1], second[:1], color="white", marker="o", markersize=5, markeredgecolor="#D55E00")
        share = float(cut.share_in_plane)
        text = f"{phase:.3g} T: loss {float(cut.loss_here):.3g}"
        axes.set_title(text + (f", {100 * share:.0f} % in the plane" if np.isfinite(share) else ""), fontsize=9)
    figure.supxlabel("distance along v₁ (norms ‖θ‖ of the parameters)")
    figure.supylabel("distance along v₂ (‖θ‖)")
    if shades is not None:
        figure.colorbar(shades, ax=panels, label="loss (nats)", shrink=0.8, format="%.3g")
    note = f"line: the {member.sizes['update'] - 1} updates that follow, from the circle on; % of their squared lengths"
    return finish(figure, f"{loss_name(member)}, seed {seed}, two leading eigenvectors", dataset, note, path)
