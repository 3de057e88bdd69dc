"""The spiral problem: the data, the networks, their losses, and what is measured of them, for every command on it."""

import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from jaxtyping import Array, Float, Key

from eqx_dynloss import landscape
from eqx_dynloss.loss import BaseLoss, DynamicalLoss, softmax_cross_entropy, squared_error
from eqx_dynloss.models import MLP
from eqx_dynloss.train import Dataset, TrainState

from ..results.labelled import combinations, unfold, with_loss_function
from ..running.devices import devices
from ..running.members import Members
from ..running.task import Plan, Task, chunk_length
from .oscillation import Oscillation, oscillating

CLASSES = ("class 0", "class 1", "class 2")
NTK_POINTS = 50  # the kernel is that of the first 50 training points, as in the paper's figure
Init = Literal["paper", "glorot", "none"]
LossName = Literal["cross-entropy", "squared-sample", "squared-unit"]
LOSSES: dict[LossName, BaseLoss] = {
    "cross-entropy": softmax_cross_entropy,
    "squared-sample": ft.partial(squared_error, weighting="sample"),
    "squared-unit": ft.partial(squared_error, weighting="unit"),
}
OPTIMISER = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)  # whose rate every member has of its own


def spiral(noise_seed: int) -> Dataset:
    """Three arms of 100 points, `[300, 2]`, arm by arm. Noise seed 0 is the authors' training set.

    Radii from 0 to 1, two turns, noise N(0, 0.2²) on the angle from NumPy's legacy generator. The arms share the
    origin: at most 298 of the 300 points can be classified. The validation set is noise seed 1, a choice of ours.
    """
    rng = np.random.RandomState(noise_seed)
    radius = np.linspace(0.0, 1, 100)
    starts = [2 * np.pi * j / 3 for j in range(3)]
    angles = [np.linspace(start, start + 4 * np.pi, 100) + 0.2 * rng.randn(100) for start in starts]
    points = np.concatenate([np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) for angle in angles])
    return Dataset(jnp.asarray(points, float), jnp.repeat(jnp.arange(3), 100))


def members(
    init: Init,
    width: int,
    updates: int,
    *,
    amplitudes: Sequence[float],
    periods: Sequence[float],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    loss: LossName,
    oscillation: Oscillation | None = None,
    inclusive_period: bool = True,
    name_loss: bool = False,
) -> Members:
    """All networks of one initialisation and width: every learning rate with every loss and seed.

    Without an `oscillation` it is the paper's, and no coordinate of the members. The loss function is one if
    `name_loss` says so, as where a run has several.

    The oscillation stops after the last whole period, of T + 1 updates as the authors count or, without an
    `inclusive_period`, of T. The paper's figure does so; for other periods it is our rule. Where not one period fits,
    it does not stop.
    """
    settings: dict[str, Sequence[Any]] = {"loss_function": [loss]} if name_loss else {}
    settings |= {"init": [init], "width": [width], "learning_rate": learning_rates}
    settings |= {"oscillation": [oscillation]} if oscillation else {}
    coordinates = combinations(amplitudes, periods, seeds, **settings)
    turns = np.nan_to_num(coordinates["period"], nan=1.0)  # the static loss has none
    length = turns + inclusive_period
    whole = updates // length * length
    stop = np.where(whole > 0, whole, np.inf)
    schedules = oscillating(
        oscillation or "triangle",
        len(CLASSES),
        coordinates["amplitude"],
        turns,
        stop,
        coordinates["seed"],
        inclusive_period=inclusive_period,
    )
    return Members(
        make_model=ft.partial(network, init, width),
        optimiser=OPTIMISER,
        losses=DynamicalLoss(schedules, LOSSES[loss]),
        coordinates=coordinates,
        hyperparams={"learning_rate": coordinates["learning_rate"]},
    )


