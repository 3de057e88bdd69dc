"""At which learning rates a network with a frozen loss has a loss of period 2, of period 4, of none, or diverges."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from eqx_dynloss import landscape

from ..results import tables, words
from ..results.estimate import CONFIDENCE, Estimate
from ..results.files import write_texts

DIVERGED = -1
NAMES = {
    "period 2": "alternates (period 2)",
    "period 4": "period 4",
    "no period": "no period of 1, 2 or 4 (chaos)",
    "divergence": "diverges",
}


def behaviour(
    final_loss: Float[np.ndarray, "*shape update"], initial_loss: Float[np.ndarray, "*shape"]
) -> Int[np.ndarray, "*shape"]:
    """What the last updates do: 1, 2 or 4 for the period of the loss, 0 if it has none of these, and -1 if it diverges:
    if it is not finite, or never comes back below ten times what it was at first (ours)."""
    with jax.enable_x64(True):
        periods = np.asarray(landscape.period(jnp.asarray(final_loss)))
    gone = ~np.isfinite(final_loss).all(-1) | (np.nan_to_num(final_loss).min(-1) > 10 * initial_loss)
    return np.where(gone, DIVERGED, periods)


def onset(multiples: Float[np.ndarray, " rates"], seen: Int[np.ndarray, " rates"]) -> dict[str, float]:
    """The lowest rate at which each of `NAMES` is seen; NaN for what is not."""
    of = {"period 2": 2, "period 4": 4, "no period": 0, "divergence": DIVERGED}
    return {name: float(multiples[seen == value][0]) if (seen == value).any() else np.nan for name, value in of.items()}


def onsets(dataset: xr.Dataset) -> dict[str, dict[str, Estimate]]:
    """By frozen loss and name: the onset over seeds, in units of 2/λ."""
    found = {}
    for name in dataset.frozen.values.tolist():
        part = dataset.sel(frozen=name)
        begun = (np.isfinite(part.initial_loss).any("multiple") & np.isfinite(part.hessian_max)).values
        seeds, seen = part.seed.values[begun], behaviour(part.final_loss.values, part.initial_loss.values)[begun]
        by_seed = [onset(part.multiple.values, row) for row in seen]
        found[name] = {event: Estimate.of_finite(seeds, [one[event] for one in by_seed]) for event in NAMES}
    return found


def ratio_at_onset(part: xr.Dataset) -> Estimate:
    """Of one frozen loss: η in units of 2/λ with the λ after the last update, at the lowest rate of period 2. Only of
    seeds that are still at the rate below, where the onset is seen."""
    alternates = behaviour(part.final_loss.values, part.initial_loss.values) == 2
    first = alternates.argmax(1)  # 0 also where none does
    ratio = (part.multiple * part.final_hessian_max / part.hessian_max).transpose("seed", "multiple").values
    at_onset = ratio[np.arange(len(first)), first]
    return Estimate.of_finite(part.seed.values, np.where(first > 0, at_onset, np.nan))


def write(dataset: xr.Dataset, directory: Path) -> list[str]:
    """Writes `summary.md` and `summary.json`, and returns what they say, in sentences."""
    found, count = onsets(dataset), dataset.sizes["seed"]
    rows, sentences = [], []
    if dataset.attrs["finished"] != "true":
        done = dataset.attrs["steps_done"]
        sentences.append(f"INTERRUPTED after {done:,} updates: these are numbers of an unfinished sweep.")
    for name, events in found.items():
        part = dataset.sel(frozen=name)
        edge, edges = Estimate.of_finite(part.seed.values, 2 / part.hessian_max.values), ratio_at_onset(part)
        cells = [f"{e.spread(1, 2)} ({e.n}/{count})" if e.n else f"not seen (0/{count})" for e in events.values()]
        rows.append([name, edge.spread(1, 3), *cells, edges.spread(1, 3)])
        seen = [f"{NAMES[n]} from {e.spread(1, 2)}{_interval(e)} ({e.n} of {count} seeds)"
                for n, e in events.items() if e.n]  # fmt: skip
        loss = "the static loss" if name == "static" else f"the loss frozen at {name}"
        sentence = f"With {loss}, in units of 2/λ at the start: {'; '.join(seen) or 'none of these is seen'}."
        if edges.n:
            sentence += f" Where it begins to alternate, ηλ/2 at the end is {edges.spread(1, 3)}."
        sentences.append(sentence)
    low, high, step = (dataset.multiple.values[i] for i in (0, -1, 1))
    lines = ["# Bifurcations of a frozen loss on the spiral", "", *(f"- {s}" for s in sentences), ""]
    lines += words.markdown_table(["frozen at", "2/λ at the start", *NAMES.values(), "ηλ/2 at onset"], rows)
    notes = [
        f"The lowest of the rates {low:g} to {high:g}, every {step - low:.3g}, in units of 2/λ, where λ is the largest "
        "Hessian eigenvalue of the frozen loss at the start: mean ± std over the seeds that show it.",
        f"Intervals: {CONFIDENCE:.0%}, Student's t over these seeds.",
        "λ changes while a network goes on with its frozen loss, so the onset of period 2 need not be at 1, and "
        "depends on the updates; the last column is ηλ/2 with the λ after the last update, at the rate of that onset.",
    ]
    lines += tables.ending(notes, dataset)
    found = {name: {event: dataclasses.asdict(e) for event, e in events.items()} for name, events in found.items()}
    document = {"onsets": found, "statements": sentences, "attributes": tables.attributes(dataset)}
    write_texts(directory, "summary", lines, document)
    return sentences


def _interval(estimate: Estimate) -> str:
    return f" [{words.interval(estimate.low, estimate.high)}]" if estimate.low is not None else ""
