"""Statistics of a phase diagram: where in the (A, T) plane the dynamical loss beats the static one, and how surely.

Every cell is compared with the static loss of the same seeds by a two-sided paired t-test. The tests of one setting and
split are corrected together (Benjamini and Hochberg): of the cells called significant, at most 5 % are expected to be
false. These tests depend on each other, through the static members that they share; for two-sided tests that is not
covered by the procedure's proof.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr
from scipy import stats

from ..results.conditions import Condition
from ..results.estimate import CONFIDENCE, SAME, Estimate
from ..results.labelled import SPLITS, by_setting, loss_unit
from ..results.summary import summarise
from ..results.words import difference, markdown_table, spread

FALSE_DISCOVERIES = 0.05
_COUNTS = ("n", "static_n", "seeds", "significant", "collapsed", "static_collapsed")
_Metric = Literal["accuracy", "loss", "best accuracy", "lowest loss"]
_GAIN = {"gain": "mean", "low": "low", "high": "high"}
_LEGEND = (
    "In %, mean ± std over seeds. ▲ ▼: significantly above, below the static loss of the same seeds (two-sided paired "
    "t-tests, Benjamini–Hochberg over all cells of a table, false discovery rate 5 %). (n): only n seeds are left, the "
    "others diverged or were not reached. –: none is left. Fewer than 2 pairs of seeds, or the same difference for "
    "all, are not tested. †n: n seeds collapsed on the way (validation accuracy to chance, or by more than half)."
)


def loss_function(dataset: xr.Dataset) -> str:
    """What a title adds to say which loss was minimised: nothing for the cross-entropy."""
    name = dataset.attrs.get("loss_function", "cross-entropy")
    return "" if name == "cross-entropy" else f", {name} loss"


def statistics(part: xr.Dataset, metric: _Metric = "accuracy") -> xr.Dataset:
    """The phase diagram of one setting, of accuracy or loss, each split at its last evaluation; or of the validation
    set at every member's best one.

    Accuracies are fractions; NaN is what too few seeds cannot give. With dimensions `split`, `amplitude` (those above
    1) and `period`: `mean`, `std` and number `n` of the members that did not diverge; `gain`, the mean of their paired
    differences from the static loss, with its 95 % confidence interval `low` to `high` and the p-value `p` of the
    paired t-test; whether the gain is `significant`; and how many members `collapsed` on the way. With dimension
    `split` alone: `static_mean`, `static_std`, `static_n`, `static_collapsed`, and the number of `seeds` that were
    trained.
    """
    conditions = summarise(part).conditions
    return xr.concat([_cells(part, split, conditions, metric) for split in SPLITS], "split", data_vars="all")


def _cells(part: xr.Dataset, split: str, conditions: Sequence[Condition], metric: _Metric) -> xr.Dataset:
    """The diagram of one split."""
    static, *dynamical = conditions
    reference = static.outcome(split, metric)
    outcomes = [c.outcome(split, metric) for c in dynamical]
    gains = [c.difference(split, metric) for c in dynamical]
    cells = {name: [getattr(e, name) for e in outcomes] for name in ("mean", "std", "n")}
    cells |= {name: [getattr(e, field) for e in gains] for name, field in _GAIN.items()}
    cells |= {f"static_{name}": getattr(reference, name) for name in ("mean", "std", "n")}
    cells |= {"collapsed": [len(c.collapsed) for c in dynamical], "static_collapsed": len(static.collapsed)}
    cells |= {"p": [_p_value(e) for e in gains], "seeds": part.sizes["seed"]}
    # A cell that could not be tested counts as one without any evidence.
    cells["significant"] = stats.false_discovery_control(np.nan_to_num(cells["p"], nan=1.0)) <= FALSE_DISCOVERIES
    grids = {}
    for name, values in cells.items():
        values = np.array(values, None if name in _COUNTS else float)  # None becomes NaN
        grids[name] = (("amplitude", "period"), values.reshape(-1, part.sizes["period"])) if values.ndim else values
    return xr.Dataset(grids, {"amplitude": part.amplitude.values[1:], "period": part.period.values, "split": split})


def _p_value(differences: Estimate) -> float:
    """Of the two-sided paired t-test. NaN, nothing established, for fewer than 2 seeds and for differences that are
    all the same but for rounding: a t-test takes their missing variance for certainty."""
    if differences.mean is None or differences.std is None or differences.std < SAME:
        return np.nan
    t = differences.mean / (differences.std / differences.n**0.5)
    return float(2 * stats.t.sf(abs(t), differences.n - 1))


def over_cells(part: xr.Dataset, split: str, what: Literal["outcome", "difference"]) -> Estimate:
    """Statistics over seeds of a setting's dynamical accuracy, or of its difference from the static one.

    Fractions. A seed's number is its average over all cells, as far as its member there did not diverge.
    """
    cells = [getattr(c, what)(split).values for c in summarise(part).conditions[1:]]
    seeds = sorted({seed for cell in cells for seed in cell})
    return Estimate.of({s: float(np.mean([cell[s] for cell in cells if s in cell])) for s in seeds})


def series(dataset: xr.Dataset) -> tuple[str, dict[str, list[xr.Dataset]]]:
    """Along what the gain can be followed, "width" or with one width "learning_rate", and at least two parts in that
    order, grouped by what else is special about them, in words. With neither varied: "" and no groups."""
    along = next((name for name in ("width", "learning_rate") if dataset.sizes.get(name, 1) > 1), "")
    groups: dict[str, list[xr.Dataset]] = {}
    for setting, part in by_setting(dataset) if along else ():
        words = [w for w in setting.split(", ") if not w.startswith(along.replace("_", " "))]
        groups.setdefault(", ".join(words), []).append(part)
    groups = {rest: sorted(parts, key=lambda part: part[along].item()) for rest, parts in groups.items()}
    return along, {rest: parts for rest, parts in groups.items() if len(parts) > 1}


def counts(cells: xr.Dataset) -> tuple[int, int, int]:
    """In how many cells of one split the dynamical loss is significantly above, significantly below, undecided."""
    better, worse = (int((cells.significant & (sign * cells.gain > 0)).sum()) for sign in (1, -1))
    return better, worse, cells.significant.size - better - worse


def best(cells: xr.Dataset) -> dict[str, int]:
    """Where in the grid of one split the mean accuracy is highest, the first of equals."""
    means = cells["mean"].fillna(-1).values
    return dict(zip(("amplitude", "period"), map(int, np.unravel_index(means.argmax(), means.shape)), strict=True))


def markdown(dataset: xr.Dataset) -> list[str]:
    """Lines of Markdown: the phase diagram of every setting as tables, and what it says in sentences with numbers."""
    if dataset.sizes["amplitude"] < 2:
        return []
    lines = [f"## Phase diagram{loss_function(dataset)}: accuracy over amplitude A and period T", "", _LEGEND]
    overview = []
    for setting, part in by_setting(dataset):
        conditions = summarise(part).conditions
        train, validation = (_cells(part, split, conditions, "accuracy") for split in SPLITS)
        lines += ["", f"### {setting}"] if setting else []
        lines += [*_table(train), *_table(validation), "", _verdict(train), _verdict(validation), _best(validation)]
        lines += _of_loss(_cells(part, "validation", conditions, "loss"), loss_unit(part))
        highest = counts(_cells(part, "validation", conditions, "best accuracy"))
        lines += [_stopped_early(highest, counts(_cells(part, "validation", conditions, "lowest loss")))]
        gain = over_cells(part, "validation", "difference")
        compared = " / ".join(map(str, counts(validation)))
        overview.append([setting, _spread(validation, "static_"), compared, _points(gain.mean, gain.low, gain.high)])
    if len(overview) > 1:
        headers = ["setting", "static, %", "cells better / worse / undecided", "mean gain, points"]
        lines += ["", "### Validation accuracy by setting", "", *markdown_table(headers, overview), ""]
        lines += [
            "The mean gain of a seed is its average over all cells; the interval is over seeds.",
            *_trends(dataset),
        ]
    return lines


def _table(cells: xr.Dataset, scale: float = 100, digits: int = 1) -> list[str]:
    """Lines for one split; the table's rows are the amplitudes."""
    rows = []
    for a, amplitude in enumerate(cells.amplitude.values):
        row = [cells.isel(amplitude=a, period=p) for p in range(cells.sizes["period"])]
        markers = [(" ▲" if cell.gain > 0 else " ▼") if cell.significant else "" for cell in row]
        texts = [_spread(cell, "", scale, digits) + marker for cell, marker in zip(row, markers, strict=True)]
        rows.append([f"{amplitude:g}", *texts])
    what = cells.split.item() if scale == 100 else f"{cells.split.item()} loss"
    headers = [f"{what}: A ↓, T (updates) →", *(f"{T:g}" for T in cells.period.values)]
    static = f"Static loss (A = 1), {what}: {_spread(cells, 'static_', scale, digits)}."
    return ["", static, "", *markdown_table(headers, rows)]


