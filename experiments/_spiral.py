"""The spiral problem: the data, the networks, their losses, and what is measured of them, for every command on it."""

import functools as ft
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr

from eqx_dynloss import landscape
from eqx_dynloss.loss import BaseLoss, DynamicalLoss, softmax_cross_entropy, squared_error
from eqx_dynloss.models import MLP
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset

from . import _results, _run
from ._plan import Members
from ._record import History
from ._run import console

CLASSES = ("class 0", "class 1", "class 2")
NTK_POINTS = 50  # the kernel is that of the first 50 training points, as in the paper's figure
Init = Literal["paper", "glorot", "none"]
LossName = Literal["cross-entropy", "squared-sample", "squared-unit"]
LOSSES: dict[LossName, BaseLoss] = {
    "cross-entropy": softmax_cross_entropy,
    "squared-sample": ft.partial(squared_error, weighting="sample"),
    "squared-unit": ft.partial(squared_error, weighting="unit"),
}


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


def make_members(
    init: Init,
    width: int,
    schedules: OscillatingWeights,
    num_seeds: int,
    learning_rates: Sequence[float],
    loss: LossName,
) -> Members:
    """All networks of one initialisation and width, ordered by learning rate, then loss, then seed."""
    num_losses, num_rates = len(schedules.amplitude), len(learning_rates)
    weights: Literal["paper", "glorot"] = "glorot" if init == "glorot" else "paper"
    return Members(
        make_model=lambda key: MLP(2, width, 3, init=weights, use_bias=init != "none", key=key),
        optimiser=optax.inject_hyperparams(optax.sgd)(learning_rate=1.0),
        losses=DynamicalLoss(
            jax.tree.map(lambda leaf: jnp.tile(jnp.repeat(leaf, num_seeds), num_rates), schedules), LOSSES[loss]
        ),
        seeds=np.tile(np.arange(num_seeds), num_losses * num_rates),
        hyperparams={"learning_rate": np.repeat(np.asarray(learning_rates, float), num_losses * num_seeds)},
    )


def make_schedules(amplitudes: Sequence[float], periods: Sequence[float], updates: int) -> OscillatingWeights:
    """The schedules of all losses as one batch, in the order of `_results.conditions`: the static one first.

    They stop after the last whole period of T + 1 updates. The paper's figure does so; for other periods it is our
    rule. Where not one period fits, they do not stop.
    """
    pairs = [(A, T or 1) for A, T in _results.conditions(amplitudes, periods)]
    of_all, turns = np.array(pairs).T
    whole = updates // (turns + 1) * (turns + 1)
    stop = np.where(whole > 0, whole, np.inf)
    return OscillatingWeights(len(CLASSES), of_all, turns, stop=stop, inclusive_period=True)


def curvature(state, loss, data) -> dict[str, jax.Array]:
    """Extreme eigenvalues at the state: of the Hessian of the loss with the step's class weights, on all data, and of
    the neural tangent kernel of the first 50 points. Ten Lanczos products each, as in the paper for the Hessian."""

    def objective(model):
        return loss(jax.vmap(model)(data.inputs), data.labels, state.step)

    hessian_key, ntk_key = jr.split(jr.fold_in(state.key, state.step))
    hessian = landscape.hessian_spectrum(objective, state.model, order=10, key=hessian_key)
    ntk = landscape.ntk_spectrum(state.model, data.inputs[:NTK_POINTS], order=10, key=ntk_key)
    return {
        "hessian_max": hessian.eigenvalues[-1],
        "hessian_max_error": hessian.errors[-1],
        "hessian_min": hessian.eigenvalues[0],
        "hessian_min_error": hessian.errors[0],
        "ntk_max": ntk.eigenvalues[-1],
        "ntk_max_error": ntk.errors[-1],
    }


def train_networks(
    networks: Sequence[tuple[Init, int]], train_network: Callable[[Init, int], tuple[xr.Dataset, History]]
) -> xr.Dataset:
    """Calls a function for one initialisation and width after another, each of which is a program of its own, and gives
    what it returns dimensions `init` and `width`. Stops where the training was interrupted."""
    finished, steps_done, seconds = True, 0.0, 0.0
    parts: dict[str, list[xr.Dataset]] = {}
    for number, (init, width) in enumerate(networks):
        if len(networks) > 1:
            console.print(f"network {number + 1} of {len(networks)}: {init} initialisation, width {width}")
        try:
            part, history = train_network(init, width)
        except KeyboardInterrupt:  # before the first chunk of this network was over
            if not parts:
                raise
            finished = False
            break
        parts.setdefault(init, []).append(part.assign_coords(init=init, width=width))
        steps_done += history.progress
        seconds += history.progress / history.steps_per_second  # NaN if one was not measured
        if not history.finished or history.interrupted:
            finished = history.finished and number == len(networks) - 1
            break
    results = _join([_join(row, "width") for row in parts.values()], "init")
    return results.assign_attrs(
        dataset="spiral",
        finished=str(finished).lower(),
        device=_run.devices(),
        steps_done=round(steps_done),
        member_updates_per_second=steps_done / seconds if seconds else math.nan,
    )


def labelled(
    history: History,
    axes: Mapping[str, Any],
    learning_rates: Sequence[float],
    observation_steps: np.ndarray,
    observations: Mapping[str, np.ndarray],
    **more: Any,
) -> xr.Dataset:
    """What was measured of the members of `make_members`, with named dimensions, the first of them `learning_rate`.

    **Arguments:**

    - `axes`: the `amplitudes`, `periods` and `seeds`; they and `more` are as for `_results.assemble`.
    - `observation_steps`, `observations`: what was observed, and when, all members along the first axis.
    """
    arrays, size = history.arrays(), len(history.diverged_at) // len(learning_rates)
    rows = [slice(i * size, (i + 1) * size) for i in range(len(learning_rates))]
    parts = [
        _results.assemble(
            **axes,
            classes=CLASSES,
            **{name: value if name == "evaluation_steps" else value[row] for name, value in arrays.items()},
            observation_steps=observation_steps,
            observations={name: value[row] for name, value in observations.items()},
            attrs={},
            **more,
        ).assign_coords(learning_rate=rate)
        for row, rate in zip(rows, learning_rates, strict=True)
    ]
    return _join(parts, "learning_rate")


def _join(parts: list[xr.Dataset], dim: str) -> xr.Dataset:
    """Parts side by side along a new dimension; what some lack is NaN."""
    return xr.concat(parts, dim, join="outer", fill_value={"diverged_at": -1}, combine_attrs="override")


def cpu_seconds_per_update(width: int, curvature: int) -> float:
    """About how long an update of a member takes on this CPU's cores; for the announced time and the length of chunks.

    Fitted to widths 10 to 1000 on one core. An observation costs as much as some twenty updates.
    """
    update = 1.3e-5 + 1e-6 * width
    return update * (1 + (20 / curvature if curvature else 0)) / jax.device_count()
