"""What the losses take and what they refuse: kinds of arrays, masks, axes of classes, and some classes only."""

import functools as ft
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_dynloss_kernels import weighted_xent

import eqx_dynloss.loss
from eqx_dynloss.loss import (
    softmax_cross_entropy,
    softmax_cross_entropy_with_soft_labels,
    squared_error,
)

from .helpers import DERIVATIVES, slow, tree_allclose, undecorated

soft_cross_entropy = softmax_cross_entropy_with_soft_labels


def kernel(*args, **options):
    return weighted_xent(*args, **options)[0]


INTEGER = {"integer": softmax_cross_entropy, "kernel": kernel, "squared": squared_error}
ALL = {**INTEGER, "soft": soft_cross_entropy}
EVERY = pytest.mark.parametrize("name", ALL)

X = [[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]]
LABELS = {"soft": [[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]}
W = [0.5, 1.5, 1.0]


def operands(name):
    return X, LABELS.get(name, [2, 0]), W


KINDS = {
    "lists": lambda x: x,
    "NumPy, float64 and int64": np.asarray,
    "NumPy, float32 and int32": lambda x: np.asarray(x, np.float32 if np.asarray(x).dtype.kind == "f" else np.int32),
    "jnp": jnp.asarray,
}


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_numpy_are_what_jnp_makes_of_them(name, kind):
    x, y, w = operands(name)
    expected = ALL[name](*map(jnp.asarray, (x, y, w)), where=jnp.array([True, False]))
    args, where = map(KINDS[kind], (x, y, w)), [True, False]
    with warnings.catch_warnings(action="error"):  # "Explicitly requested dtype float64 …"
        assert tree_allclose(ALL[name](*args, where=where if kind == "lists" else np.asarray(where)), expected)
    one = [KINDS[kind](a) for a in (x[0], y[0], w)]
    alone = ALL[name](one[0], y[0] if name != "soft" else one[1], one[2])
    assert tree_allclose(alone, expected[0]) and alone.shape == ()


@EVERY
def test_whole_numbers_are_numbers(name):
    x, y, w = operands(name)
    whole = [[1, 2, 0], [0, -1, 3]]
    expected = ALL[name](jnp.asarray(whole, jnp.float32), jnp.asarray(y), jnp.array([1.0, 2.0, 3.0]))
    assert tree_allclose(ALL[name](whole, y, [1, 2, 3]), expected)
    assert tree_allclose(ALL[name](np.asarray(whole), np.asarray(y), np.array([1, 2, 3])), expected)


def test_one_hot_labels_of_any_dtype_are_soft_labels():
    hot = np.eye(3)[[2, 0]]
    expected = softmax_cross_entropy(X, [2, 0], W)
    for dtype in (np.int32, np.uint8, np.float32, bool):
        assert tree_allclose(soft_cross_entropy(X, hot.astype(dtype), W), expected)


@EVERY
def test_numpy_float64_stays_float64_with_x64(name, x64):
    x, y, w = map(np.asarray, operands(name))
    assert ALL[name](x, y, w).dtype == jnp.float64


def refused(monkeypatch, name, *args, **options):
    """The sentence with which a loss refuses, as users have it who do not switch jaxtyping's checks on."""
    monkeypatch.setattr(eqx_dynloss.loss, "weighted_xent", undecorated(weighted_xent))
    function = undecorated(weighted_xent if name == "kernel" else ALL[name])
    with pytest.raises(ValueError) as caught:
        function(*args, **options)
    (sentence,) = str(caught.value).splitlines()
    return sentence


@EVERY
@pytest.mark.parametrize("mask", [[2, 1], np.array([255, 1], np.uint8), np.array([1.0, 0.0]), [0, 1]], ids=str)
def test_only_booleans_are_masks(name, mask, monkeypatch):
    sentence = refused(monkeypatch, name, *operands(name), where=mask)
    assert "where must be boolean" in sentence and "mask != 0" in sentence and "multiply the result" in sentence


@pytest.mark.parametrize("name", INTEGER)
def test_labels_that_are_no_class_indices_are_refused(name, monkeypatch):
    for labels in ([2.0, 0.0], [True, False]):
        assert "labels must be class indices, so integers" in refused(monkeypatch, name, X, labels)
    for labels in (np.eye(3)[[2, 0]], np.eye(3, dtype=int)[[2, 0]]):
        assert "softmax_cross_entropy_with_soft_labels" in refused(monkeypatch, name, X, labels)


@EVERY
def test_other_operands_that_do_not_fit_are_refused(name, monkeypatch):
    x, y, w = operands(name)
    refuse = ft.partial(refused, monkeypatch, name)
    for weights in (2.0, np.ones((2, 3)), [1.0, 2.0], np.float32(2)):
        assert "class_weights must hold one weight for each of the 3 classes" in refuse(x, y, weights)
    assert "at least one class" in refuse(np.zeros((2, 0)), np.zeros((2, 0)) if name == "soft" else y)
    assert "at least one class" in refuse(1.0, 1)
    assert "real numbers" in refuse(np.asarray(x) * 1j, y)
    assert "where must have the batch shape" in refuse(x, y, w, where=[True])
    assert "where must have the batch shape" in refuse(x, y, w, where=True)


def test_a_squared_error_has_no_mask_of_classes(monkeypatch):
    assert "where must have the batch shape (2,)" in refused(
        monkeypatch, "squared", X, [2, 0], where=np.ones((2, 3)) > 0
    )


SOFTMAX = {"integer": softmax_cross_entropy, "soft": soft_cross_entropy}


def problem(shape, axis, num_classes):
    rng = np.random.RandomState(0)
    x, w = rng.randn(*shape), rng.uniform(0.1, 2, num_classes)
    batch = [n for i, n in enumerate(shape) if i not in [a % len(shape) for a in np.atleast_1d(axis)]]
    return (
        x,
        rng.randint(num_classes, size=batch),
        rng.dirichlet(np.ones(num_classes), batch),
        w,
        rng.rand(*shape) < 0.7,
    )


@pytest.mark.parametrize(
    "axis",
    [slow(0), 1, slow(-1), slow(-2), slow((1,)), slow((1, 3)), (3, 1), (-1, 0), (0, 1, 2, 3), np.int64(2)],
    ids=str,
)
@pytest.mark.parametrize("masked", ["no", "examples", "classes"])
def test_classes_may_lie_along_any_axes(axis, masked, x64):
    shape, axes = (2, 3, 4, 5), [a % 4 for a in np.atleast_1d(axis)]
    order = [i for i in range(4) if i not in axes] + axes
    x, y, q, w, mask = problem(shape, axis, int(np.prod([shape[a] for a in axes])))
    batch = [shape[i] for i in order[: 4 - len(axes)]]
    last = lambda a: a.transpose(order).reshape(*batch, -1)
    there = lambda a: np.transpose(a.reshape([shape[i] for i in order]), np.argsort(order))
    where = {"no": None, "examples": last(mask).all(-1), "classes": mask}[masked]
    moved = last(where) if masked == "classes" else where
    options: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.01}
    for function, labels, along in ((softmax_cross_entropy, y, y), (soft_cross_entropy, q, there(q))):
        actual, expected = jax.jit(
            lambda x, w, where, moved, function=function, labels=labels, along=along: (
                function(x, along, w, axis=axis, where=where, **options),
                function(last(x), labels, w, where=moved, **options),
            )
        )(x, w, where, moved)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)  # NaN for labels that are taken out
        assert actual.shape == tuple(batch)


