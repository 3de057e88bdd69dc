"""What a run's results say: statistics over seeds, differences paired by seed, and the same words in every output.

Static and dynamical losses start from the same seeds, so the difference of a seed removes what the seed alone decides.
Members that diverged have no place in a mean; they are left out of it, counted, and named. Members that are at chance
stay in it, as nobody knows whether they would have come back, and are counted and named too.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from rich import box
from rich.table import Table
from scipy import stats

from . import words
from .files import PACKAGES, file_name, write_texts
from .labelled import SPLITS, by_loss, by_setting, loss_unit, subject

CONFIDENCE = 0.95
SAME = 1e-6  # accuracies are float32: differences whose spread is below this are equal but for rounding
CHANCE = 1.25  # times 1 / classes: an accuracy of no more than that is no better than guessing (ours)
MOST_SENTENCES = 8  # that a summary begins with, before the tables


@dataclass(frozen=True)
class Estimate:
    """Statistics of one number per seed. `std` divides by n - 1; `low` to `high` is the 95 % confidence interval of the
    mean (Student's t). What too few seeds cannot give is None."""

    values: dict[int, float]
    n: int
    mean: float | None
    std: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: dict[int, float]) -> "Estimate":
        n, sample = len(values), np.array(list(values.values()), dtype=np.float64)
        if n < 2:
            return cls(values, n, next(iter(values.values()), None), None, None, None)
        mean, std = float(sample.mean()), float(sample.std(ddof=1))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / n**0.5
        return cls(values, n, mean, std, mean - half, mean + half)

    def spread(self, scale: float = 1, digits: int = 2) -> str:
        """Mean ± std in words."""
        return words.spread(self.mean, self.std, scale, digits)

    def difference(self, scale: float = 1, digits: int = 2) -> str:
        """Of differences: the mean and its confidence interval in words."""
        return words.difference(self.mean, self.low, self.high, scale, digits)


@dataclass(frozen=True)
class Condition:
    """One loss, at the last evaluation. `outcomes` and `differences` (dynamical - static) are indexed by split, then by
    "accuracy" (0 to 1) or "loss" (nats); the static loss has no period, no differences and no evidence."""

    amplitude: float
    period: float | None
    seeds: int
    diverged: list[int]
    missing: int  # members that an interrupted run never came to
    outcomes: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    evidence: str | None
    setting: str = ""  # what else than the loss is special about it, in words
    at_chance: list[int] = dataclasses.field(default_factory=list)  # seeds whose accuracies are those of guessing

    def outcome(self, split: str, metric: str = "accuracy") -> Estimate:
        """Of nothing, if the split was not evaluated."""
        return self.outcomes.get(split, {}).get(metric) or Estimate.of({})

    def difference(self, split: str, metric: str = "accuracy") -> Estimate:
        """Dynamical - static; of nothing for the static loss."""
        return self.differences.get(split, {}).get(metric) or Estimate.of({})

    @property
    def used(self) -> int:
        """How many members are in the means."""
        return self.seeds - len(self.diverged) - self.missing

    @property
    def cells(self) -> list[str]:
        """What a table says of the loss and of the seeds that are used."""
        return [
            f"{self.amplitude:g}",
            "static" if self.period is None else f"{self.period:g}",
            f"{self.used}/{self.seeds}",
        ]

    @property
    def name(self) -> str:
        loss = words.loss_name(self.amplitude, self.period)
        return f"{self.setting}, {loss}" if self.setting else loss


@dataclass(frozen=True)
class Summary:
    """All conditions, the static one first; `notices` must be read before the numbers, `notes` after them."""

    dataset: str
    finished: bool
    evaluated_at: dict[str, int | None]
    notices: list[str]
    notes: list[str]
    conditions: list[Condition]


def summarise(dataset: xr.Dataset) -> Summary:
    """Statistics of each split at its last evaluation, for the dataset that `labelled` describes."""
    if dataset.amplitude.values[0] != 1:
        raise ValueError(f"the first amplitude must be 1, the static loss, not {dataset.amplitude.values[0]:g}.")
    everything: list[Condition] = []
    evaluated_at: dict[str, int | None] = {}
    for setting, part in by_setting(dataset):
        last: dict[str, int | None] = {}
        for split in part.split.values.tolist():
            seen = np.isfinite(part.accuracy.sel(split=split)).any(("amplitude", "period", "seed")).values
            last[split] = int(part.evaluation_step.values[seen][-1]) if seen.any() else None
        first, *dynamical = by_loss(part)
        static = _condition(first, None, last, None, setting)
        everything += [static, *(_condition(m, float(m.period), last, static, setting) for m in dynamical)]
        evaluated_at = evaluated_at or last

    finished = str(dataset.attrs.get("finished")) == "true"
    return Summary(
        dataset=subject(dataset),
        finished=finished,
        evaluated_at=evaluated_at,
        notices=_notices(dataset, finished, everything),
        notes=_notes(sum(c.period is not None for c in everything), dataset),
        conditions=everything,
    )


