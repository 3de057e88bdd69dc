"""The controls of the spiral: what of the oscillation they keep, and what they do not."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_dynloss.loss import DynamicalLoss
from experiments.problems.oscillation import oscillating

CLASSES, STEPS = 3, 400


def weights(oscillation, amplitudes=(7.0,), periods=(10.0,), stop=1e9, seeds=(0,), inclusive=True) -> np.ndarray:
    """`[members, steps, classes]`"""
    amplitude, period = np.array(amplitudes, float), np.array(periods, float)
    stops = np.full(len(amplitude), stop)
    schedule = oscillating(oscillation, CLASSES, amplitude, period, stops, np.array(seeds), inclusive_period=inclusive)
    return np.asarray(eqx.filter_vmap(lambda s: jax.vmap(s)(jnp.arange(STEPS)))(schedule))


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("period", [10.0, 7.0, 40.0])
def test_the_rate_follows_the_active_class_and_has_the_mean_of_the_static_one(period, inclusive, x64):
    (paper,), (control,) = (
        weights(name, periods=(period,), inclusive=inclusive) for name in ("triangle", "learning-rate")
    )
    assert (control == control[:, :1]).all()  # no class is favoured
    turn = int(period) + inclusive
    ratio = control[:, 0] / paper.max(1)
    np.testing.assert_allclose(ratio, ratio[0])
    np.testing.assert_allclose(control[: STEPS // turn * turn, 0].reshape(-1, turn).mean(1), 1.0)
    assert control.max() > 1.2 > 0.6 > control.min()


def test_the_rate_is_the_static_one_without_amplitude_and_when_all_is_over(x64):
    np.testing.assert_array_equal(weights("learning-rate", amplitudes=(1.0,)), 1.0)
    (control,) = weights("learning-rate", stop=110)
    np.testing.assert_array_equal(control[110:], 1.0)
    assert not np.allclose(control[:110], 1.0)


def test_an_oscillating_weight_of_all_classes_is_an_oscillating_learning_rate(x64):
    """Gradient descent on logits, with the control and by optax with that rate."""
    amplitude, period, labels = 7.0, 10.0, jnp.arange(12) % CLASSES
    own = np.array([amplitude]), np.array([period]), np.array([1e9]), np.array([0])
    schedule = jax.tree.map(lambda a: a[0], oscillating("learning-rate", CLASSES, *own, inclusive_period=True))
    loss = DynamicalLoss(schedule)
    start = jax.random.normal(jax.random.key(0), (12, CLASSES))
    (factor,) = weights("learning-rate", (amplitude,), (period,))
    peak = 1 + (amplitude - 1) * (1 - np.abs(2 * np.arange(11) / period - 1))
    active = CLASSES * peak / (peak + CLASSES - 1)
    np.testing.assert_allclose(factor[:11, 0], active / active.mean())

    found: Any = start
    expected: Any = start
    optimiser = optax.sgd(lambda count: 0.5 * jnp.asarray(factor)[count, 0])
    state = optimiser.init(expected)
    static = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    for step in range(50):
        found = found - 0.5 * jax.grad(loss)(found, labels, step)
        update, state = optimiser.update(jax.grad(static)(expected), state)
        expected = optax.apply_updates(expected, update)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_random_order_has_the_same_weights_for_other_classes():
    paper = weights("triangle", amplitudes=(7.0, 7.0), periods=(10.0, 10.0), seeds=(0, 1))
    shuffled = weights("random-order", amplitudes=(7.0, 7.0), periods=(10.0, 10.0), seeds=(0, 1))
    np.testing.assert_array_equal(np.sort(shuffled, -1), np.sort(paper, -1))
    assert not np.array_equal(shuffled[0], shuffled[1])  # by the seed
    again = weights("random-order", seeds=(1,))
    np.testing.assert_array_equal(again[0], shuffled[1])  # which decides it


@pytest.mark.parametrize("name", ["cosine", "square"])
def test_another_waveform_has_the_same_peak_and_the_same_turns(name):
    (paper,), (other,) = weights("triangle"), weights(name)
    np.testing.assert_allclose(paper.max(), other.max(), rtol=1e-6)
    both = (paper.max(1) > 1.01) & (other.max(1) > 1.01)
    np.testing.assert_array_equal(paper.argmax(1)[both], other.argmax(1)[both])
    assert not np.allclose(paper, other)