def test_an_axis_in_the_place_of_the_class_weights_is_that_of_optax():
    x, y, *_ = problem((2, 3, 4), 1, 3)
    assert tree_allclose(softmax_cross_entropy(x, y, 1), optax.softmax_cross_entropy_with_integer_labels(x, y, 1))
    x, y, *_ = problem((2, 3, 4), (0, 1), 6)
    expected = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(x), y, (0, 1))
    assert tree_allclose(softmax_cross_entropy(x, y, (0, 1)), expected)
    # Weights, in a tuple as well, whenever they can be.
    assert tree_allclose(softmax_cross_entropy(X, [2, 0], (0, 1, 2)), softmax_cross_entropy(X, [2, 0], jnp.arange(3.0)))
    assert tree_allclose(soft_cross_entropy([X[0][:2]], [[1.0, 0.0]], (0, 1)), jnp.zeros(1))


@pytest.mark.parametrize("axis", [2, -3, (0, 0), (0, -2), (), None, "classes", 1.0], ids=str)
def test_an_axis_that_is_not_there_is_refused(axis, monkeypatch):
    for name in SOFTMAX:
        assert refused(monkeypatch, name, *operands(name), axis=axis).startswith("axis must")
    assert "two axes" in refused(monkeypatch, "integer", X, [2, 0], 1, axis=0)


