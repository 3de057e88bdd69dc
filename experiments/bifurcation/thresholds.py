"""At which learning rates a network with a frozen loss has a loss of period 2, of period 4, of none, or diverges."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from eqx_dynloss import landscape

from ..results import words
from ..results.estimate import CONFIDENCE, Estimate
from ..results.files import write_texts
from ..results.tables import plain

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
    found: dict[str, dict[str, Estimate]] = {}
    for name, part in dataset.groupby("frozen", squeeze=False):
        part = part.squeeze("frozen")
        seen = behaviour(part.final_loss.values, part.initial_loss.values)
        by_seed = {int(s): onset(part.multiple.values, row) for s, row in zip(part.seed, seen, strict=True)}
        begun = np.isfinite(part.initial_loss).any("multiple") & np.isfinite(part.hessian_max)
        trained = [seed for seed in by_seed if begun.sel(seed=seed)]
        found[str(name)] = {
            event: Estimate.of({s: by_seed[s][event] for s in trained if np.isfinite(by_seed[s][event])})
            for event in NAMES
        }
    return {name: found[name] for name in dataset.frozen.values.tolist()}


def ratio_at_onset(part: xr.Dataset) -> Estimate:
    """Of one frozen loss: η in units of 2/λ with the λ after the last update, at the lowest rate of period 2. Only of
    seeds that are still at the rate below, where the onset is seen."""
    seen, found = behaviour(part.final_loss.values, part.initial_loss.values), {}
    for k, seed in enumerate(part.seed.values.tolist()):
        (at,) = np.nonzero(seen[k] == 2)
        if at.size and at[0] > 0:
            here = part.isel(seed=k, multiple=at[0])
            ratio = float(here.multiple * here.final_hessian_max / here.hessian_max)
            found |= {seed: ratio} if np.isfinite(ratio) else {}
    return Estimate.of(found)


def write(dataset: xr.Dataset, directory: Path) -> list[str]:
    """Writes `summary.md` and `summary.json`, and returns what they say, in sentences."""
    found, count = onsets(dataset), dataset.sizes["seed"]
    rows, sentences = [], []
    if dataset.attrs["finished"] != "true":
        done = dataset.attrs["steps_done"]
        sentences.append(f"INTERRUPTED after {done:,} updates: these are numbers of an unfinished sweep.")
    for name, events in found.items():
        largest = dataset.hessian_max.sel(frozen=name).values
        edge = Estimate.of({i: 2 / v for i, v in enumerate(largest) if np.isfinite(v)})
        edges = ratio_at_onset(dataset.sel(frozen=name))
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
    attrs: dict[str, Any] = {key: plain(value) for key, value in dataset.attrs.items()}
    made = [f"- {key.replace('_', ' ')}: `{value}`" for key, value in attrs.items()]
    lines += ["", *(f"- {note}" for note in notes), "", "## How it was made", "", *made]
    document = {n: {e: dataclasses.asdict(v) for e, v in events.items()} for n, events in found.items()}
    write_texts(directory, "summary", lines, {"onsets": document, "statements": sentences, "attributes": attrs})
    return sentences


def _interval(estimate: Estimate) -> str:
    return f" [{words.interval(estimate.low, estimate.high)}]" if estimate.low is not None else ""
