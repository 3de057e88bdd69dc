"""One loss, setting and all its seeds: outcomes at the last evaluation and at the best, differences, and what became
of members.

Static and dynamical losses start from the same seeds, so the difference of a seed removes what the seed alone decides.
Members that diverged have no place in a mean; they are left out of it, counted, and named. Members that collapsed on
the way, or are at chance in the end, stay in it, as nobody knows whether they would have come back, and are counted and
named too.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from . import words
from .estimate import Estimate

CHANCE = 1.25  # times 1 / classes: an accuracy of no more than that is no better than guessing (ours)
_ABOVE = 1.5  # times that: an accuracy from which a fall to chance is no fluctuation (ours)


@dataclass(frozen=True)
class Collapse:
    """The update of the evaluation at which a member's validation accuracy first had fallen to chance, or by more than
    half of its best so far, and the accuracies (0 to 1) before and after."""

    update: int
    best: float
    fell_to: float


@dataclass(frozen=True)
class Condition:
    """One loss. `outcomes` and `differences` (dynamical - static) are indexed by split, then by "accuracy" (0 to 1) or
    "loss" (nats) at the last evaluation; for validation also as if every member had been stopped early, at its "best
    accuracy" ("loss at best accuracy") or its "lowest loss" ("accuracy at lowest loss"). The static loss has no period,
    no differences and no evidence."""

    amplitude: float
    period: float | None
    seeds: int
    diverged: list[int]
    missing: int  # members that an interrupted run never came to
    outcomes: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    setting: str = ""  # what else than the loss is special about it, in words
    steps_per_epoch: int | None = None
    collapsed: dict[int, Collapse] = dataclasses.field(default_factory=dict)  # by seed
    evidence: list[str] = dataclasses.field(default_factory=list)  # what the differences establish, in sentences
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
        loss = words.loss_name(self.amplitude, self.period, self.steps_per_epoch)
        return f"{self.setting}, {loss}" if self.setting else loss


def condition(
    members: xr.Dataset,
    period: float | None,
    last: Mapping[str, int | None],
    static: Condition | None,
    setting: str,
) -> Condition:
    """Statistics of one condition.

    **Arguments:**

    - `members`: its part of the dataset, whose members have dimension seed alone.
    - `period`: None for the static loss.
    - `last`: the step of the last evaluation of every split, None for a split that was not evaluated.
    - `static`: what to compare it with.
    - `setting`: what else than the loss is special about it, in words.
    """
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

    if "validation" in final:
        final["validation"] |= _stopped_early(members.sel(split="validation"))
    outcomes = {
        split: {m: Estimate.of({seed: float(v[i]) for i, seed in survivors}) for m, v in metrics.items()}
        for split, metrics in final.items()
    }
    differences = {
        split: {m: e.minus(static.outcomes[split][m]) for m, e in metrics.items()}
        for split, metrics in outcomes.items()
        if static is not None
    }
    steps_per_epoch = members.attrs.get("steps_per_epoch")
    chance = CHANCE / members.sizes.get("class", np.inf)
    guessing = [seed for i, seed in survivors if all(split["accuracy"][i] <= chance for split in final.values())]
    return Condition(
        amplitude=float(members.amplitude),
        period=period,
        seeds=len(seeds),
        diverged=[seed for seed, gone in zip(seeds, lost, strict=True) if gone],
        missing=int((~seen & ~lost).sum()) if final else 0,
        outcomes=outcomes,
        differences=differences,
        setting=setting,
        steps_per_epoch=None if steps_per_epoch is None else int(steps_per_epoch),
        at_chance=guessing,
        collapsed=_collapsed(members, chance),
    )


def _stopped_early(members: xr.Dataset) -> dict[str, np.ndarray]:
    """Accuracy and loss, `[seed]`, where each is best among the evaluations of a member, and the other one there."""
    accuracy, loss = (members[m].transpose("seed", ...).values.astype(float) for m in ("accuracy", "loss"))
    at_best = np.nan_to_num(accuracy, nan=-1).argmax(1, keepdims=True)
    at_lowest = np.nan_to_num(loss, nan=np.inf).argmin(1, keepdims=True)
    at = {"best accuracy": (accuracy, at_best), "loss at best accuracy": (loss, at_best)}
    at |= {"lowest loss": (loss, at_lowest), "accuracy at lowest loss": (accuracy, at_lowest)}
    return {name: np.take_along_axis(values, where, 1)[:, 0] for name, (values, where) in at.items()}


def _collapsed(members: xr.Dataset, chance: float) -> dict[int, Collapse]:
    """The members of one condition whose validation accuracy fell to chance or by more than half, by seed."""
    accuracy = members.accuracy.sel(split="validation").dropna("evaluation_step", how="all")
    values, steps = accuracy.transpose("seed", ...).values.astype(float), accuracy.evaluation_step.values
    before, after = np.fmax.accumulate(values, 1)[:, :-1], values[:, 1:]
    fell = (after < before / 2) | ((after <= chance) & (before > _ABOVE * chance))
    first = {i: int(fell[i].argmax()) for i in np.flatnonzero(fell.any(1))}
    seeds = members.seed.values.tolist()
    return {seeds[i]: Collapse(int(steps[k + 1]), float(before[i, k]), float(after[i, k])) for i, k in first.items()}