def _of_loss(cells: xr.Dataset, unit: str) -> list[str]:
    """Lines about the validation loss: a table, what is established, and where it is lowest."""
    above, below, undecided = counts(cells)
    of = f" ({unit}, without class weights)" if unit else ""
    lines = [*_table(cells, 1, 2), ""]
    lines += [
        f"- Validation loss{of}: of {cells.p.size} cells it is significantly lower with the dynamical loss in {below}, "
        f"significantly higher in {above}, undecided in {undecided}."
    ]
    if cells.n.values.any():
        lowest = np.unravel_index(np.nanargmin(cells["mean"].values), cells["mean"].shape)
        cell = cells.isel(amplitude=int(lowest[0]), period=int(lowest[1]))
        change = _points(*(cell[name].item() for name in ("gain", "low", "high")), scale=1, digits=2)
        where = f"A = {cell.amplitude.item():g}, T = {cell.period.item():g}"
        lines.append(f"- It is lowest at {where} with {_spread(cell, '', 1, 2)}; against the static loss: {change}.")
    return lines


def _stopped_early(accuracy: tuple[int, int, int], loss: tuple[int, int, int]) -> str:
    """The counts of cells if every member is stopped at its best accuracy, or at its lowest loss."""
    return (
        "- Stopped early: every member at its best validation accuracy, that is significantly better in "
        f"{accuracy[0]} of {sum(accuracy)} cells, worse in {accuracy[1]}, undecided in {accuracy[2]}; every member at "
        f"its lowest validation loss, that is lower in {loss[1]}, higher in {loss[0]}, undecided in {loss[2]}."
    )