# Some classes only: the same as for examples that never had the others, one by one and in float64.


def some_classes(seed=0, shape=(7,), num_classes=6):
    x, y, q, w, mask = problem((*shape, num_classes), -1, num_classes)
    mask[np.arange(len(y)), y] = True
    mask[3] = False  # no class left
    mask[4] = True
    return x, y, q, w, mask


def one_by_one(kind, x, labels, w, mask, **options):
    """The losses of the examples with the classes that they have, by optax; use it in float64."""
    smoothing, z = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    losses = []
    for i, left in enumerate(mask):
        kept = np.flatnonzero(left)
        if not kept.size:
            losses.append(jnp.zeros(()))
            continue
        target = (kept == labels[i]).astype(float) if kind == "integer" else labels[i][kept]
        q = (1 - smoothing) * target + smoothing / kept.size
        loss = optax.softmax_cross_entropy(x[i, kept], q * w[kept])
        losses.append(loss + z * jax.nn.logsumexp(x[i, kept]) ** 2)
    return jnp.stack(losses)


@pytest.mark.parametrize("name", [slow("value"), slow("grad"), "jvp of value and grad", "vmap of hessian"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.1}], ids=["plain", "options"])
@pytest.mark.parametrize("kind", SOFTMAX)
def test_classes_that_are_taken_out_might_as_well_not_be_there(kind, options, name, x64):
    x, y, q, w, mask = some_classes()
    labels = y if kind == "integer" else q
    spoilt = np.where(mask, x, np.tile([np.nan, np.inf, -np.inf], 14).reshape(x.shape))
    total = lambda f: lambda x, w: jnp.sum(f(x, w) ** 2)
    ours = total(lambda x, w: SOFTMAX[kind](x, labels, w, where=mask, **options))
    theirs = total(lambda x, w: one_by_one(kind, x, labels, w, mask, **options))
    dx, dw = jnp.cos(x), jnp.sin(w)
    expected = jax.jit(ft.partial(DERIVATIVES[name], theirs))(jnp.asarray(x), jnp.asarray(w), dx, dw)
    for logits in (x, spoilt) if name in ("value", "grad") else (x,):
        actual = jax.jit(ft.partial(DERIVATIVES[name], ours))(jnp.asarray(logits), jnp.asarray(w), dx, dw)
        assert tree_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_labels_and_examples_without_classes():
    x, y, q, w, mask = some_classes()
    mask[0] = np.arange(6) != y[0]
    both: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 0.1}
    for options in ({}, both):
        losses = ft.partial(softmax_cross_entropy, labels=y, class_weights=w, where=mask, **options)
        loss = losses(x)
        assert np.isnan(loss[0]) and loss[3] == 0 and np.all(np.isfinite(loss[1:]))
        gradient = jax.grad(lambda x, f=losses: jnp.nansum(f(x)))(jnp.asarray(x))
        assert np.all(np.isfinite(gradient)) and not np.any(gradient[3]) and not np.any(np.asarray(gradient)[~mask])
        assert np.all(np.isfinite(soft_cross_entropy(x, q, w, where=mask, **options)))


def test_a_mask_of_classes_has_no_kernel_and_maps(monkeypatch):
    x, y, q, w, mask = some_classes()
    sentence = refused(monkeypatch, "integer", x, y, w, where=mask, implementation="pallas")
    assert "mask of classes" in sentence
    losses = lambda mask: softmax_cross_entropy(x, y, w, where=mask)
    masks = np.stack([mask, np.ones_like(mask)])
    assert tree_allclose(jax.vmap(losses)(masks), jnp.stack([losses(mask), softmax_cross_entropy(x, y, w)]))
    loss, lse = weighted_xent(x, y, w, where=mask)
    assert tree_allclose(loss, losses(mask))
    assert tree_allclose(lse[:3], jax.nn.logsumexp(jnp.asarray(x), -1, where=mask)[:3]) and lse[3] == 0
