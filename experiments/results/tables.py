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

MOST_SENTENCES = 12  # that a summary begins with, before the tables
_COLUMNS = (
    ("train", "accuracy", 100, 2),
    ("validation", "accuracy", 100, 2),
    ("train", "loss", 1, 4),
    ("validation", "loss", 1, 4),
    ("validation", "best accuracy", 100, 2),
    ("validation", "lowest loss", 1, 4),
)


def _rows(summary: Summary) -> tuple[list[list[str]], list[list[str]]]:
    """The cells of the two tables: outcomes of every condition, and differences of the dynamical ones."""
    outcomes, differences = [], []
    for c in summary.conditions:
        lead = [c.setting] * bool(c.setting) + c.cells
        cells = [c.outcome(split, m).spread_and_median(scale, digits) for split, m, scale, digits in _COLUMNS]
        outcomes.append([*lead, str(len(c.diverged)), str(len(c.collapsed)), *cells])
        if c.period is not None:
            cells = [c.difference(split, m).difference(scale, digits) for split, m, scale, digits in _COLUMNS]
            cells += [words.p_value(c.difference("validation", m).rank_p) for m in ("accuracy", "loss")]
            differences.append([*lead[:-1], str(max(c.difference(split).n for split in SPLITS)), *cells])
    return outcomes, differences


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
        table.add_column(header, justify="right", no_wrap="CI" not in header and header not in lead)
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
    begins with a sentence for every loss, unless there are many: then these are in `summary.json` only.
    """
    outcomes, differences = _rows(summary)
    unit = loss_unit(dataset)
    in_nats = f", {unit}" if unit else ""
    splits = ["train accuracy, %", "validation accuracy, %", f"train loss{in_nats}", f"validation loss{in_nats}"]
    splits += ["best validation accuracy, %", f"lowest validation loss{in_nats}"]
    steps = ", ".join(
        f"{split} after {step:,} updates" for split, step in summary.evaluated_at.items() if step is not None
    )
    lines = [f"# Static and dynamical loss on {summary.dataset}", ""]
    for notice in summary.notices:
        lines += [f"> **{notice}**", ""]
    evidence = [f"- {sentence}" for c in summary.conditions for sentence in c.evidence]
    lines += evidence if len(evidence) <= MOST_SENTENCES else []
    lines += ["", f"## Results ({steps or 'nothing was evaluated'})", ""]
    lead = _lead(summary)
    lines += words.markdown_table([*lead, "A", "T (updates)", "seeds used", "diverged", "collapsed", *splits], outcomes)
    if differences:
        splits = [name.replace(", %", ", points") for name in splits]
        splits += ["p, validation accuracy", "p, validation loss"]
        lines += ["", "## Paired differences, dynamical − static: mean [95 % CI]", ""]
        lines += words.markdown_table([*lead, "A", "T (updates)", "seeds", *splits], differences)
    lines += ["", *more] if more else []
    lines += ending(summary.notes, dataset)

    document = dataclasses.asdict(summary) | {
        "confidence": CONFIDENCE,
        "units": {"accuracy": "fraction", "loss": unit, "period": "updates"},
        "attributes": attributes(dataset),
        **(also or {}),
    }
    write_texts(Path(directory), file_name(dataset.attrs["dataset"], "summary"), lines, document)
