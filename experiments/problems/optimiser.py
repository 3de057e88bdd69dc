"""The paper's optimiser for CIFAR-10: Nesterov momentum and a rate that rises and falls, or that oscillates as well."""

import equinox as eqx
import jax
import numpy as np
import optax

from .oscillation import OscillatingRate


def nesterov(learning_rate: float, momentum: float, num_steps: int) -> optax.GradientTransformation:
    """The paper's optimiser, whose rate follows `rise_and_fall` up to the given peak.

    The peak and the momentum are injected hyperparameters, so that members may differ in them.
    """
    shape = rise_and_fall(num_steps)

    def make(learning_rate, momentum):
        return optax.sgd(lambda count: learning_rate * shape(count), momentum, nesterov=True)

    return optax.inject_hyperparams(make)(learning_rate=learning_rate, momentum=momentum)


def oscillating_nesterov(
    learning_rate: float, momentum: float, num_steps: int, rate: OscillatingRate
) -> tuple[optax.GradientTransformation, dict[str, np.ndarray]]:
    """`nesterov` with a learning rate that oscillates as well, and the hyperparameters of the members, whose amplitudes
    and periods are those of `rate`, `[members]`."""
    shape, like = rise_and_fall(num_steps), jax.tree.map(lambda leaf: leaf[0], rate)
    leaves = lambda rate: (rate.schedule.amplitude, rate.schedule.period, rate.mean)

    def make(learning_rate, momentum, amplitude, period, mean):
        own = eqx.tree_at(leaves, like, (amplitude, period, mean))
        return optax.sgd(lambda count: learning_rate * shape(count) * own(count)[0], momentum, nesterov=True)

    names = ("amplitude", "period", "mean")
    one = dict(zip(names, map(float, leaves(like)), strict=True))
    optimiser = optax.inject_hyperparams(make)(learning_rate=learning_rate, momentum=momentum, **one)
    return optimiser, dict(zip(names, map(np.asarray, leaves(rate)), strict=True))


def rise_and_fall(num_steps: int) -> optax.Schedule:
    """The paper's learning rate, relative to its peak: from 0 to 1 at 3/7 of the steps, and to a tenth at the end."""
    rise = round(num_steps * 3 / 7)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, rise), optax.linear_schedule(1.0, 0.1, num_steps - rise)], [rise]
    )
