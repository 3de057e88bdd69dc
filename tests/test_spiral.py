"""The paper's spiral (Figure 4): our trainer against the authors' update, and against the numbers of their figure."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from eqx_dynloss import ensemble, train
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import MLP
from eqx_dynloss.schedule import OscillatingWeights

pytestmark = pytest.mark.usefixtures("x64")
OPTIMISER = optax.sgd(1.0)


def spiral():
    """Three classes of 100 points, noise from NumPy's legacy generator with seed 0, drawn class by class."""
    rng = np.random.RandomState(0)
    radius = np.linspace(0.0, 1, 100)
    arms = []
    for j in range(3):
        angle = np.linspace(2 * np.pi * j / 3, 2 * np.pi * j / 3 + 4 * np.pi, 100) + 0.2 * rng.randn(100)
        arms.append(np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1))
    return np.concatenate(arms), np.repeat(np.arange(3), 100)


def make_mlp(key):
    return MLP(2, 100, 3, key=key)


def authors_run(weights, points, labels, amplitude, period, num_periods):
    """The authors' loop in NumPy: classes in turn, t = 0, …, T inclusive, one gradient step of rate 1 each."""
    w1, b1, w2, b2 = (np.array(w) for w in weights)
    onehot = np.eye(3)[labels]
    record = []
    for k in range(num_periods):
        for t in range(period + 1):
            g = np.ones(3)
            if t < period / 2:
                g[k % 3] = 1 + 2 * (amplitude - 1) * t / period
            else:
                g[k % 3] = 2 * amplitude - 1 - 2 * (amplitude - 1) * t / period
            gamma = 3 * g / g.sum()

            hidden = points @ w1.T + b1
            active = np.maximum(hidden, 0)
            logits = active @ w2.T + b2
            shifted = logits - logits.max(1, keepdims=True)
            log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
            f = np.mean(gamma[labels] * -log_p[np.arange(len(labels)), labels])
            record.append((f, np.mean(logits.argmax(1) == labels), *gamma))

            d_logits = gamma[labels][:, None] * (np.exp(log_p) - onehot) / len(labels)
            d_hidden = d_logits @ w2 * (hidden > 0)
            w2, b2 = w2 - d_logits.T @ active, b2 - d_logits.sum(0)
            w1, b1 = w1 - d_hidden.T @ points, b1 - d_hidden.sum(0)
    return np.array(record)


def test_follows_the_authors_update_step_for_step(getkey):
    amplitude, period, num_periods = 70.0, 250, 4
    points, labels = spiral()
    state = train.init(make_mlp, OPTIMISER, getkey())
    first, second = state.model.layers
    expected = authors_run(
        (first.weight, first.bias, second.weight, second.bias), points, labels, amplitude, period, num_periods
    )
    schedule = OscillatingWeights(3, amplitude, period, inclusive_period=True)
    data = train.Dataset(jnp.asarray(points), jnp.asarray(labels))
    _, metrics = train.train_chunk(state, DynamicalLoss(schedule), OPTIMISER, data, num_steps=len(expected))
    weights = jax.vmap(schedule)(jnp.arange(len(expected)))
    assert len(expected) == 1004
    np.testing.assert_allclose(weights, expected[:, 2:], atol=1e-12)
    np.testing.assert_allclose(metrics.loss, expected[:, 0], atol=1e-9)
    np.testing.assert_allclose(metrics.accuracy, expected[:, 1], atol=1e-12)


def test_reproduces_the_numbers_of_the_papers_figure():
    """F and the largest Hessian eigenvalue over ten seeds of the paper-era initialisation."""
    points, labels = spiral()
    data = train.Dataset(jnp.asarray(points), jnp.asarray(labels))
    schedule = OscillatingWeights(3, 70.0, 5000, inclusive_period=True)
    losses = DynamicalLoss(jax.tree.map(lambda leaf: jnp.repeat(leaf, 10), schedule))
    states = ensemble.init(make_mlp, OPTIMISER, jr.split(jr.key(0), 10))

    @eqx.filter_jit
    def sharpness(model, step):
        parameters, unravel = ravel_pytree(model)
        loss = lambda p: DynamicalLoss(schedule)(jax.vmap(unravel(p))(data.inputs), data.labels, step)
        return jnp.linalg.eigvalsh(jax.hessian(loss)(parameters))[-1]

    def median_sharpness(states):
        members = (jax.tree.map(lambda leaf, i=i: leaf[i], states.model) for i in range(10))
        return np.median([sharpness(model, states.step[0]) for model in members])

    states, first, _ = ensemble.train_chunk(states, losses, OPTIMISER, data, num_steps=2500)
    assert np.isclose(median_sharpness(states), 0.601, rtol=0.05)
    states, second, _ = ensemble.train_chunk(states, losses, OPTIMISER, data, num_steps=1500)
    assert np.isclose(median_sharpness(states), 1.62, rtol=0.05)
    _, third, _ = ensemble.train_chunk(states, losses, OPTIMISER, data, num_steps=1)
    for metrics, figure, tolerance in ((first, 1.085, 0.06), (second, 0.133, 0.02), (third, 0.252, 0.02)):
        assert np.isclose(metrics.loss[:, 0].mean(), figure, rtol=tolerance)