def _condition(
    members: xr.Dataset,
    period: float | None,
    last: Mapping[str, int | None],
    static: Condition | None,
    setting: str,
) -> Condition:
    """Statistics of one condition, whose members have dimension seed alone; `static` is what to compare it with."""
    final = {
        split: {m: members[m].sel(split=split, evaluation_step=step).values.astype(float) for m in ("accuracy", "loss")}
        for split, step in last.items()
        if step is not None
    }
    lost, seen = members.diverged_at.values >= 0, np.ones(members.sizes["seed"], bool)
    for split in final.values():
        seen = seen & np.isfinite(split["accuracy"])  # a mean over examples: NaN only where nobody looked
        lost = lost | (np.isfinite(split["accuracy"]) & ~np.isfinite(split["loss"]))
    seeds: list[int] = members.seed.values.tolist()
    survivors = [(i, seed) for i, seed in enumerate(seeds) if seen[i] and not lost[i]]

    outcomes = {
        split: {m: Estimate.of({seed: float(v[i]) for i, seed in survivors}) for m, v in metrics.items()}
        for split, metrics in final.items()
    }
    differences = {
        split: {m: _paired(e, static.outcomes[split][m]) for m, e in metrics.items()}
        for split, metrics in outcomes.items()
        if static is not None
    }
    chance = CHANCE / members.sizes.get("class", np.inf)
    guessing = [seed for i, seed in survivors if all(split["accuracy"][i] <= chance for split in final.values())]
    amplitude, diverged = float(members.amplitude), [seed for seed, gone in zip(seeds, lost, strict=True) if gone]
    missing = int((~seen & ~lost).sum()) if final else 0
    result = Condition(amplitude, period, len(seeds), diverged, missing, outcomes, differences, None, setting, guessing)
    return result if static is None else dataclasses.replace(result, evidence=_evidence(result))


def _paired(dynamical: Estimate, static: Estimate) -> Estimate:
    return Estimate.of({seed: v - static.values[seed] for seed, v in dynamical.values.items() if seed in static.values})


def _evidence(condition: Condition) -> str:
    """What the paired validation accuracies establish, in plain words."""
    lead = f"Validation accuracy, {condition.name}: dynamical − static"
    difference = condition.difference("validation")
    if difference.mean is None:
        return f"{lead}: no seed was evaluated under both losses, so there is nothing to compare."
    lead += f" = {words.number(difference.mean, 100, sign=True)} points"
    if difference.std is None or difference.low is None or difference.high is None:
        return f"{lead} (1 seed): one seed has no interval, so no difference is established."
    lead += f" (95 % CI {words.interval(difference.low, difference.high, 100)}, {difference.n} seeds)"
    if difference.std < SAME:
        return f"{lead}: all seeds differ by the same amount, too few distinct values to establish a difference."
    if difference.low > 0:
        return f"{lead}: higher with the dynamical loss."
    return f"{lead}: lower with the dynamical loss." if difference.high < 0 else f"{lead}: no difference established."


def _notices(dataset: xr.Dataset, finished: bool, everything: list[Condition]) -> list[str]:
    notices = []
    if dataset.attrs["dataset"] == "digits":
        notices.append(
            "NOT CIFAR-10: this run used scikit-learn's bundled handwritten digits as a stand-in. "
            "Its numbers say nothing about CIFAR-10."
        )
    if not finished:
        done, steps = dataset.attrs["steps_done"], dataset.attrs.get("steps_planned")
        notices.append(
            f"INTERRUPTED after {done:,} {f'of {steps:,} ' if steps else ''}updates: these are numbers of an "
            "unfinished training, in which the class weights may still have been oscillating."
        )
    missing = sum(c.missing for c in everything)
    if missing:
        notices.append(
            f"NOT REACHED: {missing} of {sum(c.seeds for c in everything)} members were not trained before the "
            "interruption. They are left out of every mean and difference."
        )
    gone = {c.name: c.diverged for c in everything if c.diverged}
    if gone:
        notices.append(
            f"DIVERGED (became non-finite): {_count(gone, everything)}. They are left out of every mean and "
            f"difference, which can flatter the conditions they belong to ({_named(gone)})."
        )
    guessing = {c.name: c.at_chance for c in everything if c.at_chance}
    if guessing:
        notices.append(
            f"AT CHANCE (accuracies of guessing at the last evaluation): {_count(guessing, everything)}. They are part "
            f"of every mean and difference ({_named(guessing)})."
        )
    return notices


def _count(found: Mapping[str, list[int]], everything: list[Condition]) -> str:
    return f"{sum(map(len, found.values()))} of {sum(c.seeds for c in everything)} members"


def _named(found: Mapping[str, list[int]]) -> str:
    return "; ".join(f"{name}: seed {', '.join(map(str, seeds))}" for name, seeds in found.items())


