"""Curvature against dense matrices: of our networks, and of matrices with awkward spectra."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from eqx_dynloss import landscape
from eqx_dynloss.landscape import hessian_spectrum, lanczos, ntk_spectrum
from eqx_dynloss.loss import DynamicalLoss, softmax_cross_entropy
from eqx_dynloss.models import MLP, Myrtle
from eqx_dynloss.schedule import OscillatingWeights

from .helpers import tree_allclose

SPECTRA = {
    "spread": np.linspace(-2, 10, 40),
    "negative": -np.geomspace(1e-3, 10, 40),
    "clustered": np.concatenate([np.full(30, 1.0), np.full(5, -3.0), np.full(5, 8.0)]),
    "one outlier": np.concatenate([1e-3 * np.linspace(-1, 1, 39), [50.0]]),
    "identity": np.full(40, 2.0),
    "zero": np.zeros(40),
}


def symmetric(eigenvalues, dtype, seed=0):
    basis, _ = np.linalg.qr(np.random.RandomState(seed).randn(len(eigenvalues), len(eigenvalues)))
    return jnp.asarray(basis * eigenvalues @ basis.T, dtype)


@ft.partial(jax.jit, static_argnums=(2, 3))
def lanczos_of(matrix, start, order, vectors=0):
    return lanczos(lambda v: matrix @ v, start, order, vectors=vectors)


@pytest.mark.parametrize("order", [5, 100])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype, digits", [("float32", 1e-5), ("float64", 1e-12)])
def test_ritz_values_are_eigenvalues_within_their_errors(name, order, dtype, digits):
    eigenvalues = SPECTRA[name]
    with jax.enable_x64(dtype == "float64"):
        matrix = symmetric(eigenvalues, dtype)
        start = jr.normal(jr.key(1), (40,), dtype)
        spectrum = jax.tree.map(np.asarray, lanczos_of(matrix, start, order))
    assert spectrum.eigenvalues.shape == (min(order, 40),) and spectrum.eigenvalues.dtype == dtype
    scale = np.abs(eigenvalues).max() or 1.0
    distance = np.abs(np.asarray(spectrum.eigenvalues)[:, None] - eigenvalues).min(1)
    assert np.all(distance <= spectrum.errors + 50 * digits * scale)
    assert np.all(np.diff(spectrum.eigenvalues) >= 0)
    assert np.isclose(np.sum(spectrum.weights), 1, atol=50 * digits)
    assert eigenvalues.min() - 50 * digits * scale <= spectrum.eigenvalues[0]
    assert spectrum.eigenvalues[-1] <= eigenvalues.max() + 50 * digits * scale
    if order >= 40:  # the whole Krylov space
        assert np.isclose(spectrum.eigenvalues[-1], eigenvalues.max(), atol=50 * digits * scale)
        assert np.isclose(spectrum.eigenvalues[0], eigenvalues.min(), atol=50 * digits * scale)
        real = np.isfinite(spectrum.errors)
        distinct = len(np.unique(eigenvalues))
        assert real.sum() == distinct if distinct < 10 else real.all()


@pytest.mark.parametrize("order", [12, 100])
@pytest.mark.parametrize("name", ["negative", "one outlier", "clustered"])
@pytest.mark.parametrize("dtype, digits", [("float32", 1e-5), ("float64", 1e-12)])
def test_ritz_vectors_are_eigenvectors_within_their_errors(name, order, dtype, digits):
    """Of length 1, at right angles, with the residual that `errors` says; and those of NumPy's decomposition."""
    with jax.enable_x64(dtype == "float64"):
        matrix = symmetric(SPECTRA[name], dtype)
        start = jr.normal(jr.key(1), (40,), dtype)
        spectrum = jax.tree.map(np.asarray, lanczos_of(matrix, start, order, 3))
    found, scale = spectrum.vectors.astype(float), np.abs(SPECTRA[name]).max()
    assert spectrum.vectors.shape == (3, 40) and spectrum.vectors.dtype == dtype
    real = np.isfinite(spectrum.errors[-3:])
    assert real.any() and np.all(found[~real] == 0)
    found, values, errors = found[real], spectrum.eigenvalues[-3:][real], spectrum.errors[-3:][real]
    np.testing.assert_allclose(found @ found.T, np.eye(len(found)), atol=100 * digits)
    residual = found @ np.asarray(matrix, float) - values[:, None] * found
    np.testing.assert_allclose(np.linalg.norm(residual, axis=1), errors, rtol=1e-2, atol=200 * digits * scale)
    assert np.all(np.take_along_axis(found, abs(found).argmax(1)[:, None], 1) > 0)
    if name == "one outlier":
        _, exact = np.linalg.eigh(np.asarray(matrix, float))
        assert abs(found[-1] @ exact[:, -1]) == pytest.approx(1, abs=100 * digits)


