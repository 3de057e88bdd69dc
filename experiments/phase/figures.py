"""Figures of a phase diagram: maps of the (A, T) plane with a number in every cell.

The colours of a map only guide the eye: their lightness is monotone (for gains, on each side of zero), and the numbers
say the rest, also in black and white.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from ..results.files import file_name
from ..results.labelled import SPLITS, by_setting, loss_unit
from ..results.style import finish
from .statistics import loss_function, series, statistics
from .widths import gain_by_width

_CELL = 0.62, 0.42  # inches
_LEAST = 2.6, 1.7  # inches, of a panel with few cells
_LEFT = "; n/N: n seeds are left, the others diverged or were not reached"
_FALLEN = "; †n: n seeds collapsed on the way"
_DOT = {"linestyle": "none", "marker": "o", "markersize": 3.5, "markeredgewidth": 0}


def write(dataset: xr.Dataset, directory: Path) -> list[Path]:
    """Draws for each setting `phase…`, `validation_loss…` and, with curvature, `curvature…`; `widths` for several."""
    written = []
    if dataset.sizes["amplitude"] < 2:
        return written

    def path(name: str) -> Path:
        written.append(directory / file_name(dataset.attrs["dataset"], name))
        return written[-1]

    for setting, part in by_setting(dataset):
        suffix = f"-{re.sub('[^A-Za-z0-9.+]+', '-', setting)}" if setting else ""
        heat_maps(part, path(f"phase{suffix}.png"))
        loss_maps(part, path(f"validation_loss{suffix}.png"))
        if "hessian_max" in part and part.sizes["observation_step"]:
            curvature_map(part, path(f"curvature{suffix}.png"))
    if series(dataset)[1]:
        gain_by_width(dataset, path("widths.png"))
    return written


def heat_maps(part: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG for one setting: accuracy of both splits over A and T as mean over seeds, standard deviation, and
    gain over the static loss of the same seeds, with a dot where that is significant. The figure is returned too."""
    found = statistics(part)
    figure, panels = _panels(part, len(SPLITS), 3)
    for split, row in zip(SPLITS, panels, strict=True):
        _statistics_maps(row, found.sel(split=split), f"{split}: ", "accuracy", "points")
    title = f"Accuracy over amplitude and period{loss_function(part)}"
    return finish(figure, title, part, _remarks(found), path)


