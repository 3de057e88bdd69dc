"""What static and dynamical losses end with at every size: accuracies, gain, and depth and sharpness of the minima."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from rich import box
from rich.table import Table

from ..results import words
from ..results.conditions import Condition
from ..results.estimate import CONFIDENCE, Estimate
from ..results.labelled import by_loss, by_setting
from ..results.summary import summarise

_LEGEND = (
    "Mean ± std over seeds (median); differences, dynamical − static, are paired by seed, with their 95 % interval and "
    "the p-value of the signed-rank test. Train loss is the plain loss that was minimised, and λ the largest "
    "eigenvalue of its Hessian, both after the last update, when the oscillation has stopped and all class weights are "
    "1. Losses, eigenvalues and learning rates of different loss functions cannot be compared."
)


@dataclass(frozen=True)
class Point:
    """A loss at one size, learning rate η and loss function. `sharpness` is the largest Hessian eigenvalue of the plain
    loss at the end, and `sharpening` its paired difference, dynamical − static."""

    loss_function: str
    width: int
    parameters: int
    learning_rate: float
    condition: Condition
    sharpness: Estimate
    sharpening: Estimate

    @property
    def loss(self) -> tuple[float, float | None]:
        """Amplitude and period; the static loss has no period."""
        return self.condition.amplitude, self.condition.period

    @property
    def name(self) -> str:
        """The loss in words."""
        return words.loss_name(*self.loss)


def points(dataset: xr.Dataset) -> list[Point]:
    """Everything that was trained, by loss function, width and learning rate, the static loss first in each."""
    found = []
    for _, part in by_setting(dataset):
        conditions = summarise(part).conditions
        sharpness = [Estimate.of(_sharpness(members, c)) for members, c in zip(by_loss(part), conditions, strict=True)]
        for condition, largest in zip(conditions, sharpness, strict=True):
            found.append(
                Point(
                    loss_function=str(part.loss_function.item()),
                    width=int(part.width),
                    parameters=int(part.parameters),
                    learning_rate=float(part.learning_rate),
                    condition=condition,
                    sharpness=largest,
                    sharpening=largest.minus(sharpness[0]) if condition.period else Estimate.of({}),
                )
            )
    return found


def _sharpness(members: xr.Dataset, condition: Condition) -> dict[int, float]:
    """By seed, of the members that did not diverge; nothing where the training was interrupted."""
    if "hessian_max" not in members or not members.sizes["observation_step"]:
        return {}
    values = members.hessian_max.isel(observation_step=-1)
    used = condition.outcome("train").values
    seen = zip(members.seed.values.tolist(), values.values.tolist(), strict=True)
    return {seed: value for seed, value in seen if seed in used and np.isfinite(value)}


def established(difference: Estimate) -> int:
    """1 or -1 where differences are above or below 0 by their 95 % interval and by the signed-rank test, else 0."""
    return difference.sign if difference.rank_p is not None and difference.rank_p < 1 - CONFIDENCE else 0


def markdown(found: Sequence[Point]) -> list[str]:
    """Lines of Markdown: what is established in sentences, and two tables for every loss function."""
    if not found:
        return []
    lines = ["## By number of parameters", "", *verdicts(found), "", _LEGEND]
    for name in dict.fromkeys(point.loss_function for point in found):
        own = [point for point in found if point.loss_function == name]
        accuracies, minima = zip(*map(_rows, own), strict=True)
        lead = ["parameters", "width", "η", "loss"]
        outcomes = ["train accuracy, %", "validation accuracy, %", "difference, points", "p"]
        lines += ["", f"### {name}", "", *words.markdown_table([*lead, *outcomes], accuracies)]
        outcomes = ["train loss", "difference", "λ", "difference", "p", "2/η"]
        lines += ["", *words.markdown_table([*lead, *outcomes], minima)]
    return lines


def _rows(point: Point) -> tuple[list[str], list[str]]:
    """The cells of a loss in the two tables."""
    lead = [f"{point.parameters:,}", str(point.width), f"{point.learning_rate:g}", point.name]
    c = point.condition
    gain, deepening, sharpening = c.difference("validation"), c.difference("train", "loss"), point.sharpening
    accuracies = [c.outcome(split).spread_and_median(100, 1) for split in ("train", "validation")]
    accuracies += [gain.difference(100, 1), words.p_value(gain.rank_p)]
    minima = [c.outcome("train", "loss").spread_and_median(1, 4), deepening.difference(1, 4)]
    minima += [point.sharpness.spread_and_median(), sharpening.difference(), words.p_value(sharpening.rank_p)]
    if point.condition.period is None:
        accuracies[2:], minima[1], minima[3:5] = ["", ""], "", ["", ""]
    return [*lead, *accuracies], [*lead, *minima, f"{2 / point.learning_rate:.3g}"]


def verdicts(found: Sequence[Point]) -> list[str]:
    """At which sizes a difference is established, for every dynamical loss, loss function and learning rate."""
    groups: dict[tuple, list[Point]] = {}
    for point in found:
        if point.condition.period is not None:
            groups.setdefault((point.loss_function, point.learning_rate, point.name), []).append(point)
    lines = []
    for (function, rate, name), own in groups.items():
        parts = []
        for what, up, down, differences in (
            ("validation accuracy", "higher", "lower", [p.condition.difference("validation") for p in own]),
            ("train loss", "higher", "lower", [p.condition.difference("train", "loss") for p in own]),
            ("λ", "larger", "smaller", [p.sharpening for p in own]),
        ):
            signs = [established(difference) for difference in differences]
            at = {
                word: ", ".join(f"{p.parameters:,}" for p, sign in zip(own, signs, strict=True) if sign == wanted)
                for word, wanted in ((up, 1), (down, -1), ("undecided", 0))
            }
            parts.append(f"{what} " + ", ".join(f"{word} at {sizes}" for word, sizes in at.items() if sizes))
        lines.append(f"- {function}, η = {rate:g}, {name} against static, by parameters: {'; '.join(parts)}.")
    more = "Established is what both the 95 % interval and the signed-rank test say, which needs six seeds; "
    return [*lines, "", f"{more}{3 * sum(map(len, groups.values()))} comparisons, not corrected for their number."]


def console_tables(found: Sequence[Point]) -> list[Table]:
    """For the terminal, of every loss function: validation accuracies, and their paired difference."""
    tables: dict[str, Table] = {}
    static = Estimate.of({})
    for point in found:
        name, c = point.loss_function, point.condition
        if name not in tables:
            title = f"{name}: validation accuracy at the end, %"
            tables[name] = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
            for header in ("parameters", "η", "A", "T", "static", "dynamical", "difference [95 % CI]"):
                tables[name].add_column(header, justify="right", overflow="fold")
        if c.period is None:
            static = c.outcome("validation")
            continue
        accuracies = [values.spread(100, 1) for values in (static, c.outcome("validation"))]
        setting = [f"{point.parameters:,}", *(f"{x:g}" for x in (point.learning_rate, c.amplitude, c.period))]
        tables[name].add_row(*setting, *accuracies, c.difference("validation").difference(100, 1))
    return list(tables.values())


def plain(found: Sequence[Point]) -> list[dict[str, Any]]:
    """The points for `summary.json`, in which their conditions have more."""
    return [
        {name: value for name, value in dataclasses.asdict(point).items() if name != "condition"}
        | {"amplitude": point.condition.amplitude, "period": point.condition.period}
        for point in found
    ]
