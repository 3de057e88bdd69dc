"""The style of all figures: colours, what every figure has, and how it is written.

They survive a black-and-white printer: whatever a colour says, a line style, a marker or a label says too. They are
made without pyplot, so that nothing depends on a display or on global state.
"""

import os
import textwrap
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from .labelled import subject

# Okabe and Ito's colours, which colour-blind readers can tell apart; neighbours differ in lightness too.
STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#0072B2", (0, (5, 2)), "o"),
    ("#E69F00", (0, (6, 1.5, 1, 1.5)), "s"),
    ("#009E73", (0, (1.5, 1.2)), "^"),
    ("#CC79A7", (0, (9, 2.5)), "D"),
    ("#D55E00", (0, (3, 1.2, 1, 1.2, 1, 1.2)), "v"),
    ("#56B4E9", (0, (1, 2.5)), "P"),
)
# Of the spiral's classes: the paper's colours, and dashes.
CLASSES: tuple[tuple[str, Any], ...] = (
    ("#D62728", "solid"),
    ("#E3B505", (0, (5, 1.5))),
    ("#1B2A6B", (0, (1.5, 1.2))),
)
STATIC: tuple[str, Any, str] = ("black", "solid", "X")
BINS = 1500  # a long series is drawn by its extremes in at most this many bins


def extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a long series `[steps]`, thinned to the minimum and maximum of each bin: no peak is lost."""
    edges = np.unique(np.linspace(0, len(values), BINS + 1).astype(int))
    if len(values) <= 2 * BINS:
        return np.arange(len(values)), values
    kept = {0, len(values) - 1}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        kept |= {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
    steps = np.array(sorted(kept))
    return steps, values[steps]


def ruled(axes: Axes) -> None:
    """Gives axes their thin lines, and steps with thousands separators."""
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def finish(figure: Figure, title: str, dataset: xr.Dataset, note: str, path: str | os.PathLike[str]) -> Figure:
    """Adds the title, which names the data set and says if the run was interrupted, and writes the PNG."""
    lines = [f"{title}: {subject(dataset)}"]
    if str(dataset.attrs.get("finished")) != "true":
        lines.append(f"INTERRUPTED after {dataset.attrs['steps_done']:,} updates")
    lines += [note] if note else []
    width = int(8.5 * figure.get_figwidth())  # characters
    head = [lines[0]] if len(lines[0]) <= width else [f"{title}:", subject(dataset)]
    wrapped = [part for line in [*head, *lines[1:]] for part in textwrap.wrap(line, width)]
    figure.suptitle("\n".join(wrapped), fontsize=13, fontweight="bold")
    figure.savefig(path, format="png", metadata={"Title": "; ".join(lines)})
    return figure