def _notes(n_dynamical: int, dataset: xr.Dataset) -> list[str]:
    minimised = dataset.attrs.get("loss_function", "cross-entropy")
    notes = [
        "± is the standard deviation over seeds (n − 1). Differences are paired by seed; their 95 % confidence "
        "intervals are Student's t, which assumes roughly normal differences.",
        f"Loss is the plain {minimised} loss without class weights, so that losses can be compared.",
    ]
    if n_dynamical > 1:
        notes.append(
            f"The intervals are not corrected for multiple comparisons: of {n_dynamical} conditions some can differ by "
            "chance alone, and choosing the best of them on this validation set overstates it."
        )
    return notes


_COLUMNS = (
    ("train", "accuracy", 100, 2),
    ("validation", "accuracy", 100, 2),
    ("train", "loss", 1, 4),
    ("validation", "loss", 1, 4),
)


def _rows(summary: Summary) -> tuple[list[list[str]], list[list[str]]]:
    """The cells of the two tables: outcomes of every condition, and differences of the dynamical ones."""
    outcomes, differences = [], []
    for c in summary.conditions:
        lead = [c.setting] * bool(c.setting) + c.cells
        cells = [c.outcome(split, m).spread(scale, digits) for split, m, scale, digits in _COLUMNS]
        outcomes.append([*lead, str(len(c.diverged)), *cells])
        if c.period is not None:
            cells = [c.difference(split, m).difference(scale, digits) for split, m, scale, digits in _COLUMNS]
            differences.append([*lead[:-1], str(max(c.difference(split).n for split in SPLITS)), *cells])
    return outcomes, differences


def console_table(summary: Summary) -> Table:
    """The table for the terminal: accuracies of every condition, and the paired difference in validation accuracy."""
    table = Table(title=f"Accuracy at the last evaluation, %: {summary.dataset}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption, table.caption_style = "\n".join(summary.notices) or None, "bold red"
    lead = _lead(summary)
    for header in (*lead, "A", "T", "seeds", "train", "validation", "dynamical − static\n95 % CI"):
        table.add_column(header, justify="right", no_wrap="CI" not in header and header not in lead)
    for c in summary.conditions:
        difference = "" if c.period is None else c.difference("validation").difference(100)
        accuracies = (c.outcome(split).spread(100) for split in SPLITS)
        table.add_row(*[c.setting] * len(lead), *c.cells, *accuracies, difference)
    return table


def to_print(summary: Summary) -> list[Table | str]:
    """What a command prints: the table, and what it says of every loss."""
    return [console_table(summary), *(c.evidence for c in summary.conditions if c.evidence)]


def _lead(summary: Summary) -> list[str]:
    """The headers of what a table says before the loss."""
    return ["setting"] if any(c.setting for c in summary.conditions) else []


def plain(value: object) -> object:
    """An attribute as JSON can hold it: no NumPy types, None for NaN."""
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_summary(
    summary: Summary, dataset: xr.Dataset, directory: str | os.PathLike[str], more: Sequence[str] = ()
) -> None:
    """Writes `summary.md` and `summary.json`.

    `more` are lines that `summary.md` has after the tables. It begins with
    a sentence for every loss, unless there are many: then these are in `summary.json` only.
    """
    outcomes, differences = _rows(summary)
    unit = loss_unit(dataset)
    splits = ["train accuracy, %", "validation accuracy, %"]
    splits += [f"train loss, {unit}", f"validation loss, {unit}"] if unit else ["train loss", "validation loss"]
    steps = ", ".join(
        f"{split} after {step:,} updates" for split, step in summary.evaluated_at.items() if step is not None
    )
    lines = [f"# Static and dynamical loss on {summary.dataset}", ""]
    for notice in summary.notices:
        lines += [f"> **{notice}**", ""]
    evidence = [f"- {c.evidence}" for c in summary.conditions if c.evidence]
    lines += evidence if len(evidence) <= MOST_SENTENCES else []
    lines += ["", f"## Results ({steps or 'nothing was evaluated'})", ""]
    lead = _lead(summary)
    lines += words.markdown_table([*lead, "A", "T (updates)", "seeds used", "diverged", *splits], outcomes)
    if differences:
        splits = ["train accuracy, points", "validation accuracy, points", *splits[2:]]
        lines += ["", "## Paired differences, dynamical − static: mean [95 % CI]", ""]
        lines += words.markdown_table([*lead, "A", "T (updates)", "seeds", *splits], differences)
    lines += ["", *more] if more else []
    lines += ["", *(f"- {note}" for note in summary.notes), "", "## How it was made", ""]
    attrs = {key: plain(value) for key, value in dataset.attrs.items()}
    made = ("loss_function", "command", "device", "compute_dtype", "python", *PACKAGES, "platform", "git_commit")
    for key in (*made, *(name for name in attrs if name.startswith("resumed_with_"))):
        if key in attrs:
            lines.append(f"- {key.replace('_', ' ')}: `{attrs[key]}`")

    document = dataclasses.asdict(summary) | {
        "confidence": CONFIDENCE,
        "units": {"accuracy": "fraction", "loss": unit, "period": "updates"},
        "attributes": attrs,
    }
    write_texts(Path(directory), file_name(dataset.attrs["dataset"], "summary"), lines, document)