def test_no_more_ritz_vectors_than_ritz_values():
    with pytest.raises(ValueError, match="vectors must be between 0 and the order, 3, got 4"):
        lanczos(lambda v: v, jnp.ones(3), 10, vectors=4)


def spiral_problem(seed=0, dtype=jnp.float64, width=100):
    rng = np.random.RandomState(seed)
    model = MLP(2, width, 3, key=jr.key(seed))
    inputs, labels = jnp.asarray(rng.uniform(-1, 1, (60, 2)), dtype), jnp.asarray(rng.randint(3, size=60))
    loss = DynamicalLoss(OscillatingWeights(3, 70.0, 5000))
    objective = lambda model, inputs=inputs, labels=labels: loss(jax.vmap(model)(inputs), labels, 1000)
    return model, objective, inputs, labels


def dense_hessian(objective, model):
    flat, unravel = ravel_pytree(model)
    return jax.hessian(lambda p: objective(unravel(p)))(flat)


@pytest.mark.slow
def test_the_hessians_ends_are_those_of_the_dense_hessian(x64):
    model, objective, _, _ = spiral_problem()
    eigenvalues = jnp.linalg.eigvalsh(dense_hessian(objective, model))
    assert len(eigenvalues) == 603
    spectrum = jax.jit(lambda model: hessian_spectrum(objective, model, order=150, key=jr.key(0)))(model)
    assert tree_allclose(spectrum.eigenvalues[-5:], eigenvalues[-5:], rtol=1e-6, atol=0)
    assert tree_allclose(spectrum.eigenvalues[:3], eigenvalues[:3], rtol=1e-6, atol=0)
    assert np.all(spectrum.errors[-5:] < 1e-4)
    few = hessian_spectrum(objective, model, order=10, key=jr.key(0))
    assert abs(few.eigenvalues[-1] - eigenvalues[-1]) <= few.errors[-1]
    assert tree_allclose(few.eigenvalues[-1], eigenvalues[-1], rtol=1e-3)


def test_the_largest_eigenvalues_and_eigenvectors_of_a_small_hessian(x64):
    model, objective, _, _ = spiral_problem(width=5)
    eigenvalues, eigenvectors = np.linalg.eigh(jax.jit(lambda model: dense_hessian(objective, model))(model))
    spectrum = jax.jit(lambda model: hessian_spectrum(objective, model, order=33, vectors=2, key=jr.key(0)))(model)
    assert tree_allclose(spectrum.eigenvalues[-5:], eigenvalues[-5:], rtol=1e-6, atol=0)
    assert tree_allclose(spectrum.eigenvalues[0], eigenvalues[0], rtol=1e-6, atol=0)
    assert tree_allclose(abs(jnp.sum(spectrum.vectors * eigenvectors[:, -2:].T, 1)), jnp.ones(2), rtol=1e-9)


