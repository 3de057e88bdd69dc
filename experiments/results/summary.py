"""What a run's results say: every condition, what its differences establish, and what must be known before reading."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from . import words
from .conditions import Condition, condition
from .estimate import CONFIDENCE, SAME
from .labelled import by_loss, by_setting, loss_unit, subject

_MOST_NAMED = 6  # of the members or conditions that a notice is about


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
    """Statistics of each split at its last and its best evaluations, for the dataset that `labelled` describes."""
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
        static = condition(first, None, last, None, setting)
        compared = [condition(m, float(m.period), last, static, setting) for m in dynamical]
        everything += [static, *(dataclasses.replace(c, evidence=_evidence(c, loss_unit(part))) for c in compared)]
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


def _evidence(condition: Condition, loss_unit: str) -> list[str]:
    """What the paired validation accuracies and losses establish, in plain words; and what they would be if members had
    been stopped early, where that establishes something else."""
    unit = f" {loss_unit}".rstrip()
    sentences = [_verdict(condition, "accuracy", 100, " points"), _verdict(condition, "loss", 1, unit)]
    pairs = ("accuracy", "best accuracy"), ("loss", "lowest loss")
    signs = [[condition.difference("validation", name).sign for name in pair] for pair in pairs]
    return sentences if all(last == best for last, best in signs) else [*sentences, _stopped_early(condition, unit)]


def _stopped_early(condition: Condition, unit: str) -> str:
    accuracy = lambda name: condition.difference("validation", name).difference(100) + " points"
    loss = lambda name: condition.difference("validation", name).difference() + unit
    return (
        f"Stopped early, {condition.name}, dynamical − static: every member at its best validation accuracy "
        f"{accuracy('best accuracy')} and {loss('loss at best accuracy')}; at its lowest validation loss "
        f"{accuracy('accuracy at lowest loss')} and {loss('lowest loss')}."
    )


def _verdict(condition: Condition, metric: str, scale: float, unit: str) -> str:
    lead = f"Validation {metric}, {condition.name}: dynamical − static"
    found = condition.difference("validation", metric)
    if found.mean is None:
        return f"{lead}: no seed was evaluated under both losses, so there is nothing to compare."
    lead += f" = {words.number(found.mean, scale, sign=True)}{unit}"
    if found.std is None or found.low is None or found.high is None or found.rank_p is None:
        return f"{lead} (1 seed): one seed has no interval, so no difference is established."
    interval = f"95 % CI {words.interval(found.low, found.high, scale)}"
    lead += f" ({interval}, {found.n} seeds, signed-rank p = {words.p_value(found.rank_p)})"
    if found.std < SAME:
        return f"{lead}: all seeds differ by the same amount, too few distinct values to establish a difference."
    if not found.sign:
        ranks = " by the interval, though the ranks speak for one" if found.rank_p < 1 - CONFIDENCE else ""
        return f"{lead}: no difference established{ranks}."
    ranks = "" if found.rank_p < 1 - CONFIDENCE else " by the interval; the ranks alone do not show it"
    return f"{lead}: {'higher' if found.sign > 0 else 'lower'} with the dynamical loss{ranks}."


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
    if fallen := [(c, seed) for c in everything for seed in c.collapsed]:
        notices.append(
            "COLLAPSED on the way (validation accuracy fell to chance, or by more than half of its best so far): "
            f"{len(fallen)} of {sum(c.seeds for c in everything)} members. They are part of every mean and difference: "
            f"look at the medians ({_first(_fall(c, seed) for c, seed in fallen)})."
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
    return _first(f"{name}: seed {', '.join(map(str, seeds))}" for name, seeds in found.items())


def _first(items: Iterable[str]) -> str:
    """As many as one reads, and how many more there are."""
    named = list(items)
    rest = len(named) - _MOST_NAMED
    return "; ".join(named[:_MOST_NAMED]) + (f"; and {rest} more, which summary.json names" if rest > 0 else "")


def _fall(condition: Condition, seed: int) -> str:
    """What happened to a member that collapsed, in words."""
    fall, last = condition.collapsed[seed], condition.outcome("validation").values.get(seed)
    at = f"from {fall.best:.0%} to {fall.fell_to:.0%} at update {fall.update:,}"
    return f"{condition.name}: seed {seed} {at}" + (f", {last:.0%} in the end" if last is not None else "")


def _notes(n_dynamical: int, dataset: xr.Dataset) -> list[str]:
    minimised = dataset.attrs.get("loss_function", "cross-entropy")
    notes = [
        "± is the standard deviation over seeds (n − 1), in brackets is the median. Differences are paired by seed; "
        "their 95 % confidence intervals are Student's t, which assumes roughly normal differences. p is that of "
        "Wilcoxon's two-sided signed-rank test, which no single member decides, and fewer than six never establish.",
        f"Loss is the plain {minimised} loss without class weights, so that losses can be compared.",
        "Stopped early: at the best of the evaluations that were made. It is chosen on the set on which it is "
        "measured, and so a little too good; one in the middle of a period finds a dynamical loss at a disadvantage.",
    ]
    if n_dynamical > 1:
        notes.append(
            f"The intervals are not corrected for multiple comparisons: of {n_dynamical} conditions some can differ by "
            "chance alone, and choosing the best of them on this validation set overstates it."
        )
    return notes
