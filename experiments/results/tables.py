"""A summary to look at: the table and sentences that a command prints, `summary.md` and `summary.json`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich import box
from rich.table import Table

from . import words
from .estimate import CONFIDENCE
from .files import PACKAGES, file_name, write_texts
from .labelled import SPLITS, loss_unit
from .summary import Summary

_MOST_EXPLAINED = 6  # losses, with sentences, that a summary begins with, before the tables
_PERCENT, _LOSS = (100, 2), (1, 4)  # scale and digits
_Columns = tuple[tuple[str, str, str, tuple[int, int]], ...]  # name, split, metric, scale and digits
_IN_THE_END: _Columns = (
    ("train accuracy", "train", "accuracy", _PERCENT),
    ("validation accuracy", "validation", "accuracy", _PERCENT),
    ("train loss", "train", "loss", _LOSS),
    ("validation loss", "validation", "loss", _LOSS),
)
_STOPPED_EARLY: _Columns = (
    ("best validation accuracy", "validation", "best accuracy", _PERCENT),
    ("loss there", "validation", "loss at best accuracy", _LOSS),
    ("lowest validation loss", "validation", "lowest loss", _LOSS),
    ("accuracy there", "validation", "accuracy at lowest loss", _PERCENT),
)


def _outcomes(summary: Summary, columns: _Columns, unit: str) -> list[str]:
    """A table of every condition."""
    lead = [*_lead(summary), "A", "T (updates)", "seeds used", "diverged", "collapsed"]
    rows = []
    for c in summary.conditions:
        cells = [*c.cells, str(len(c.diverged)), str(len(c.collapsed))]
        cells += [c.outcome(split, metric).spread_and_median(*scale) for _, split, metric, scale in columns]
        rows.append([c.setting] * bool(c.setting) + cells)
    return words.markdown_table([*lead, *_headers(columns, "%", unit)], rows)


def _differences(summary: Summary, columns: _Columns, unit: str) -> list[str]:
    """A table of the dynamical conditions: paired differences, and p-values of those in the validation set."""
    lead = [*_lead(summary), "A", "T (updates)", "seeds"]
    tested = [column for column in columns if column[1] == "validation"]
    rows = []
    for c in summary.conditions:
        if c.period is None:
            continue
        cells = [*c.cells[:-1], str(max(c.difference(split).n for split in SPLITS))]
        cells += [c.difference(split, metric).difference(*scale) for _, split, metric, scale in columns]
        cells += [words.p_value(c.difference(split, metric).rank_p) for _, split, metric, _ in tested]
        rows.append([c.setting] * bool(c.setting) + cells)
    headers = [*_headers(columns, "points", unit), *(f"p, {name}" for name, *_ in tested)]
    return words.markdown_table([*lead, *headers], rows)


def _headers(columns: _Columns, accuracy: str, loss: str) -> list[str]:
    """The names of columns with their units."""
    units = [accuracy if scale == _PERCENT else loss for *_, scale in columns]
    return [f"{name}, {unit}" if unit else name for (name, *_), unit in zip(columns, units, strict=True)]


def console_table(summary: Summary) -> Table:
    """The table for the terminal: accuracies of every condition, and the paired difference in validation accuracy."""
    table = Table(
        title=f"Accuracy at the last evaluation, %: {summary.dataset}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.caption, table.caption_style = "\n".join(summary.notices) or None, "bold red"
    lead = _lead(summary)
    for header in (*lead, "A", "T", "seeds", "train", "validation", "median", "dynamical − static\n95 % CI"):
        table.add_column(header, justify="right", overflow="fold")
    for c in summary.conditions:
        difference = "" if c.period is None else c.difference("validation").difference(100)
        accuracies = (c.outcome(split).spread(100) for split in SPLITS)
        median = words.number(c.outcome("validation").median, 100)
        table.add_row(*[c.setting] * len(lead), *c.cells, *accuracies, median, difference)
    return table


def to_print(summary: Summary) -> list[Table | str]:
    """What a command prints: the table, and what it says of every loss."""
    return [console_table(summary), *(sentence for c in summary.conditions for sentence in c.evidence)]


def _lead(summary: Summary) -> list[str]:
    """The headers of what a table says before the loss."""
    return ["setting"] if any(c.setting for c in summary.conditions) else []


def attributes(dataset: xr.Dataset) -> dict[str, Any]:
    """The attributes of a dataset as JSON can hold them."""
    return {str(key): plain(value) for key, value in dataset.attrs.items()}


def plain(value: object) -> object:
    """A value as JSON can hold it: no NumPy types, None for NaN."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def ending(notes: Sequence[str], dataset: xr.Dataset) -> list[str]:
    """The lines that every `summary.md` ends with: notes, and how the run was made."""
    attrs = attributes(dataset)
    keys = ["loss_function", "command", "merged", "device", "compute_dtype", "python", *PACKAGES, "platform"]
    keys += ["git_commit", *(name for name in attrs if name.startswith("resumed_with_"))]
    made = [f"- {key.replace('_', ' ')}: `{attrs[key]}`" for key in keys if key in attrs]
    return ["", *(f"- {note}" for note in notes), "", "## How it was made", "", *made]


def write_summary(
    summary: Summary,
    dataset: xr.Dataset,
    directory: str | os.PathLike[str],
    more: Sequence[str] = (),
    also: Mapping[str, Any] | None = None,
) -> None:
    """Writes `summary.md` and `summary.json`.

    `more` are lines that `summary.md` has after the tables, and `also` what `summary.json` has besides. The first
    begins with sentences for every loss, unless there are many: then these are in `summary.json` only.
    """
    unit = loss_unit(dataset)
    steps = ", ".join(
        f"{split} after {step:,} updates" for split, step in summary.evaluated_at.items() if step is not None
    )
    lines = [f"# Static and dynamical loss on {summary.dataset}", ""]
    for notice in summary.notices:
        lines += [f"> **{notice}**", ""]
    explained = [c.evidence for c in summary.conditions if c.evidence]
    if len(explained) <= _MOST_EXPLAINED:
        lines += [f"- {sentence}" for evidence in explained for sentence in evidence]
    for columns, title, differences in (
        (_IN_THE_END, f"Results ({steps or 'nothing was evaluated'})", "Paired differences, dynamical − static"),
        (_STOPPED_EARLY, "Every member stopped early, at its best evaluation", "Paired differences, stopped early"),
    ):
        lines += ["", f"## {title}", "", *_outcomes(summary, columns, unit)]
        if any(c.period is not None for c in summary.conditions):
            lines += ["", f"## {differences}: mean [95 % CI]", "", *_differences(summary, columns, unit)]
    lines += ["", *more] if more else []
    lines += ending(summary.notes, dataset)

    document = dataclasses.asdict(summary) | {
        "confidence": CONFIDENCE,
        "units": {"accuracy": "fraction", "loss": unit, "period": "updates"},
        "attributes": attributes(dataset),
        **(also or {}),
    }
    write_texts(Path(directory), file_name(dataset.attrs["dataset"], "summary"), lines, document)