def test_batches_give_the_hessian_of_the_mean(x64):
    model, objective, inputs, labels = spiral_problem()
    batches = inputs.reshape(4, 15, 2), labels.reshape(4, 15)
    product, size = landscape.hessian(objective, model)
    batched, _ = landscape.hessian(lambda model, batch: objective(model, *batch), model, batches)
    v = jr.normal(jr.key(3), (size,))
    assert tree_allclose(batched(v), product(v), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_the_hessian_goes_through_myrtle():
    model = Myrtle(2, key=jr.key(0))
    images, labels = jr.normal(jr.key(1), (6, 8, 8, 3)), jnp.arange(6)
    objective = lambda model: jnp.mean(softmax_cross_entropy(jax.vmap(model)(images), labels))
    eigenvalues = jnp.linalg.eigvalsh(dense_hessian(objective, model))
    spectrum = jax.jit(lambda model: hessian_spectrum(objective, model, order=40, key=jr.key(0)))(model)
    assert tree_allclose(spectrum.eigenvalues[-1], eigenvalues[-1], rtol=1e-4)
    assert tree_allclose(spectrum.eigenvalues[0], eigenvalues[0], rtol=1e-3, atol=1e-3)


def test_the_ntk_is_that_of_the_dense_jacobian(x64):
    model, _, inputs, _ = spiral_problem()
    flat, unravel = ravel_pytree(model)
    jacobian = jax.jacfwd(lambda p: jax.vmap(unravel(p))(inputs))(flat)  # [points, outputs, parameters]
    dense = sum(jacobian[:, c] @ jacobian[:, c].T for c in range(3)) / 3
    assert tree_allclose(landscape.ntk(model, inputs), dense, rtol=1e-12)
    spectrum = ntk_spectrum(model, inputs, order=40, key=jr.key(0))
    assert tree_allclose(spectrum.eigenvalues[-3:], jnp.linalg.eigvalsh(dense)[-3:], rtol=1e-8)


@pytest.mark.slow
def test_members_are_mapped(x64):
    models = eqx.filter_vmap(lambda key: MLP(2, 20, 3, key=key))(jr.split(jr.key(0), 3))
    _, objective, inputs, _ = spiral_problem()
    hessians = eqx.filter_vmap(lambda model: hessian_spectrum(objective, model, key=jr.key(0)))(models)
    ntks = eqx.filter_vmap(lambda model: ntk_spectrum(model, inputs, key=jr.key(0)))(models)
    for i in range(3):
        model = jax.tree.map(lambda x, i=i: x[i], models)
        alone = hessian_spectrum(objective, model, key=jr.key(0)), ntk_spectrum(model, inputs, key=jr.key(0))
        together = jax.tree.map(lambda x, i=i: x[i], (hessians, ntks))
        assert tree_allclose([s.eigenvalues for s in together], [s.eigenvalues for s in alone], rtol=1e-8, atol=1e-8)


def test_the_density_integrates_to_one_and_matches_the_histogram(x64):
    eigenvalues = np.concatenate([np.random.RandomState(0).normal(0, 1, 180), np.linspace(4, 6, 20)])
    matrix = symmetric(eigenvalues, "float64")
    start = jr.normal(jr.key(0), (30, 200))
    spectra = jax.vmap(lambda v: lanczos(lambda u: matrix @ u, v, 80))(start)
    grid, width = jnp.linspace(-6, 10, 2001), 0.3
    density = landscape.spectral_density(spectra, grid, width)
    assert np.isclose(np.trapezoid(density, grid), 1, atol=1e-6)
    smoothed = np.mean(
        np.exp(-0.5 * ((np.asarray(grid)[:, None] - eigenvalues) / width) ** 2) / (width * np.sqrt(2 * np.pi)), 1
    )
    assert np.abs(density - smoothed).max() < 0.05 * smoothed.max()


@pytest.mark.slow
def test_the_density_of_a_hessian_matches_the_dense_one(x64):
    model, objective, _, _ = spiral_problem(width=20)
    eigenvalues = np.linalg.eigvalsh(dense_hessian(objective, model))
    spectra = jax.vmap(lambda key: hessian_spectrum(objective, model, order=60, key=key))(jr.split(jr.key(0), 40))
    grid, width = jnp.linspace(-2, 4, 601), 0.05
    density = landscape.spectral_density(spectra, grid, width)
    smoothed = np.mean(
        np.exp(-0.5 * ((np.asarray(grid)[:, None] - eigenvalues) / width) ** 2) / (width * np.sqrt(2 * np.pi)), 1
    )
    assert np.abs(density - smoothed).max() < 0.05 * smoothed.max()


def logistic(r, steps=400, keep=64):
    x, series = 0.3, []
    for _ in range(steps):
        x = r * x * (1 - x)
        series.append(x)
    return np.array(series[-keep:])


@pytest.mark.parametrize("drift", [0.0, 1e-4, -1e-3])
@pytest.mark.parametrize(
    "series, expected",
    [
        (logistic(2.8), 1),  # the textbook cascade of the logistic map
        (logistic(3.2), 2),
        (logistic(3.5), 4),
        (logistic(3.9), 0),
        (np.exp(-np.arange(64) / 10), 1),
        (0.1 * (np.arange(64) / 32 - 1) ** 2, 1),
        (np.cos(np.arange(64) / 8), 1),
        (2 + np.cos(np.pi * np.arange(64) / 2 + 0.3), 4),
        (2 + np.cos(2 * np.pi * np.arange(64) / 3), 0),
        (2 + 1e-5 * logistic(3.9), 1),  # too small to be more than the kinks of a ReLU network
        (2 + 3e-2 * logistic(3.2), 2),
    ],
)
def test_the_period_of_a_series(series, expected, drift, x64):
    series = series + drift * np.arange(64)
    assert landscape.period(jnp.asarray(series)) == expected
    assert np.array_equal(landscape.period(jnp.asarray([series, np.zeros(64)])), [expected, 1])


def test_one_step_difference_is_positive_where_the_loss_falls():
    assert tree_allclose(landscape.one_step_difference(jnp.array([3.0, 1.0, 2.0])), jnp.array([2.0, -1.0]))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="order"):
        lanczos(lambda v: v, jnp.ones(3), 0)
    with pytest.raises(ValueError, match="9 updates"):
        landscape.period(jnp.ones(8))
