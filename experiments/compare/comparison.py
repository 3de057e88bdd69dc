"""What several runs say side by side: what differs between them, their outcomes, and differences from the first run.

Within a run the losses share their seeds, so differences are paired. Between runs they are not: the same seed gives the
same initial weights only to the same network, so a run and the reference are compared as two independent samples.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from rich import box
from rich.table import Table
from scipy import stats

from ..results import words
from ..results.conditions import Condition
from ..results.estimate import CONFIDENCE, SAME, Estimate
from ..results.files import PACKAGES, file_name, write_texts
from ..results.labelled import SPLITS, by_loss, by_setting, dataset_title
from ..results.summary import Summary
from ..results.tables import plain

MOST_ROWS = 30  # of the table in the terminal
# Settings of a command that change nothing in its results, and attributes of the results that say how they were made.
_WITHOUT_EFFECT = ("run", "made_by", "data_dir", "show_seed", "shown", "animation")
_ATTRIBUTES = (
    *("dataset", "source", "steps_planned", "steps_per_epoch", "device", "git_commit"),
    *("python", *PACKAGES, "platform"),
)


@dataclass(frozen=True)
class Run:
    """One run: `settings` are those of its command and of its provenance, by name, as JSON can hold them."""

    name: str
    path: Path
    dataset: xr.Dataset
    summary: Summary
    settings: dict[str, Any]
    config_found: bool

    @classmethod
    def of(
        cls, name: str, path: Path, dataset: xr.Dataset, summary: Summary, config: Mapping[str, Any] | None
    ) -> "Run":
        """`config` is what `config.json` says, None if there is none."""
        recorded = {key: plain(dataset.attrs[key]) for key in _ATTRIBUTES if key in dataset.attrs}
        chosen = {key: value for key, value in (config or {}).items() if key not in _WITHOUT_EFFECT}
        return cls(name, path, dataset, summary, chosen | recorded, config is not None)

    @property
    def data(self) -> str:
        """The data set, in words."""
        return dataset_title(self.dataset.attrs["dataset"])

    @property
    def evaluations(self) -> int:
        """How often the validation set was evaluated."""
        accuracy = self.dataset.accuracy.sel(split="validation").dropna("evaluation_step", how="all")
        return accuracy.sizes["evaluation_step"]


@dataclass(frozen=True)
class Difference:
    """Run − reference, of the mean accuracies (0 to 1), with Welch's 95 % confidence interval for two independent
    samples of `seeds` and `reference_seeds`. Without two seeds each, or without any spread, there is no interval."""

    seeds: int
    reference_seeds: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """A condition of a run and its members, their part of the dataset. `versus` is its difference from the reference by
    split, without what cannot be compared."""

    run: Run
    condition: Condition
    members: xr.Dataset
    versus: dict[str, Difference]

    @property
    def loss(self) -> tuple[float, float | None]:
        return self.condition.amplitude, self.condition.period

    @property
    def name(self) -> str:
        """The condition in words, and how many of its seeds are used if some diverged."""
        c = self.condition
        return c.name + (f" ({c.used} of {c.seeds} seeds)" if c.diverged else "")

    def accuracy(self, split: str) -> Estimate:
        """The accuracies (0 to 1) at the last evaluation."""
        return self.condition.outcome(split)


@dataclass(frozen=True)
class Comparison:
    """Runs in the order given, the first being the reference. `differing` has a value for every run, None where a run
    has no such setting. `notices` must be read before the numbers, `notes` after them."""

    runs: list[Run]
    differing: dict[str, list[Any]]
    notices: list[str]
    notes: list[str]
    rows: list[Row]

    @property
    def data(self) -> str:
        """The data sets, in words."""
        return " and ".join(dict.fromkeys(run.data for run in self.runs))

    @property
    def mixed(self) -> bool:
        """Whether the data sets differ."""
        return any(run.data != self.runs[0].data for run in self.runs)


def compare(runs: Sequence[Run]) -> Comparison:
    """Puts runs side by side."""
    first = runs[0]
    reference = {_key(c): c for c in first.summary.conditions}
    rows = []
    for run in runs:
        finished = run.summary.finished and first.summary.finished
        comparable = run is not first and run.data == first.data and finished
        members = (m for _, part in by_setting(run.dataset) for m in by_loss(part))  # in the order of the summary
        for c, of_condition in zip(run.summary.conditions, members, strict=True):
            other = reference.get(_key(c)) if comparable else None
            found = {split: welch(c.outcome(split), other.outcome(split)) for split in SPLITS} if other else {}
            rows.append(Row(run, c, of_condition, {split: d for split, d in found.items() if d is not None}))
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    differing = {name: found for name, found in values.items() if any(value != found[0] for value in found)}
    return Comparison(list(runs), differing, _notices(runs), _notes(runs, rows), rows)


def _key(condition: Condition) -> tuple[str, float, float | None]:
    return condition.setting, condition.amplitude, condition.period


def welch(run: Estimate, reference: Estimate) -> Difference | None:
    """The difference of two means, with the confidence interval for samples that may differ in size and variance."""
    if run.mean is None or reference.mean is None:
        return None
    mean = run.mean - reference.mean
    if run.std is None or reference.std is None or max(run.std, reference.std) < SAME:
        return Difference(run.n, reference.n, mean, None, None)
    a, b = run.std**2 / run.n, reference.std**2 / reference.n
    freedom = (a + b) ** 2 / (a**2 / (run.n - 1) + b**2 / (reference.n - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * (a + b) ** 0.5
    return Difference(run.n, reference.n, mean, mean - half, mean + half)


def _notices(runs: Sequence[Run]) -> list[str]:
    """First what concerns the comparison, then what must be known of single runs."""
    by_data: dict[str, list[str]] = {}
    by_notice: dict[str, list[str]] = {}
    for run in runs:
        by_data.setdefault(run.data, []).append(run.name)
        for notice in run.summary.notices:
            by_notice.setdefault(notice, []).append(run.name)
    notices = []
    if len(by_data) > 1:
        which = "; ".join(f"{', '.join(names)} on {data}" for data, names in by_data.items())
        notices.append(f"DIFFERENT DATA SETS, whose accuracies cannot be compared: {which}.")
    return notices + [f"{', '.join(names)}: {notice}" for notice, names in by_notice.items()]


def _notes(runs: Sequence[Run], rows: Sequence[Row]) -> list[str]:
    notes = [
        "± is the standard deviation over seeds (n − 1) of the accuracy at the last evaluation.",
        "Dynamical − static is paired by seed within the run, with Student's 95 % confidence interval.",
    ]
    compared = sum(bool(row.versus) for row in rows)
    if len(runs) > 1:
        notes.append(
            f"Run − reference is the difference from {runs[0].name}, given where both runs are finished, the data sets "
            "are the same, and so are setting, A and T. It is not paired: the 95 % confidence interval is Welch's, for "
            "independent samples. The same seed number gives the same initial weights only to the same network with "
            "the same initialisation; runs that share them are not independent, and the interval is then only a guide."
        )
    dynamical = sum(row.condition.period is not None for row in rows)
    if dynamical + compared > 1:
        notes.append(
            f"The intervals are not corrected for multiple comparisons: of {dynamical + compared} differences some can "
            "be established by chance alone, and choosing the best of them on this validation set overstates it."
        )
    lacking = [run.name for run in runs if not run.config_found]
    if lacking:
        notes.append(f"No readable config.json was found for {', '.join(lacking)}: settings shown as – are not known.")
    if any("dirty" in str(run.settings.get("git_commit")) for run in runs):
        notes.append("+dirty marks uncommitted changes: the code can differ although the commit is the same.")
    return notes


def select(comparison: Comparison, most: int, least: int = 1) -> list[Row]:
    """At most `most` rows, as many of each run as fit: first conditions that several runs share, then others, evenly
    spread rather than picked by their result. If not even `least` of each run fit, the last runs are left out."""
    by_run = [[row for row in comparison.rows if row.run is run] for run in comparison.runs]
    longest = max(len(rows) for rows in by_run)
    fitting = [cap for cap in range(1, longest + 1) if sum(min(len(rows), cap) for rows in by_run) <= most]
    cap = max(fitting[-1] if fitting else 1, least)
    occurrences = Counter(_key(row.condition) for row in comparison.rows)
    selected = []
    for rows in by_run:
        n = min(len(rows), cap)
        shared, others = [], []
        for i, row in enumerate(rows):
            (shared if occurrences[_key(row.condition)] > 1 else others).append(i)
        picked = _spread_out(shared, n)
        picked = sorted(picked + _spread_out(others, n - len(picked)))
        if len(selected) + n <= most:
            selected += [rows[i] for i in picked]
    return selected


def _spread_out(items: list[int], number: int) -> list[int]:
    """At most so many of the items, the first and the last among them if possible."""
    number = min(number, len(items))
    return [items[i * (len(items) - 1) // max(number - 1, 1)] for i in range(number)]


def _paired(row: Row, split: str) -> str:
    return "" if row.condition.period is None else row.condition.difference(split).difference(100)


def _versus(row: Row, split: str, comparison: Comparison) -> str:
    if row.run is comparison.runs[0]:
        return "reference"
    found = row.versus.get(split)
    return words.difference(found.mean, found.low, found.high, 100) if found else words.MISSING


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


def console_table(comparison: Comparison) -> Table:
    """The outcomes of at most 30 conditions, for the terminal, in which the runs are numbered from 1."""
    rows = select(comparison, MOST_ROWS)
    several, with_settings = len(comparison.runs) > 1, any(row.condition.setting for row in rows)
    numbers = {run.name: number for number, run in enumerate(comparison.runs, start=1)}
    title = f"Accuracy at the last evaluation, %: {comparison.data}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    left_out = len(comparison.rows) - len(rows)
    if left_out:
        table.caption = f"{left_out} of {len(comparison.rows)} rows are left out here; the files have them all."
    for header in (*["run"] * several, *["setting"] * with_settings):
        table.add_column(header)
    for header in ("A", "T", "seeds", "train", "validation"):
        table.add_column(header, justify="right", no_wrap=not (with_settings and several and header == "train"))
    for header in ("dynamical − static\n95 % CI, paired", *["run − reference\n95 % CI, unpaired"] * several):
        table.add_column(header, justify="right", min_width=9)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            *[str(numbers[row.run.name])] * several,
            *[row.condition.setting] * with_settings,
            *row.condition.cells,
            *(row.accuracy(split).spread(100) for split in SPLITS),
            _paired(row, "validation"),
            *[_versus(row, "validation", comparison)] * several,
            end_section=following is not None and following.run is not row.run,
        )
    return table


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
    headers = ["run", "data set", "setting", "A", "T (updates)", "seeds used", "diverged"]
    for what in ("accuracy, %", "accuracy, dynamical − static", "accuracy, run − reference"):
        headers += [f"{split} {what}" for split in SPLITS]
    table = []
    for row in comparison.rows:
        cells = [
            row.run.name,
            row.run.data,
            row.condition.setting,
            *row.condition.cells,
            str(len(row.condition.diverged)),
        ]
        cells += [row.accuracy(split).spread(100) for split in SPLITS]
        cells += [_paired(row, split) for split in SPLITS]
        table.append(cells + [_versus(row, split, comparison) for split in SPLITS])
    empty = {2} if not any(cells[2] for cells in table) else set()
    empty |= {len(headers) - 2, len(headers) - 1} if len(names) == 1 else set()
    keep = lambda cells: [cell for i, cell in enumerate(cells) if i not in empty]
    lines += ["", "## Results", "", "Means ± std in %; differences in percentage points, mean [95 % CI].", ""]
    lines += _escaped(keep(headers), [keep(cells) for cells in table])
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
        "units": {"accuracy": "fraction", "loss": "nats, or 1 for squared errors", "period": "updates"},
        "reference": names[0],
        "between_runs": "run - reference, unpaired, Welch's interval",
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
                "versus_reference": {split: dataclasses.asdict(d) for split, d in row.versus.items()},
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
