"""The dynamical loss: class weights and options that change with the step."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqx_dynloss import ensemble, train
from eqx_dynloss.loss import (
    DynamicalLoss,
    softmax_cross_entropy,
    softmax_cross_entropy_with_soft_labels,
    squared_error,
)
from eqx_dynloss.models import MLP
from eqx_dynloss.schedule import OscillatingWeights, UntilStep

from .helpers import tree_allclose
from .test_loss import problem, squared_by_hand

SCHEDULE = OscillatingWeights(3, 70.0, 10, stop=100)


@pytest.mark.parametrize("step", [0, 3, 5, 14, 27, 100])
def test_dynamical_loss_is_the_mean_of_weighted_cross_entropies(step, x64):
    x, y, _, _ = problem((30,), 3)
    schedule = OscillatingWeights(3, 70.0, 10, stop=100)
    t, active = step % 10, step // 10 % 3
    raw = np.ones(3)
    raw[active] = 1 + 69 * (2 * t / 10 if t < 5 else 2 - 2 * t / 10)
    gamma = np.ones(3) if step >= 100 else 3 * raw / raw.sum()
    expected = np.mean(gamma[y] * np.asarray(optax.softmax_cross_entropy_with_integer_labels(x, y)))
    loss = DynamicalLoss(schedule)
    for value in (
        loss(x, y, step),
        eqx.filter_jit(loss)(x, y, jnp.asarray(step)),
        loss(x, y, jnp.asarray(step, "uint8")),
    ):
        assert tree_allclose(value, expected, same_dtype=False)


def test_amplitude_one_is_plain_cross_entropy():
    x, y, _, _ = problem((30,), 3)
    plain = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, y))
    for step in (0, 3, 5, 10**6):
        assert tree_allclose(DynamicalLoss(OscillatingWeights(3, 1.0, 10))(x, y, step), plain, rtol=1e-6, atol=0)


def test_gradient_of_the_dynamical_loss_in_its_schedule(x64):
    x, y, _, _ = problem((30,), 3)
    loss = DynamicalLoss(UntilStep(OscillatingWeights(3, 70.0, 10.0), 100.0))
    f = jax.jit(lambda loss: loss(x, y, 13))
    gradient, h = jax.grad(f)(loss), 1e-5
    for name in ("amplitude", "period", "phase"):
        where = lambda l, name=name: getattr(l.schedule.schedule, name)
        up, down = (f(eqx.tree_at(where, loss, where(loss) + d)) for d in (h, -h))
        np.testing.assert_allclose(where(gradient), (up - down) / (2 * h), rtol=1e-5)
    by_amplitude = lambda a: f(eqx.tree_at(lambda l: l.schedule.schedule.amplitude, loss, a))
    hessian = jax.jit(jax.hessian(by_amplitude))(jnp.array(70.0))
    assert np.isfinite(hessian) and hessian != 0


def test_a_batch_of_dynamical_losses():
    x, y, _, _ = problem((30,), 3)
    amplitudes, periods = jnp.array([1.0, 2.0, 70.0]), jnp.array([10.0, 7.0, 5.0])
    losses = DynamicalLoss(OscillatingWeights(3, amplitudes, periods, stop=jnp.full(3, 50), phase=jnp.zeros(3)))
    values = jax.jit(jax.vmap(lambda loss, x, step: jax.value_and_grad(loss)(x, y, step), (0, None, None)))(
        losses, x, 13
    )
    for i in range(3):
        alone = DynamicalLoss(OscillatingWeights(3, amplitudes[i], periods[i], stop=50))
        assert tree_allclose(
            jax.tree.leaves(jax.tree.map(lambda a, i=i: a[i], values)),
            jax.tree.leaves(jax.value_and_grad(alone)(x, y, 13)),
        )


def test_dynamical_loss_inside_a_scan():
    x, y, _, _ = problem((30,), 3)
    loss = DynamicalLoss(SCHEDULE)

    def body(x, step):
        value, gradient = jax.value_and_grad(loss.__call__)(x, y, step)
        return x - gradient, value

    _, values = jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(20)))(x)
    for step in range(20):
        value, gradient = jax.value_and_grad(loss.__call__)(x, y, step)
        assert tree_allclose(values[step], value)
        x = x - gradient


def test_other_base_losses():
    x, y, soft, _ = problem((30,), 3)
    smoothed = ft.partial(softmax_cross_entropy, label_smoothing=0.1)
    value = DynamicalLoss(SCHEDULE, smoothed)(x, y, 5)
    assert tree_allclose(value, jnp.mean(softmax_cross_entropy(x, y, SCHEDULE(5), label_smoothing=0.1)))
    value = DynamicalLoss(SCHEDULE, softmax_cross_entropy_with_soft_labels)(x, soft, 5)
    assert tree_allclose(value, jnp.mean(softmax_cross_entropy_with_soft_labels(x, soft, SCHEDULE(5))))


def test_dynamical_squared_errors_are_compiled_once():
    x, y, _, _ = problem((30,), 3)
    traces = []

    @eqx.filter_jit
    def run(loss, step):
        traces.append(loss.base)
        return loss(x, y, step)

    bases = {"sample": squared_error, "unit": ft.partial(squared_error, weighting="unit")}
    for weighting, base in bases.items():
        for step in (3, 5, 14):
            value = run(DynamicalLoss(SCHEDULE, base), jnp.asarray(step))
            expected, _, _ = squared_by_hand(x, y, SCHEDULE(step), weighting)
            assert tree_allclose(value, expected.mean(), same_dtype=False)
    assert traces == list(bases.values())


def test_leaves_of_a_dynamical_loss_are_those_of_its_schedule():
    assert tree_allclose(jax.tree.leaves(DynamicalLoss(SCHEDULE)), jax.tree.leaves(SCHEDULE))


# Options of the base loss that are schedules, too.


class Decay(eqx.Module):
    """An option with hyperparameters that may differ between members."""

    start: jax.Array
    rate: jax.Array

    def __call__(self, step):
        return self.start * jnp.exp(-self.rate * jnp.asarray(step).astype(float))


OPTIONS = {
    "a number": (0.1, lambda step: 0.1),
    "an array": (jnp.array(0.1), lambda step: 0.1),
    "NumPy": (np.float64(0.1), lambda step: 0.1),
    "optax's schedule": (optax.linear_schedule(0.2, 0.0, 10), lambda step: max(0.0, 0.2 - 0.02 * step)),
    "a function": (lambda step: 1 / (step + 2), lambda step: 1 / (step + 2)),
    "a module": (Decay(jnp.array(0.5), jnp.array(0.1)), lambda step: 0.5 * np.exp(-0.1 * step)),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_an_option_may_be_a_schedule(kind, name):
    x, y, _, _ = problem((30,), 3)
    option, by_hand = OPTIONS[kind]
    loss = DynamicalLoss(SCHEDULE, **{name: option})
    for step in (0, 3, 7, 200):
        values: dict[str, Any] = {name: float(by_hand(step))}
        expected = jnp.mean(softmax_cross_entropy(x, y, SCHEDULE(step), **values))
        for value in (
            loss(x, y, step),
            eqx.filter_jit(loss)(x, y, jnp.asarray(step)),
            jax.jit(lambda loss, step: loss(x, y, step))(loss, step),
        ):
            assert tree_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_only_arrays_are_leaves_and_the_rest_is_static():
    options = {"label_smoothing": Decay(jnp.array(0.5), jnp.array(0.1)), "z_loss": 0.1}
    loss = DynamicalLoss(SCHEDULE, **options)
    assert tree_allclose(jax.tree.leaves(loss), [*jax.tree.leaves(SCHEDULE), jnp.array(0.5), jnp.array(0.1)])
    structure = jax.tree.structure
    assert structure(loss) == structure(DynamicalLoss(SCHEDULE, **options)) != structure(DynamicalLoss(SCHEDULE))
    unit = DynamicalLoss(SCHEDULE, squared_error, weighting="unit")
    assert jax.tree.structure(unit) != jax.tree.structure(DynamicalLoss(SCHEDULE, squared_error))
    x, y, _, _ = problem((30,), 3)
    assert tree_allclose(unit(x, y, 3), jnp.mean(squared_error(x, y, SCHEDULE(3), weighting="unit")))


def test_derivatives_in_the_hyperparameters_of_an_option(x64):
    x, y, _, _ = problem((30,), 3)
    loss, h = DynamicalLoss(SCHEDULE, label_smoothing=Decay(jnp.array(0.5), jnp.array(0.1))), 1e-6
    gradient = jax.jit(jax.grad(lambda loss: loss(x, y, 4)))(loss)
    for name in ("start", "rate"):
        where = lambda loss, name=name: getattr(loss.options["label_smoothing"], name)
        up, down = (eqx.tree_at(where, loss, where(loss) + d)(x, y, 4) for d in (h, -h))
        np.testing.assert_allclose(where(gradient), (up - down) / (2 * h), rtol=1e-6)


def test_an_option_that_the_loss_does_not_have_is_named():
    x, y, _, _ = problem((30,), 3)
    with pytest.raises(TypeError, match="label_smooting"):
        DynamicalLoss(SCHEDULE, label_smooting=0.1)(x, y, 0)


def test_members_of_an_ensemble_may_differ_in_an_option():
    x, y, _, _ = problem((30,), 3)
    starts, z = jnp.array([0.0, 0.5, 0.9]), jnp.array([0.0, 0.1, 0.01])
    schedules = OscillatingWeights(3, jnp.full(3, 5.0), jnp.full(3, 4.0))
    losses = DynamicalLoss(schedules, label_smoothing=Decay(starts, jnp.full(3, 0.1)), z_loss=z)
    make, optimiser, keys = lambda key: MLP(3, 8, 3, key=key), optax.sgd(0.5), jr.split(jr.key(0), 3)
    states = ensemble.init(make, optimiser, keys)
    data = train.Dataset(x, y)
    _, metrics, *_ = ensemble.train_chunk(states, losses, optimiser, ensemble.replicate(data, states), num_steps=12)
    for i, key in enumerate(keys):
        alone = DynamicalLoss(
            OscillatingWeights(3, 5.0, 4.0), label_smoothing=Decay(starts[i], jnp.array(0.1)), z_loss=z[i]
        )
        state = train.init(make, optimiser, key)
        _, expected, _ = train.train_chunk(state, alone, optimiser, data, num_steps=12)
        assert tree_allclose(metrics.loss[i], expected.loss)
    assert np.ptp(metrics.loss[:, 0]) > 0.01


def test_numpy_arrays_and_steps_of_any_kind():
    x, y, _, _ = problem((30,), 3)
    loss = DynamicalLoss(SCHEDULE)
    for arrays in ((np.asarray(x), np.asarray(y)), (np.asarray(x, np.float64), np.asarray(y, np.int64))):
        for step in (5, np.int64(5), np.float32(5), np.asarray(5), jnp.asarray(5)):
            assert tree_allclose(loss(*arrays, step), loss(x, y, 5))