def loss_maps(part: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG as `heat_maps` does, of the validation loss without class weights."""
    found = statistics(part, "loss").sel(split="validation")
    figure, panels = _panels(part, 1, 3)
    _statistics_maps(panels[0], found, "", "validation loss", loss_unit(part))
    title = f"Validation loss over amplitude and period{loss_function(part)}"
    return finish(figure, title, part, _remarks(found), path)


def _statistics_maps(panels: np.ndarray, cells: xr.Dataset, lead: str, what: str, unit: str) -> None:
    """Draws mean, standard deviation and paired difference of one split; accuracies in per cent."""
    scale, digits = (100, 1) if what == "accuracy" else (1, 2)
    mean, std, gain = panels
    values = scale * _on_static(cells.static_mean, cells["mean"])
    texts = _counted([f"{v:.{digits}f}" for v in values.flat], _on_static(cells.static_n, cells.n), cells.seeds.item())
    fallen = _on_static(cells.static_collapsed, cells.collapsed).flat
    texts = [text + (f"\n†{n:.0f}" if n else "") for text, n in zip(texts, fallen, strict=True)]
    _map(mean, values, texts, "cividis" if scale == 100 else "cividis_r", _range(values), "%" if scale == 100 else unit)
    mean.set_title(f"{lead}mean {what}")

    values = scale * _on_static(cells.static_std, cells["std"])
    largest = Normalize(0, _largest(values, scale))
    _map(std, values, [f"{v:.{digits}f}" for v in values.flat], "magma_r", largest, unit)
    std.set_title(f"{lead}std over seeds")

    values = scale * _on_static(xr.zeros_like(cells.static_mean), cells.gain)
    texts = ["0", *(f"{v:+.{digits}f}".replace("-", "−") for v in values.flat[1:])]
    most = _largest(values, scale)
    inks = _map(gain, values, texts, "RdBu" if scale == 100 else "RdBu_r", Normalize(-most, most), unit)
    gain.set_title(f"{lead}paired {'gain over' if scale == 100 else 'difference from'} A = 1")
    for a, p in np.argwhere(cells.significant.values):
        gain.plot(p + 0.37, a + 1.3, color=inks[a, p], **_DOT)


def _remarks(found: xr.Dataset) -> str:
    """What a figure says of its seeds and signs."""
    seeds = int(found.seeds.max())
    note = f"{_seeds(seeds)}; dot: significant, by paired t-tests with a false discovery rate of 5 % in the panel"
    note += _LEFT if min(found.n.min(), found.static_n.min()) < seeds else ""
    return note + (_FALLEN if max(found.collapsed.max(), found.static_collapsed.max()) else "")


def curvature_map(part: xr.Dataset, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG for one setting: largest eigenvalues of Hessian and NTK at the last observation, over A and T.

    They are medians over the members that did not diverge. The figure is returned too.
    """
    shown = {"hessian_max": "Hessian", "ntk_max": "NTK"}
    shown = {name: title for name, title in shown.items() if name in part}
    figure, panels = _panels(part, 1, len(shown))
    note = f"observed after {int(part.observation_step.values[-1]):,} updates, {_seeds(part.sizes['seed'])}"
    for axes, (name, title) in zip(panels.flat, shown.items(), strict=True):
        last = part[name].isel(observation_step=-1).where(part.diverged_at < 0)
        finite = last.where(np.isfinite(last)).transpose("amplitude", "period", "seed")
        values, left = finite.median("seed").values, finite.count("seed").values
        texts = _counted([_short(v) for v in values.flat], left, part.sizes["seed"])
        _map(axes, values, texts, "cividis", _range(values, logarithmic=True), "eigenvalue")
        axes.set_title(f"largest {title} eigenvalue,\nmedian over seeds")
        note += _LEFT if left.min() < part.sizes["seed"] and _LEFT not in note else ""
    return finish(figure, f"Curvature over amplitude and period{loss_function(part)}", part, note, path)


def _panels(part: xr.Dataset, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """An empty figure whose panels `[rows, columns]` have axes A, the static loss at the bottom, and T."""
    amplitudes, periods, epoch = part.amplitude.values, part.period.values, part.attrs.get("steps_per_epoch")
    width, height = (max(least, n * cell) for least, n, cell in
                     zip(_LEAST, (len(periods), len(amplitudes)), _CELL, strict=True))  # fmt: skip
    size = (0.6 + columns * (width + 1.4), 1.4 + rows * (height + 0.8))
    figure = Figure(figsize=size, dpi=150)
    figure.set_layout_engine("constrained", wspace=0.04)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_xticks(range(len(periods)), [_label(T) for T in periods])
        axes.set_yticks(range(len(amplitudes)), ["1 (static)", *(f"{A:g}" for A in amplitudes[1:])])
        axes.tick_params(length=0)
        axes.set_facecolor("0.85")
    for axes in panels[-1]:
        axes.set_xlabel("period T (updates)" + (f"; an epoch has {epoch:g}" if epoch else ""))
    for axes in panels[:, 0]:
        axes.set_ylabel("amplitude A")
    return figure, panels


def _on_static(static: xr.DataArray, cells: xr.DataArray) -> np.ndarray:
    """The grid `[amplitude, period]` of one split with the static loss as its first row."""
    return np.vstack([np.full(cells.sizes["period"], static.item(), float), cells.values])


def _counted(texts: list[str], left: np.ndarray, seeds: int) -> list[str]:
    """Adds to the texts of a map how many seeds are left, `[amplitude, period]`, where some are missing."""
    return [text + (f"\n{n:.0f}/{seeds}" if n < seeds else "") for text, n in zip(texts, left.flat, strict=True)]


def _map(axes: Axes, values: np.ndarray, texts: list[str], colours: str, norm: Normalize, unit: str) -> np.ndarray:
    """Draws `[amplitude, period]`, whose first row is the static loss and one cell, with a text in each cell.

    Returns the colours of the texts of the other rows, in which they can be read on the cell's.
    """
    rows, columns = values.shape
    inks = np.full(values.shape, "black", object)
    sides = -0.5, columns - 0.5
    style: dict[str, Any] = {"cmap": colours, "norm": norm, "origin": "lower", "aspect": "auto"}
    image = axes.imshow(values[1:], extent=(*sides, 0.5, rows - 0.5), **style)
    axes.imshow(values[:1, :1], extent=(*sides, -0.5, 0.5), **style)
    axes.set_ylim(-0.5, rows - 0.5)
    axes.vlines(np.arange(columns - 1) + 0.5, 0.5, rows - 0.5, "white", linewidth=0.8)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, "white", linewidth=[3] + [0.8] * (rows - 2))
    for (a, p), text in zip(np.ndindex(values.shape), texts, strict=True):
        readable = np.isfinite(values[a, p])
        if readable:
            inks[a, p] = _ink(*image.cmap(norm(values[a, p]))[:3])
        if a or not p:
            x, style = (
                p if a else (columns - 1) / 2,
                {"ha": "center", "va": "center", "fontsize": 8, "in_layout": False},
            )
            axes.text(x, a, text if readable else "–", color=inks[a, p], **style)
    axes.figure.colorbar(image, ax=axes, label=unit)
    return inks[1:]


def _ink(*rgb: float) -> str:
    """Black or white, whichever has the higher contrast with a colour as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return "black" if np.dot((0.2126, 0.7152, 0.0722), linear) > 0.179 else "white"


def _range(values: np.ndarray, logarithmic: bool = False) -> Normalize:
    """The scale of the finite values; logarithmic only if all of them are positive."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Normalize(0, 1)
    low, high = float(finite.min()), float(finite.max())
    if logarithmic and low > 0:
        return LogNorm(low, max(high, 1.01 * low))
    return Normalize(low, high if high > low else low + 1)


def _largest(values: np.ndarray, scale: float) -> float:
    """The largest size, at least a thousandth of the scale."""
    return float(np.max(np.abs(values), initial=scale / 1000, where=np.isfinite(values)))


def _seeds(number: int) -> str:
    return f"{number} seed" + "s" * (number > 1)


def _label(period: float) -> str:
    return f"{period:,.0f}" if period >= 100 else f"{period:.3g}"


def _short(value: float) -> str:
    """Two to five digits that fit a cell; an exponent below a hundredth and from a hundred thousand on."""
    if 0 < abs(value) < 0.01 or abs(value) >= 1e5:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}".replace("-", "−")
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")
    return text.replace("-", "−")