def tasks(
    programs: Mapping[str, Mapping[str, Any]],
    updates: int,
    evaluations: int,
    plan: Mapping[str, Any],
    **who: Any,
) -> list[Task]:
    """A task for each program, by name, with what `members` takes: that of its own, and `who`, that of all.

    `plan` is what the plan has besides, such as observations. Chunks take two seconds or less, and are as long for all
    networks, or they would be evaluated at different updates.
    """
    trained = {name: members(updates=updates, **own, **who) for name, own in programs.items()}
    every = plan.get("observe_every") or 1
    pace = {
        name: len(trained[name]) * cpu_seconds_per_update(own["width"], plan.get("observe_every"))
        for name, own in programs.items()
    }
    target = min(2 / max(pace.values()), updates / evaluations)
    whole = Plan(updates, every * chunk_length(updates // every, target / every), evaluations, **plan)
    data = {"train": spiral(0), "validation": spiral(1)}
    return [Task(name, trained[name], data["train"], data, whole) for name in programs]


def network(init: Init, width: int, key: Key[Array, ""]) -> MLP:
    """The paper's network: one hidden layer."""
    weights: Literal["paper", "glorot"] = "glorot" if init == "glorot" else "paper"
    return MLP(2, width, 3, init=weights, use_bias=init != "none", key=key)


def num_parameters(init: Init, width: int) -> int:
    """The number of trained parameters of that network: 6 width + 3, of which width + 3 are biases."""
    model = eqx.filter_eval_shape(network, init, width, jr.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def objective(state: TrainState, loss: DynamicalLoss, data: Dataset) -> Callable[[MLP], Float[Array, ""]]:
    """What gradient descent minimises at the state's step, on all data, as a function of the network."""
    return lambda model: loss(jax.vmap(model)(data.inputs), data.labels, state.step)


def curvature(state, loss, data) -> dict[str, jax.Array]:
    """Extreme eigenvalues at the state: of the Hessian of the loss with the step's class weights, on all data, and of
    the neural tangent kernel of the first 50 points. Ten Lanczos products each, as in the paper for the Hessian."""
    _, ntk_key = jr.split(jr.fold_in(state.key, state.step))
    ntk = landscape.ntk_spectrum(state.model, data.inputs[:NTK_POINTS], order=10, key=ntk_key)
    return sharpness(state, loss, data) | {"ntk_max": ntk.eigenvalues[-1], "ntk_max_error": ntk.errors[-1]}


def sharpness(state, loss, data) -> dict[str, jax.Array]:
    """Of `curvature`, the extreme eigenvalues of the Hessian: `[]` each."""
    hessian_key, _ = jr.split(jr.fold_in(state.key, state.step))
    hessian = landscape.hessian_spectrum(objective(state, loss, data), state.model, order=10, key=hessian_key)
    return {
        "hessian_max": hessian.eigenvalues[-1],
        "hessian_max_error": hessian.errors[-1],
        "hessian_min": hessian.eigenvalues[0],
        "hessian_min_error": hessian.errors[0],
    }


def results(tasks: Sequence[Task], measured: xr.Dataset, periods: Sequence[float], *losses: LossName) -> xr.Dataset:
    """What `train` gave for some tasks, with named dimensions and what it says of the run."""
    planned = [task.plan.num_steps for task in tasks]
    weights = [task.members.class_weights(task.plan.num_steps) for task in tasks if task.plan.keep_steps]
    unfolded = unfold(
        measured,
        *([xr.concat(weights, "member")] if weights else []),
        periods=periods,
        classes=CLASSES,
        dataset="spiral",
        finished=measured.finished,
        device=devices(),
        steps_done=round(measured.steps_done),
        steps_planned=sum(planned),
        member_updates_per_second=measured.member_updates_per_second,
    )
    return with_loss_function(unfolded, *losses)


def cpu_seconds_per_update(width: int, observe_every: int | None) -> float:
    """About how long an update of a member takes on this CPU's cores; for the length of chunks.

    Fitted to widths 10 to 1000 on one core. An observation costs as much as some twenty updates.
    """
    update = 1.3e-5 + 1e-6 * width
    return update * (1 + (20 / observe_every if observe_every else 0)) / jax.device_count()
