"""The curvature that the commands on images observe, against dense Hessians in float64."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset, TrainState
from experiments.problems.curvature import at_peak_and_static, of_step
from experiments.problems.presets import PRESETS

from ...helpers import slow

CLASSES = 3


class Pixels(eqx.Module):
    """Logits from two pixels: nine parameters, so that ten Lanczos products know the whole spectrum."""

    linear: eqx.nn.Linear

    def __call__(self, image):
        return self.linear(image.reshape(-1))


def state(step: int, seed: int = 0) -> TrainState:
    model = Pixels(eqx.nn.Linear(2, CLASSES, key=jr.key(seed)))
    no = jnp.zeros((), bool)
    return TrainState(model=model, opt_state=(), step=jnp.asarray(step), key=jr.key(seed), diverged=no)


def data(count: int) -> Dataset:
    labels = np.random.default_rng(0).integers(0, CLASSES, count)
    return Dataset(jr.normal(jr.key(7), (count, 1, 2, 1)), jnp.asarray(labels), lambda images: 2 * images)


def dense(model: Pixels, some: Dataset, weights: np.ndarray) -> float:
    """The largest eigenvalue, from scratch: the weighted cross-entropy in float64 and `jax.hessian`."""
    flat, unravel = ravel_pytree(jax.tree.map(lambda a: a.astype(jnp.float64), eqx.filter(model, eqx.is_array)))
    images, labels = 2 * np.asarray(some.inputs, np.float64).reshape(-1, 2), np.asarray(some.labels)

    def objective(flat):
        linear = unravel(flat).linear
        log_probabilities = jax.nn.log_softmax(images @ linear.weight.T + linear.bias[None])
        picked = jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]
        return -jnp.mean(jnp.asarray(weights)[labels] * picked)

    return float(jnp.linalg.eigvalsh(jax.hessian(objective)(flat))[-1])


def peak(amplitude: float, label: int) -> np.ndarray:
    raw = np.where(np.arange(CLASSES) == label, amplitude, 1.0)
    return CLASSES * raw / raw.sum()


@pytest.mark.parametrize("count, used", [slow(40, 40), (250, 200)])
def test_the_largest_eigenvalues_are_those_of_dense_hessians(count, used, x64):
    images, loss = data(300), DynamicalLoss(OscillatingWeights(CLASSES, 8.0, 15.0, stop=400))
    first = dataclasses.replace(images, inputs=images.inputs[:used], labels=images.labels[:used])
    seen = set()
    for seed in range(6):
        start = state(150, seed)  # a whole number of periods, when all weights are 1
        found = at_peak_and_static(count)(start, loss, images)
        np.testing.assert_allclose(found["static_hessian_max"], dense(start.model, first, np.ones(CLASSES)), rtol=1e-4)
        possible = [dense(start.model, first, peak(8.0, label)) for label in range(CLASSES)]
        drawn = int(np.argmin(np.abs(np.array(possible) - found["peak_hessian_max"])))
        np.testing.assert_allclose(found["peak_hessian_max"], possible[drawn], rtol=1e-4)
        seen.add(drawn)
    assert seen == set(range(CLASSES))  # every class has its turn


def test_the_step_has_its_own_weights(x64):
    images, schedule = data(50), OscillatingWeights(CLASSES, 8.0, 15.0)
    found = of_step(500)(state(20), DynamicalLoss(schedule), images)
    expected = dense(state(20).model, images, np.asarray(schedule(20)))
    np.testing.assert_allclose(found["hessian_max"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    "amplitude, period, stop, step",
    [(1.0, 15.0, 400, 150), (8.0, 15.0, 400, 400), (8.0, 900.0, 400, 150)],
    ids=["static loss", "oscillation over", "no whole period before its end"],
)
def test_where_nothing_oscillates_both_are_the_same(amplitude, period, stop, step):
    loss = DynamicalLoss(OscillatingWeights(CLASSES, amplitude, period, stop=stop))
    found = at_peak_and_static(50)(state(step), loss, data(50))
    np.testing.assert_allclose(found["peak_hessian_max"], found["static_hessian_max"], rtol=1e-5)


def test_losses_are_observed_with_the_same_class_at_its_peak(x64):
    """Seed and step decide the class, not the loss: what is paired by seed stays comparable."""
    images, start = data(60), state(90, seed=3)
    drawn = []
    for amplitude, period in ((4.0, 15.0), (8.0, 15.0), (8.0, 30.0)):
        loss = DynamicalLoss(OscillatingWeights(CLASSES, amplitude, period, stop=400))
        found = at_peak_and_static(60)(start, loss, images)["peak_hessian_max"]
        possible = [dense(start.model, images, peak(amplitude, label)) for label in range(CLASSES)]
        drawn.append(int(np.argmin(np.abs(np.array(possible) - found))))
    assert len(set(drawn)) == 1


def test_it_is_observed_by_default_where_it_costs_little():
    """In images whose gradient costs as much: about fifty for every image that is observed, by measurement on a CPU."""
    for preset in PRESETS.values():
        images = preset.train_examples or 50_000
        assert 50 * preset.curvature * preset.evaluations <= 0.05 * preset.epochs * images
