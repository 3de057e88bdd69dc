"""What the cuts say of the valley that a network is in: how deep, how wide and how sharp, at every step, over seeds."""

import dataclasses
from pathlib import Path

import numpy as np
import xarray as xr

from ..results import tables, words
from ..results.estimate import CONFIDENCE, Estimate
from ..results.files import write_texts
from ..results.labelled import by_loss, loss_name, subject
from . import cuts

NAMES = {
    "loss_here": "loss, nats",
    "lowest": "lowest along v₁, nats",
    "width": "width of the valley, ‖θ‖",
    "sharpness": "λ₁",
    "second": "λ₂",
    "norm": "‖θ‖",
}
SAID = {
    "lowest": ("the lowest loss along v₁", "rises", "falls"),
    "width": ("the width of the valley", "grows", "shrinks"),
    "sharpness": ("the largest eigenvalue λ₁", "rises", "falls"),
}
"""What is put into sentences, and what a change to more and to less is called."""


def outcomes(members: xr.Dataset) -> dict[str, xr.DataArray]:
    """By name, `[seed, observation_step]`: the loss where the network is, the lowest one along the leading eigenvector,
    the valley's width there, the two largest eigenvalues, and the norm of the parameters."""
    eigenvalues = (members.eigenvalue.sel(direction=i, drop=True) for i in (1, 2))
    values = [members.loss_here, cuts.lowest(members), cuts.valley_width(members), *eigenvalues, members.norm]
    return dict(zip(NAMES, (v.transpose("seed", "observation_step") for v in values), strict=True))


def phases(members: xr.Dataset) -> np.ndarray:
    """How much of the class's turn is over at the steps of the cuts: 0 to 1."""
    return members.observation_step.values % float(members.period) / float(members.period)


def changes(members: xr.Dataset) -> dict[str, dict[str, Estimate]]:
    """By turn and name: how every seed's valley changes until the step nearest to half the turn, and from there to the
    last one, as differences."""
    at, found, seeds = phases(members), outcomes(members), members.seed.values
    half = int(np.argmin(abs(at - 0.5)))
    turns = {"rising weight": (0, half), "falling weight": (half, len(at) - 1)}
    return {
        turn: {name: Estimate.of_finite(seeds, (v[:, end] - v[:, start]).values, True) for name, v in found.items()}
        for turn, (start, end) in turns.items()
        if start != end
    }


def write(dataset: xr.Dataset, directory: Path) -> tuple[list[str], list[str]]:
    """Writes `summary.md` and `summary.json`, and returns what must be known before their numbers, and what these say,
    in sentences."""
    notices, sentences, lines, document = [], [], [], {}
    losses = by_loss(dataset.squeeze(["init", "width", "learning_rate"]))
    for members in losses:
        name, found, seeds = loss_name(members), outcomes(members), members.seed.values
        estimates = {
            n: [Estimate.of_finite(seeds, v.values[:, k]) for k in range(v.shape[1])] for n, v in found.items()
        }
        diverged = seeds[members.diverged_at.values >= 0].tolist()
        if diverged:
            notices.append(f"DIVERGED (became non-finite) and left out: {name}: seed {', '.join(map(str, diverged))}.")
        rows = [
            [f"{phase:.3g} T", f"{int(step):,}", *(_cell(estimates[n][k], len(seeds)) for n in NAMES)]
            for k, (phase, step) in enumerate(zip(phases(members), members.observation_step, strict=True))
        ]
        lines += ["", f"## Network of the {name} loss" if name == "static" else f"## Network of {name}", ""]
        lines += words.markdown_table(["phase", "step", *NAMES.values()], rows)
        moved = changes(members)
        if name != "static":
            lead = f"{name}: " if len(losses) > 2 else ""
            sentences += [lead + _sentence(turn, n, found[n]) for turn, found in moved.items() for n in SAID]
        document[name] = {
            "diverged": diverged,
            "steps": members.observation_step.values.tolist(),
            "outcomes": {n: [dataclasses.asdict(e) for e in row] for n, row in estimates.items()},
            "changes": {t: {n: dataclasses.asdict(e) for n, e in f.items()} for t, f in moved.items()},
        }
    head = [f"# The loss landscape over one period: {subject(dataset)}", ""]
    head += [line for notice in notices for line in (f"> **{notice}**", "")]
    head += [f"- {sentence}" for sentence in sentences]
    notes = [
        "The loss of the step's class weights, on all training points; ± is the standard deviation over seeds.",
        f"v₁ is the eigenvector of the largest Hessian eigenvalue λ₁ ({cuts.ORDER} Lanczos products); the width is "
        f"that {cuts.RISE:g} nats above the lowest point along it; – where no seed's cut shows it.",
        "(n): only n seeds are in a mean: the others diverged, or their cuts do not show it.",
        f"Intervals: {CONFIDENCE:.0%}, Student's t over seeds, of changes within a seed; p: Wilcoxon's signed-rank.",
    ]
    lines = [*head, *lines, *tables.ending(notes, dataset)]
    document = {"notices": notices, "losses": document, "statements": sentences}
    write_texts(directory, "summary", lines, document | {"attributes": tables.attributes(dataset)})
    return notices, sentences


def _cell(estimate: Estimate, seeds: int) -> str:
    """Mean ± std, and the number of seeds if some are missing."""
    return estimate.spread(1, 3) + (f" ({estimate.n})" if 0 < estimate.n < seeds else "")


def _sentence(turn: str, name: str, change: Estimate) -> str:
    what, more, less = SAID[name]
    lead = f"While the class's weight is {turn.split()[0]}, {what} changes by"
    if change.mean is None:
        return f"{lead} –: no seed's network shows it."
    if change.low is None or change.high is None or change.rank_p is None:
        return f"{lead} {words.number(change.mean, digits=3, sign=True)}: one seed has no interval."
    found = f"{lead} {change.difference(1, 3)} ({change.n} seeds, signed-rank p = {words.p_value(change.rank_p)})"
    if change.low <= 0 <= change.high:
        return f"{found}: no change established."
    return f"{found}: it {more if change.low > 0 else less}."