def _verdict(cells: xr.Dataset) -> str:
    better, worse, undecided = counts(cells)
    untested = int(np.isnan(cells.p).sum())
    return (
        f"- {cells.split.item().capitalize()} accuracy: of {cells.p.size} cells the dynamical loss is significantly "
        f"better than the static loss in {better}, significantly worse in {worse}, undecided in {undecided}"
        f"{f' ({untested} of them could not be tested)' if untested else ''}."
    )


def _best(cells: xr.Dataset) -> str:
    cell = cells.isel(best(cells))
    if not cell.n:
        return "- No member is left to choose a best cell from."
    gain = _points(*(cell[name].item() for name in ("gain", "low", "high")))
    return (
        f"- Best cell by validation accuracy: A = {cell.amplitude.item():g}, T = {cell.period.item():g} with "
        f"{_spread(cell)} %; against the static loss: {gain} points. Choosing the best of {cells.p.size} cells by the "
        "data that it is measured on overstates it: confirm it with new seeds and new data."
    )


def _trends(dataset: xr.Dataset) -> list[str]:
    """Whether the mean gain changes from the smallest to the largest width (or learning rate), paired by seed."""
    along, groups = series(dataset)
    lines = [""] if groups else []
    for rest, parts in groups.items():
        gains = [over_cells(part, "validation", "difference") for part in parts]
        change = gains[-1].minus(gains[0])
        verdict = "no change is established"
        if _p_value(change) < 1 - CONFIDENCE:
            verdict = "it grows" if (change.mean or 0) > 0 else "it shrinks"
        steps = np.diff([np.nan if gain.mean is None else gain.mean for gain in gains])
        if verdict.startswith("it") and not ((steps > 0).all() or (steps < 0).all()):
            verdict += ", though not steadily: see the table"
        ends = f"{along.replace('_', ' ')} {parts[0][along].item():g} to {parts[-1][along].item():g}"
        by = f"{_points(change.mean, change.low, change.high)} points ({change.n} seeds, paired)"
        lines.append(f"- {f'{rest}: f' if rest else 'F'}rom {ends} the mean gain changes by {by}: {verdict}.")
    return lines


def _spread(cell: xr.Dataset, prefix: str = "", scale: float = 100, digits: int = 1) -> str:
    """Mean ± std, the number of seeds if some are missing, and of those that collapsed if there are any."""
    mean, std, n, fallen = (cell[prefix + name].item() for name in ("mean", "std", "n", "collapsed"))
    counted = (f" ({n})" if 0 < n < cell.seeds else "") + (f" †{fallen}" if fallen else "")
    return spread(mean, std, scale, digits) + counted


def _points(mean: float | None, low: float | None, high: float | None, scale: float = 100, digits: int = 1) -> str:
    """A mean difference with the ends of its 95 % interval, fractions in points."""
    return difference(mean, low, high, scale, digits, lead="95 % CI ")
