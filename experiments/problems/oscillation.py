"""What oscillates: the paper's class weights, and the controls that ask which part of the oscillation matters."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from eqx_dynloss.schedule import (
    AbstractSchedule,
    OscillatingWeights,
    RandomOrder,
    Step,
    cosine,
    square,
    triangle,
)

Oscillation = Literal["triangle", "cosine", "square", "random-order", "learning-rate"]
_WAVEFORMS = {"cosine": cosine, "square": square}


class OscillatingRate(AbstractSchedule):
    """Every class has the weight of the one whose turn it is, divided by that weight's mean over a turn.

    In gradient descent without momentum that is a static loss whose *learning rate* oscillates as the dynamical loss
    does, with the same mean: the weights, all alike, do not sum to the number of classes.
    """

    num_classes: int = eqx.field(static=True)
    schedule: OscillatingWeights
    mean: Float[Array, "..."]

    def __init__(self, schedule: OscillatingWeights):
        self.num_classes, self.schedule = schedule.num_classes, schedule

        def mean(amplitude: float, period: float) -> float:
            """Over the steps of a turn, as they are made."""
            steps = np.arange(int(period) + schedule.inclusive_period)
            peak = 1 + (amplitude - 1) * np.asarray(jax.vmap(schedule.waveform)(jnp.asarray(steps / period, float)))
            return float(np.mean(self.num_classes * peak / (peak + self.num_classes - 1)))

        pairs = zip(np.ravel(schedule.amplitude), np.ravel(schedule.period), strict=True)
        self.mean = jnp.asarray([mean(*pair) for pair in pairs], float).reshape(schedule.period.shape)

    def __call__(self, step: Step) -> Float[Array, " classes"]:
        active = jnp.max(self.schedule(step)) / self.mean
        over = jnp.asarray(step).astype(self.mean.dtype) >= self.schedule.stop
        return jnp.full(self.num_classes, jnp.where(over, 1.0, active))


def oscillating(
    oscillation: Oscillation, num_classes: int, amplitudes: np.ndarray, periods: np.ndarray, stop: np.ndarray,
    seeds: np.ndarray, *, inclusive_period: bool,
) -> AbstractSchedule:  # fmt: skip
    """The schedules of members, whose amplitudes, periods, stops and seeds are given, `[members]`, as one.

    `triangle` is the paper's, `cosine` and `square` have another waveform, `random-order` an order of the classes that
    is drawn anew for every pass, by the seed, and `learning-rate` is `OscillatingRate`.
    """
    waveform = _WAVEFORMS.get(oscillation, triangle)
    schedule = OscillatingWeights(
        num_classes, amplitudes, periods, stop=stop, waveform=waveform, inclusive_period=inclusive_period
    )
    if oscillation == "random-order":
        return RandomOrder(schedule, jax.vmap(lambda seed: jr.fold_in(jr.key(2), seed))(jnp.asarray(seeds)))
    return OscillatingRate(schedule) if oscillation == "learning-rate" else schedule
