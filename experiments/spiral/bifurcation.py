"""Does a network's first bifurcation begin where its largest Hessian eigenvalue crosses 2/η?

Gradient descent with rate η is unstable along a direction whose curvature is above 2/η: the loss begins to alternate.
The two times are found independently, one in the curvature and one in the loss.
"""

import dataclasses
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from scipy import stats

from eqx_dynloss import landscape

from ..results.estimate import CONFIDENCE, Estimate
from ..results.labelled import by_loss, by_setting, loss_name, loss_unit
from ..results.style import finish, ruled
from ..results.words import correlation, markdown_table

WINDOW = 25  # updates over which the period of the loss is determined
MOST = 12  # panels of the figure


def crossing(steps: np.ndarray, eigenvalues: np.ndarray, threshold: float) -> float:
    """The step at which a series first rises through the threshold, linearly interpolated.

    NaN if it never does, and if it begins above it: there was no crossing then that could be compared with anything.
    """
    above = eigenvalues >= threshold
    (rises,) = np.nonzero(~above[:-1] & above[1:])
    if above[:1].any() or not rises.size or not np.isfinite(eigenvalues[rises[0]]):
        return np.nan
    i = rises[0]
    share = (threshold - eigenvalues[i]) / (eigenvalues[i + 1] - eigenvalues[i])
    return float(steps[i] + share * (steps[i + 1] - steps[i]))


def bifurcation(loss: np.ndarray) -> float:
    """The start of the first window of 25 updates in which the loss `[steps]` has period 2; NaN if there is none."""
    whole = loss[: len(loss) // WINDOW * WINDOW].reshape(-1, WINDOW)
    with jax.enable_x64(True):
        (found,) = np.nonzero(np.asarray(landscape.period(jnp.asarray(whole))) == 2)
    return float(WINDOW * found[0]) if found.size else np.nan


@dataclasses.dataclass(frozen=True)
class Times:
    """When the seeds of one setting and loss first cross 2/η and first bifurcate: `[seeds]` each, NaN for never."""

    setting: str
    loss: str
    crossing: np.ndarray
    bifurcation: np.ndarray

    def correlation(self) -> tuple[float, float, float, int]:
        """Pearson's r over the seeds that have both, its 95 % interval (Fisher's z), and their number.

        NaN where there are too few: r needs 3 seeds, its interval 4.
        """
        both = np.isfinite(self.crossing) & np.isfinite(self.bifurcation)
        x, y, n = self.crossing[both], self.bifurcation[both], int(both.sum())
        if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return np.nan, np.nan, np.nan, n
        result: Any = stats.pearsonr(x, y)
        low, high = result.confidence_interval(CONFIDENCE) if n > 3 else (np.nan, np.nan)
        return float(result.statistic), float(low), float(high), n


def first_times(dataset: xr.Dataset) -> list[Times]:
    """For every setting and loss, the static one first."""
    found = []
    for setting, part in by_setting(dataset):
        steps, threshold = part.observation_step.values, 2 / float(part.learning_rate)
        for members in by_loss(part):
            crossings = np.array([crossing(steps, series, threshold) for series in members.hessian_max.values])
            bifurcations = np.array([bifurcation(series) for series in members.minibatch_loss.values])
            found.append(Times(setting, loss_name(members), crossings, bifurcations))
    return found


def markdown(dataset: xr.Dataset) -> list[str]:
    """Lines of Markdown: both times for every loss, and the landscape at two moments of the first period."""
    rows = []
    for times in first_times(dataset):
        r, low, high, n = times.correlation()
        numbers = (times.crossing, times.bifurcation, times.bifurcation - times.crossing)
        cells = [f"{n}/{len(times.crossing)}", *(_estimate(a, 0) for a in numbers)]
        cells.append(correlation(r, low, high))
        rows.append([f"{times.setting}, {times.loss}".removeprefix(", "), *cells])
    headers = ["loss", "seeds with both", "crossing of 2/η", "first bifurcation", "their difference"]
    lines = ["## First bifurcation and the crossing of 2/η (updates, mean ± std over seeds)", ""]
    lines += markdown_table([*headers, "correlation [95 % CI]"], rows)

    rows = []
    for setting, part in by_setting(dataset):
        for members in by_loss(part)[1:]:
            for step in (round(share * float(members.period)) for share in (0.5, 0.8)):
                if step in members.observation_step and step in members.step:
                    loss, seen = members.minibatch_loss.sel(step=step), members.sel(observation_step=step)
                    cells = [_estimate(v.values, d) for v, d in ((loss, 4), (seen.hessian_max, 3), (seen.ntk_max, 0))]
                    rows.append([f"{setting}, {loss_name(members)}".removeprefix(", "), f"{step:,}", *cells])
    if rows:
        lines += ["", "## The landscape in the first period (mean ± std over seeds)", ""]
        headers = [
            "loss",
            "step",
            f"F ({loss_unit(dataset) or 'squared error'})",
            "largest Hessian eigenvalue",
            "largest NTK eigenvalue",
        ]
        lines += markdown_table(headers, rows)
    return lines


def figure(dataset: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG: the first bifurcation of every seed against the first crossing of 2/η by its largest eigenvalue.

    A panel for each setting and loss, the same distance per update on both axes.
    """
    shown = [times for times in first_times(dataset) if times.correlation()[-1]][:MOST]
    columns = min(3, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    drawing = Figure(figsize=(1 + 4.8 * columns, 1.5 + 5.2 * rows), dpi=150, layout="constrained")
    panels = drawing.subplots(rows, columns, squeeze=False)
    for axes, times in itertools.zip_longest(panels.flat, shown):
        if times is None:
            axes.set_axis_off()
            continue
        r, low, high, n = times.correlation()
        name = f"{times.setting}, {times.loss}".removeprefix(", ") + f"\n{n} of {len(times.crossing)} seeds"
        name += f", r = {correlation(r, low, high)}" if np.isfinite(r) else ""
        axes.set_title(name, fontsize=10)
        axes.errorbar(times.crossing, times.bifurcation + WINDOW / 2, yerr=WINDOW / 2,
                      linestyle="none", marker="o", markersize=5, color="black", markerfacecolor="none",
                      linewidth=0.8)  # fmt: skip
        values = np.concatenate([times.crossing, times.bifurcation])
        margin = 0.06 * np.ptp(values[np.isfinite(values)]) + 2 * WINDOW
        limits = np.nanmin(values) - margin, np.nanmax(values) + margin
        axes.plot(limits, limits, color="0.4", linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        axes.set_xlim(limits)
        axes.set_ylim(limits)
        axes.set_aspect("equal")
        axes.locator_params(nbins=5)
        axes.set_xlabel("largest Hessian eigenvalue crosses 2/η (update)")
        axes.set_ylabel("loss first has period 2 (update)")
        ruled(axes)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    note = "dashed: equal times; r over seeds with its 95 % CI; bars: the window of updates"
    return finish(drawing, "First bifurcation and edge of stability", dataset, note, path)


def _estimate(values: np.ndarray, digits: int) -> str:
    return Estimate.of_finite(range(len(values)), values).spread(1, digits)
