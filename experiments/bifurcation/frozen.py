"""Networks that go on with a frozen loss: where they start, and at which learning rates."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.random as jr
import numpy as np
import xarray as xr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from eqx_dynloss import landscape
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.schedule import StaticWeights
from eqx_dynloss.train import Dataset, TrainState

from ..problems import spiral
from ..results.labelled import about, missing_values
from ..running.devices import devices
from ..running.members import Members
from ..running.task import Plan, Task, chunk_length

ORDER = 20  # Lanczos products for the largest eigenvalue
_ABOUT: dict[Hashable, dict[str, str]] = {
    "final_loss": {"units": "nats", "long_name": "frozen loss at the last updates"},
    "initial_loss": {"units": "nats", "long_name": "frozen loss before the first update"},
    "hessian_max": {"units": "1", "long_name": "largest Hessian eigenvalue λ of the frozen loss"},
    "final_hessian_max": {"units": "1", "long_name": "largest Hessian eigenvalue after the last update"},
    "frozen": {
        "units": "1",
        "long_name": "step of the period, in units of T, whose loss is frozen; or the static loss",
    },
    "multiple": {"units": "1", "long_name": "learning rate in units of 2/λ"},
    "update": {"units": "update", "long_name": "number of the update among the last ones"},
}


@dataclasses.dataclass(frozen=True)
class Start:
    """A network at the moment at which its loss is frozen."""

    name: str  # of the frozen loss
    seed: int
    weights: np.ndarray  # [classes]
    parameters: np.ndarray  # flat
    hessian_max: float  # of the frozen loss


def whereabouts(state: TrainState, loss: DynamicalLoss, data: Dataset) -> dict[str, Array]:
    """Observes the flat parameters, and the `curvature`."""
    return {"parameters": ravel_pytree(state.model)[0]} | curvature(state, loss, data)


def curvature(state: TrainState, loss: DynamicalLoss, data: Dataset) -> dict[str, Array]:
    """Observes the largest Hessian eigenvalue of the loss with the step's weights, on all data."""
    objective, key = spiral.objective(state, loss, data), jr.fold_in(state.key, state.step)
    spectrum = landscape.hessian_spectrum(objective, state.model, order=ORDER, key=key)
    return {"hessian_max": spectrum.eigenvalues[-1]}


def starts(task: Task, measured: xr.Dataset, steps: Sequence[int]) -> list[Start]:
    """Every seed's network of the static loss at the first step, and that of the dynamical one at all, each with the
    weights that its loss has there. Those that have diverged, or have no positive eigenvalue, are left out."""
    found = []
    for member in range(len(task.members)):
        own = {name: values[member] for name, values in task.members.coordinates.items()}
        static = own["amplitude"] == 1
        schedule = jax.tree.map(lambda leaf, i=member: leaf[i], task.members.losses.schedule)
        for step in steps[:1] if static else steps:
            seen = measured.isel(member=member).sel(observation_step=step)
            name = "static" if static else f"{step % own['period'] / own['period']:g} T"
            if np.isfinite(seen.hessian_max) and seen.hessian_max > 0:
                weights, flat = np.asarray(schedule(step)), seen.parameters.values
                found.append(Start(name, int(own["seed"]), weights, flat, float(seen.hessian_max)))
    return found


def sweep(
    task: Task, starts: Sequence[Start], rates: tuple[float, float], num_rates: int, updates: int, last: int
) -> Task:
    """One ensemble of all starts, each at every learning rate: so many multiples of 2/λ, evenly spaced."""
    multiples = np.round(np.linspace(*rates, num_rates), 6)
    which, multiple = (a.ravel() for a in np.meshgrid(range(len(starts)), multiples, indexing="ij"))
    each = [starts[int(i)] for i in which]
    of_start: Callable[[str], np.ndarray] = lambda name: np.array([getattr(start, name) for start in each])
    members = Members(
        make_model=task.members.make_model,
        optimiser=spiral.OPTIMISER,
        losses=DynamicalLoss(StaticWeights(of_start("weights")), task.members.losses.base),
        coordinates={"frozen": of_start("name"), "seed": of_start("seed"), "multiple": multiple},
        hyperparams={"learning_rate": multiple * 2 / of_start("hessian_max")},
    ).with_parameters(of_start("parameters"))
    plan = Plan(updates + last, chunk_length(updates + last, (updates + last) / 8), 1, observe=curvature)
    return Task("frozen", members, task.data, task.splits, plan)


def results(measured: xr.Dataset, starts: Sequence[Start], last: int, **settings: Any) -> xr.Dataset:
    """`final_loss`, `[frozen, seed, multiple, update]`, the loss at each of the last updates; `initial_loss` at the
    first one; the largest Hessian eigenvalue of the frozen loss at the start, `hessian_max`, `[frozen, seed]`, and
    after the last update, `final_hessian_max`, NaN in an interrupted run; and `diverged_at`. `settings` are those
    of all networks."""
    flat = xr.Dataset(
        {
            "final_loss": (("member", "update"), measured.minibatch_loss.values[:, -last:]),
            "initial_loss": measured.minibatch_loss.isel(step=0, drop=True),
            "diverged_at": measured.diverged_at,
            "final_hessian_max": measured["hessian_max"].isel(observation_step=-1, drop=True)
            if "hessian_max" in measured
            else xr.full_like(measured.diverged_at, np.nan, float),
        }
    )
    flat = flat.set_index(member=["frozen", "seed", "multiple"])
    whole = flat.unstack("member", fill_value=missing_values(flat))
    whole = whole.sel(frozen=list(dict.fromkeys(start.name for start in starts)))
    largest = xr.full_like(whole.initial_loss.isel(multiple=0, drop=True), np.nan)
    for start in starts:
        largest.loc[{"frozen": start.name, "seed": start.seed}] = start.hessian_max
    whole = whole.assign(hessian_max=largest).transpose("frozen", "seed", "multiple", "update")
    whole = whole.assign_coords(settings)
    for name in whole.variables:
        whole[name].attrs |= _ABOUT.get(name) or about(str(name))
    return whole.assign_attrs(
        dataset="spiral",
        finished=str(bool(measured.finished)).lower(),
        device=devices(),
        steps_done=round(measured.steps_done),
    )
