"""A comparison in words: the tables that the command prints, `comparison.md` and `comparison.json`."""

import dataclasses
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..results import words
from ..results.estimate import CONFIDENCE
from ..results.files import file_name, write_texts
from ..results.labelled import SPLITS
from ..results.tables import plain
from .comparison import METRICS, Comparison, Row, select

MOST_ROWS = 30  # of a table in the terminal
_SCALES = {"accuracy": (100, 2), "loss": (1, 3)}  # and digits


def _paired(row: Row, split: str, metric: str) -> str:
    return "" if row.condition.period is None else row.condition.difference(split, metric).difference(*_SCALES[metric])


def _versus(row: Row, split: str, metric: str, comparison: Comparison) -> str:
    if row.run is comparison.runs[0]:
        return "reference"
    found = row.versus.get(split, {}).get(metric)
    if found is None:
        return words.MISSING
    how = "" if found.seeds == row.condition.used else f" ({found.seeds} pairs)"
    return words.difference(found.mean, found.low, found.high, *_SCALES[metric]) + (how if found.paired else " (Welch)")


def _unit(metric: str, comparison: Comparison) -> str:
    """With a comma before it."""
    unit = comparison.unit(metric)
    return f", {unit}" if unit else ""


def _value(name: str, value: Any) -> str:
    if name == "git_commit" and value:
        commit, dirty, _ = str(value).partition("+dirty")
        return commit[:10] + dirty
    if isinstance(value, list):
        return " ".join(map(str, value))
    return words.MISSING if value is None else str(value)


def differing_table(comparison: Comparison) -> Table:
    """What differs between the runs, for the terminal, in which the runs are numbered from 1."""
    table = Table(title="What differs", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("setting", no_wrap=True)
    for i in range(1, len(comparison.runs) + 1):
        table.add_column(f"run {i}", overflow="fold")
    for name, values in comparison.differing.items():
        table.add_row(name.replace("_", " "), *(_value(name, value) for value in values))
    return table


def console_table(comparison: Comparison, metric: str) -> Table:
    """The accuracies or losses of at most 30 conditions, for the terminal, in which the runs are numbered from 1."""
    rows = select(comparison, MOST_ROWS)
    several, with_settings = len(comparison.runs) > 1, any(row.condition.setting for row in rows)
    numbers = {run.name: number for number, run in enumerate(comparison.runs, start=1)}
    title = f"{metric.capitalize()} at the last evaluation{_unit(metric, comparison)}: {comparison.data}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    left_out = len(comparison.rows) - len(rows)
    if left_out:
        table.caption = f"{left_out} of {len(comparison.rows)} rows are left out here; the files have them all."
    for header in (*["run"] * several, *["setting"] * with_settings):
        table.add_column(header)
    for header in ("A", "T", "seeds", "train", "validation"):
        table.add_column(header, justify="right", no_wrap=not (with_settings and several and header == "train"))
    for header in ("dynamical − static\n95 % CI", *["run − reference\n95 % CI"] * several):
        table.add_column(header, justify="right", min_width=9)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            *[str(numbers[row.run.name])] * several,
            *[row.condition.setting] * with_settings,
            *row.condition.cells,
            *(row.condition.outcome(split, metric).spread(*_SCALES[metric]) for split in SPLITS),
            _paired(row, "validation", metric),
            *[_versus(row, "validation", metric, comparison)] * several,
            end_section=following is not None and following.run is not row.run,
        )
    return table


def _results(comparison: Comparison, metric: str) -> list[str]:
    """A table of every row."""
    several = len(comparison.runs) > 1
    with_settings = any(row.condition.setting for row in comparison.rows)
    headers = ["run", "data set", *["setting"] * with_settings, "A", "T (updates)", "seeds used", "diverged"]
    for what in (_unit(metric, comparison), ", dynamical − static", *[", run − reference"] * several):
        headers += [f"{split} {metric}{what}" for split in SPLITS]
    table = []
    for row in comparison.rows:
        c = row.condition
        cells = [row.run.name, row.run.data, *[c.setting] * with_settings, *c.cells, str(len(c.diverged))]
        cells += [c.outcome(split, metric).spread(*_SCALES[metric]) for split in SPLITS]
        cells += [_paired(row, split, metric) for split in SPLITS]
        table.append(cells + [_versus(row, split, metric, comparison) for split in SPLITS] * several)
    return _escaped(headers, table)


def write(comparison: Comparison, directory: Path, stand_in: str) -> None:
    """Writes `comparison.md` and `comparison.json`.

    `stand_in` is the data set that the names of the files have to tell of (see `files.file_name`).
    """
    names = [run.name for run in comparison.runs]
    lines = [f"# Comparison of {count(len(names), 'run')}: {comparison.data}", ""]
    for notice in comparison.notices:
        lines += [f"> **{notice}**", ""]
    if len(names) > 1:
        lines += ["## What differs", ""]
        rows = [[name, *(_value(name, v) for v in values)] for name, values in comparison.differing.items()]
        lines += _escaped(["setting", *names], rows) if rows else ["Nothing that was recorded."]
    lines += ["", "## Results", "", "Means ± std, and differences, mean [95 % CI]; of accuracies in percentage points."]
    for metric in METRICS:
        lines += ["", *_results(comparison, metric)]
    lines += ["", *(f"- {note}" for note in comparison.notes), "", "## How the runs were made", ""]
    for run in comparison.runs:
        at = [f"{split} after {step:,} updates" for split, step in run.summary.evaluated_at.items() if step is not None]
        lines.append(f"- **{run.name}**: `{run.path}`, evaluated: {', '.join(at) or 'nothing'}")
        made = {"command": run.dataset.attrs.get("command"), **run.settings}
        for key in ("command", "device", "git_commit"):
            if made.get(key):
                lines.append(f"    - {key.replace('_', ' ')}: `{made[key]}`")

    document = {
        "confidence": CONFIDENCE,
        "units": {"accuracy": "fraction", "loss": comparison.loss_unit, "period": "updates"},
        "reference": names[0],
        "between_runs": "run - reference: paired by seed, Student's interval; else Welch's",
        "notices": comparison.notices,
        "notes": comparison.notes,
        "differing": {key: dict(zip(names, values, strict=True)) for key, values in comparison.differing.items()},
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "dataset": run.dataset.attrs["dataset"],
                "finished": run.summary.finished,
                "evaluated_at": run.summary.evaluated_at,
                "command": plain(run.dataset.attrs.get("command")),
                "settings": run.settings,
            }
            for run in comparison.runs
        ],
        "rows": [
            {
                "run": row.run.name,
                "dataset": row.run.dataset.attrs["dataset"],
                **dataclasses.asdict(row.condition),
                "versus_reference": {
                    split: {metric: dataclasses.asdict(d) for metric, d in of_split.items()}
                    for split, of_split in row.versus.items()
                },
            }
            for row in comparison.rows
        ],
    }
    write_texts(directory, file_name(stand_in, "comparison"), lines, document)


def _escaped(headers: list[str], rows: list[list[str]]) -> list[str]:
    escape = lambda cells: [cell.replace("|", "\\|") for cell in cells]
    return words.markdown_table(escape(headers), [escape(cells) for cells in rows])


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
