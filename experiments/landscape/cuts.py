"""Cuts through a loss landscape that moves: the loss along the leading eigenvectors of its Hessian, at some steps.

All lengths are in units of the norm of a network's parameters, and the directions are not rescaled layer by layer
("filter-free"): what a cut shows of the curvature is the eigenvalue. Both are choices of ours.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import xarray as xr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from eqx_dynloss import ensemble, landscape, train
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.train import Dataset, TrainState

from ..problems import spiral
from ..running import signals
from ..running.task import Observe, Task
from ..running.wave import any_host

ORDER = 60  # Lanczos products
RISE = 0.1  # nats above its lowest point, where the width of a valley is measured (ours)
_AT_ONCE = 50  # networks that are evaluated side by side
DIMS: dict[str, tuple[str, ...]] = {
    "parameters": ("parameter",),
    "eigenvalue": ("direction",),
    "eigenvalue_error": ("direction",),
    "slope": ("direction",),
    "loss_along": ("distance",),
    "loss_in_plane": ("second", "distance_in_plane"),
    "trajectory": ("update", "direction"),
    "moved": ("update",),
}
"""The dimensions, besides member and step, of what `parameters` and `look` give."""


def parameters(state: TrainState, loss: DynamicalLoss, data: Dataset) -> dict[str, Array]:
    """Observes the parameters, flat."""
    return {"parameters": ravel_pytree(state.model)[0]}


def look(distances: Float[np.ndarray, " distances"], in_plane: Float[np.ndarray, " side"], following: int) -> Observe:
    """Observes the landscape of the loss with the step's class weights, on all data, around the present parameters θ.

    With the two leading eigenvectors v₁, v₂ of the Hessian, by `DIMS`: `loss_here`; their `eigenvalue` and its
    error; the `slope` of the loss along them, per ‖θ‖; `norm`, ‖θ‖; `loss_along`, at θ + d‖θ‖v₁; `loss_in_plane`, at
    θ + ‖θ‖(d₁v₁ + d₂v₂); and of as many updates as are `following`, while the loss goes on changing, the `trajectory`
    in the plane, from 0 on, and how far the network has `moved` in all directions, both per ‖θ‖; and `share_in_plane`,
    how much of the squared lengths of these updates lies in the plane. Of an eigenvector and its
    negative, the one towards which the loss is lower at the end of the cut is taken.
    """
    line = jnp.stack([jnp.asarray(distances), jnp.zeros(len(distances))], 1)
    plane = jnp.stack(jnp.meshgrid(jnp.asarray(in_plane), jnp.asarray(in_plane)), -1)  # [second, first, 2]

    def observe(state: TrainState, loss: DynamicalLoss, data: Dataset) -> dict[str, Array]:
        flat, unravel = ravel_pytree(state.model)
        norm, objective = jnp.linalg.norm(flat), spiral.objective(state, loss, data)
        key = jr.fold_in(state.key, state.step)
        spectrum = landscape.hessian_spectrum(objective, state.model, order=ORDER, vectors=2, key=key)
        far = jnp.asarray(distances[-1])
        ends = jax.vmap(lambda v: objective(unravel(flat - far * norm * v)) < objective(unravel(flat + far * norm * v)))
        directions = spectrum.vectors[::-1]
        directions *= jnp.where(ends(directions), -1.0, 1.0)[:, None]
        value, gradient = jax.value_and_grad(lambda p: objective(unravel(p)))(flat)

        def at(places: Float[Array, "*shape 2"]) -> Float[Array, "*shape"]:
            one = lambda place: objective(unravel(flat + norm * place @ directions))
            return jax.lax.map(one, places.reshape(-1, 2), batch_size=_AT_ONCE).reshape(places.shape[:-1])

        # Seen before each update: one more than are followed.
        whereabouts = lambda state, loss, data: (ravel_pytree(state.model)[0] - flat) / norm
        path = train.train_chunk(
            state, loss, spiral.OPTIMISER, data, num_steps=following + 1, observe=whereabouts, observe_every=1
        )[2]
        updates = jnp.diff(path, axis=0)
        return {
            "loss_here": value,
            "eigenvalue": spectrum.eigenvalues[-2:][::-1],
            "eigenvalue_error": spectrum.errors[-2:][::-1],
            "slope": norm * directions @ gradient,
            "norm": norm,
            "loss_along": at(line),
            "loss_in_plane": at(plane),
            "trajectory": path @ directions.T,
            "moved": jnp.linalg.norm(path, axis=1),
            "share_in_plane": jnp.sum((updates @ directions.T) ** 2) / jnp.sum(updates**2),
        }

    return observe


def take(
    task: Task, measured: xr.Dataset, steps: Sequence[int], extent: float, following: int, tell: Callable[[str], None]
) -> xr.Dataset:
    """The landscapes of all members at some steps, where their `parameters` were observed.

    **Arguments:**

    - `task`, `measured`: who was trained, and what `train` gave for it.
    - `extent`: how far the cuts go, in units of the norm of the parameters.
    - `following`: how many updates of the trajectory to follow.
    - `tell`: told which landscapes are done.

    **Returns:** `measured` at these steps, and what `look` describes, by member. **Raises:** `KeyboardInterrupt` before
    the step that comes after a signal.
    """
    distances, in_plane = np.linspace(-extent, extent, 81), np.linspace(-extent, extent, 31)
    observe = look(distances, in_plane, following)
    measured, found = measured.sel(observation_step=list(steps)), []
    with signals.first_signal(lambda name: tell(f"{name}: stopping after this step.")) as stop:
        for step in steps:
            if any_host(stop.is_set()):
                raise KeyboardInterrupt
            members = task.members.with_parameters(measured.parameters.sel(observation_step=step).values).padded()
            states = members.init()
            states = eqx.tree_at(lambda s: s.step, states, jnp.full_like(states.step, step))
            data = ensemble.replicate(task.data, states)
            seen = ensemble.gather(ensemble.observe(states, members.losses, data, observe))
            whole = xr.Dataset({name: (("member", *DIMS.get(name, ())), values) for name, values in seen.items()})
            found.append(whole.isel(member=slice(len(task.members))))
            tell(f"landscapes at step {step:,} of {steps[-1]:,}")
    cuts = xr.concat(found, "observation_step").assign_coords(
        distance=distances,
        distance_in_plane=in_plane,
        second=in_plane,
        direction=[1, 2],
        update=np.arange(following + 1),
    )
    return measured.merge(cuts.assign_coords(observation_step=list(steps)), join="exact")


def parabola(members: xr.Dataset) -> xr.DataArray:
    """What the slope and the largest eigenvalue predict for `loss_along`."""
    d, first = members.distance * members.norm, members.sel(direction=1)
    return members.loss_here + first.slope * members.distance + first.eigenvalue * d**2 / 2


def lowest(members: xr.Dataset) -> xr.DataArray:
    """The lowest loss along the leading eigenvector: how deep the valley is, nats."""
    return members.loss_along.min("distance")


def valley_width(members: xr.Dataset) -> xr.DataArray:
    """How far apart the two places are, to either side of the lowest one along the leading eigenvector, at which the
    loss is first 0.1 nats above it, interpolated; in units of the norm of the parameters. NaN where that is not to be
    seen in the cut."""
    width = lambda loss: _width(members.distance.values, loss)
    return xr.apply_ufunc(width, members.loss_along, input_core_dims=[["distance"]], vectorize=True)


def _width(distance: np.ndarray, loss: np.ndarray) -> float:
    if not np.isfinite(loss).all():
        return np.nan
    middle, height = int(loss.argmin()), loss.min() + RISE
    ends = []
    for side in (slice(middle, None), slice(middle, None, -1)):
        above = np.flatnonzero(loss[side] > height)
        if not above.size:
            return np.nan
        last = above[0]
        ends.append(np.interp(height, loss[side][last - 1 : last + 1], distance[side][last - 1 : last + 1]))
    return float(ends[0] - ends[1])
