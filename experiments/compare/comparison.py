"""What several runs say side by side: what differs between them, their outcomes, and differences from the first run.

Within a run the losses share their seeds, so differences are paired; between runs see `difference`.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from ..results.conditions import Condition
from ..results.files import PACKAGES
from ..results.labelled import SETTINGS, SPLITS, by_loss, by_setting, dataset_title, loss_unit
from ..results.summary import Summary
from ..results.tables import plain
from .difference import Difference

METRICS = ("accuracy", "loss")
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
    def loss_function(self) -> str:
        """What `loss` is a value of, without class weights."""
        return str(self.dataset.attrs.get("loss_function", "cross-entropy"))

    @property
    def evaluations(self) -> int:
        """How often the validation set was evaluated."""
        accuracy = self.dataset.accuracy.sel(split="validation").dropna("evaluation_step", how="all")
        return accuracy.sizes["evaluation_step"]


@dataclass(frozen=True)
class Row:
    """A condition of a run, its settings besides the loss, and its members, their part of the dataset. `versus` is its
    difference from the reference by split and metric, "accuracy" or "loss", without what cannot be compared."""

    run: Run
    condition: Condition
    settings: dict[str, Any]
    members: xr.Dataset
    versus: dict[str, dict[str, Difference]] = dataclasses.field(default_factory=dict)

    @property
    def loss(self) -> tuple[float, float | None]:
        return self.condition.amplitude, self.condition.period

    @property
    def name(self) -> str:
        """The condition in words, and how many of its seeds are used if some diverged."""
        c = self.condition
        return c.name + (f" ({c.used} of {c.seeds} seeds)" if c.diverged else "")

    def key(self, varied: Sequence[str]) -> tuple:
        """What equal conditions have in common: the loss, and the settings that are varied."""
        return (*(self.settings.get(name) for name in varied), *self.loss)


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

    @property
    def loss_unit(self) -> str:
        """That of the losses of all runs, or none."""
        return "nats" if all(loss_unit(run.dataset) == "nats" for run in self.runs) else ""

    def unit(self, metric: str) -> str:
        """That in which a metric is shown, or none."""
        return "%" if metric == "accuracy" else self.loss_unit


def compare(runs: Sequence[Run]) -> Comparison:
    """Puts runs side by side."""
    first, rows = runs[0], _rows(runs[0])
    references = list(rows)
    for run in runs[1:]:
        varied = _varied([run, first])
        reference = {row.key(varied): row.condition for row in references}
        finished = run.summary.finished and first.summary.finished
        comparable = run.data == first.data and finished
        metrics = METRICS if run.loss_function == first.loss_function else METRICS[:1]
        for row in _rows(run):
            other = reference.get(row.key(varied)) if comparable else None
            rows.append(dataclasses.replace(row, versus=_versus(row.condition, other, metrics) if other else {}))
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    differing = {name: found for name, found in values.items() if any(value != found[0] for value in found)}
    return Comparison(list(runs), differing, _notices(runs), _notes(runs, rows), rows)


def _rows(run: Run) -> list[Row]:
    """The conditions of a run, in the order of its summary."""
    parts = [(_settings(part), members) for _, part in by_setting(run.dataset) for members in by_loss(part)]
    return [Row(run, c, *part) for c, part in zip(run.summary.conditions, parts, strict=True)]


def _settings(part: xr.Dataset) -> dict[str, Any]:
    """The settings of a part by name. What oscillates is the paper's triangle where nothing else is said."""
    return {"oscillation": "triangle"} | {name: part[name].item() for name in SETTINGS if name in part.coords}


def _varied(runs: Sequence[Run]) -> list[str]:
    """The settings of which one of the runs has several. (Others, in which whole runs differ, are what is compared.)"""
    return [name for name in SETTINGS if any(run.dataset.sizes.get(name, 1) > 1 for run in runs)]


def _versus(run: Condition, reference: Condition, metrics: Sequence[str]) -> dict[str, dict[str, Difference]]:
    found = {
        split: {m: d for m in metrics if (d := Difference.between(run.outcome(split, m), reference.outcome(split, m)))}
        for split in SPLITS
    }
    return {split: differences for split, differences in found.items() if differences}


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
        "± is the standard deviation over seeds (n − 1) at the last evaluation; loss is without class weights.",
        "Dynamical − static is paired by seed within the run, with Student's 95 % confidence interval.",
    ]
    versus = [d for row in rows for of_split in row.versus.values() for d in of_split.values()]
    compared = sum(bool(row.versus) for row in rows)
    if len(runs) > 1:
        notes.append(
            f"Run − reference is the difference from {runs[0].name}, given where both runs are finished, the data sets "
            "are the same, and so are A, T and every setting of which one of the two has several (and, for losses, the "
            "loss function). It is paired by the seeds that both runs have, of which there are as many as the run has "
            "unless it says so, with Student's 95 % confidence interval."
        )
    if any(not d.paired for d in versus):
        notes.append(
            "Runs without two seeds in common are not paired: their interval is Welch's, for independent samples "
            "(marked so)."
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
    varied = _varied(comparison.runs)
    occurrences = Counter(row.key(varied) for row in comparison.rows)
    selected = []
    for rows in by_run:
        n = min(len(rows), cap)
        shared, others = [], []
        for i, row in enumerate(rows):
            (shared if occurrences[row.key(varied)] > 1 else others).append(i)
        picked = _spread_out(shared, n)
        picked = sorted(picked + _spread_out(others, n - len(picked)))
        if len(selected) + n <= most:
            selected += [rows[i] for i in picked]
    return selected


def _spread_out(items: list[int], number: int) -> list[int]:
    """At most so many of the items, the first and the last among them if possible."""
    number = min(number, len(items))
    return [items[i * (len(items) - 1) // max(number - 1, 1)] for i in range(number)]
