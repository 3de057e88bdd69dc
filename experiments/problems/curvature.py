"""The curvature of the loss on images: the largest eigenvalue of its Hessian, as an observation of a training."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from eqx_dynloss import landscape
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.schedule import OscillatingWeights, RandomOrder
from eqx_dynloss.train import Dataset, TrainState

from ..running.task import Observe

_BLOCK = 100  # images whose Hessian-vector product is computed at a time


def of_step(num_images: int) -> Observe:
    """Observes the loss with the step's class weights, as `hessian_max`: see `_largest`."""

    def observe(state: TrainState, loss: DynamicalLoss, data: Dataset) -> dict[str, Array]:
        key = jr.fold_in(state.key, state.step)
        found = _largest(state, loss, data, loss.schedule(state.step), num_images, key)
        return {"hessian_max": found[0], "hessian_max_error": found[1]}

    return observe


def at_peak_and_static(num_images: int) -> Observe:
    """Observes the loss with a class's weight at its peak, as `peak_hessian_max`, and the static loss at the same
    parameters, as `static_hessian_max`: see `_largest`.

    The step's own weights would not do: a run is evaluated after whole epochs, and where these are whole periods too,
    all weights are then 1. The class is drawn anew for every evaluation and seed, and is the same for all losses.
    """

    def observe(state: TrainState, loss: DynamicalLoss, data: Dataset) -> dict[str, Array]:
        drawn, key = jr.split(jr.fold_in(state.key, state.step))
        schedule = loss.schedule
        turns = schedule.schedule if isinstance(schedule, RandomOrder) else schedule
        assert isinstance(turns, OscillatingWeights)
        weights = {"peak": schedule(_peak(turns, state.step, drawn)), "static": jnp.ones(schedule.num_classes)}
        found = {name: _largest(state, loss, data, w, num_images, key) for name, w in weights.items()}
        return {f"{name}_hessian_max": value for name, (value, _) in found.items()} | {
            f"{name}_hessian_max_error": error for name, (_, error) in found.items()
        }

    return observe


def _peak(schedule: OscillatingWeights, step: Array, key: Key[Array, ""]) -> Float[Array, ""]:
    """A step at which one of the classes that have a whole turn is at its peak; the given one if all turns are over."""
    now, turns = step.astype(schedule.stop.dtype), jnp.clip(schedule.stop // schedule.period, 1.0, schedule.num_classes)
    turn = jr.randint(key, (), 0, turns.astype(int)).astype(now.dtype)
    return jnp.where(now < schedule.stop, (turn + 0.5) * schedule.period, now)


def _largest(
    state: TrainState,
    loss: DynamicalLoss,
    data: Dataset,
    weights: Float[Array, " classes"],
    num_images: int,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The largest Hessian eigenvalue of the loss with these class weights, and its Ritz residual, from ten Lanczos
    products on the first so many training images (beyond a hundred on whole hundreds), or on all if there are fewer."""
    count = min(num_images, len(data))
    block = min(count, _BLOCK)
    blocks = lambda a: a[: count // block * block].reshape(-1, block, *a.shape[1:])

    def objective(model, batch):
        images, labels = batch
        return jnp.mean(loss.base(jax.vmap(lambda image: model(data.transform(image)))(images), labels, weights))

    batches = blocks(data.inputs), blocks(data.labels)
    spectrum = landscape.hessian_spectrum(objective, state.model, batches, order=10, key=key)
    return spectrum.eigenvalues[-1], spectrum.errors[-1]
