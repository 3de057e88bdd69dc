import functools as ft
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_dynloss_kernels import weighted_xent

import eqx_dynloss.loss
from eqx_dynloss.loss import (
    DynamicalLoss,
    softmax_cross_entropy,
    softmax_cross_entropy_with_soft_labels,
    squared_error,
)
from eqx_dynloss.schedule import StaticWeights

from .helpers import DERIVATIVES, tree_allclose, undecorated


def problem(shape=(7,), num_classes=5, seed=0):
    """Logits, labels, soft labels and class weights, as float64 arrays where JAX allows them."""
    rng = np.random.RandomState(seed)
    soft = rng.dirichlet(np.ones(num_classes), size=shape)
    arrays = (
        3 * rng.randn(*shape, num_classes),
        rng.randint(num_classes, size=shape),
        soft,
        rng.uniform(0.1, 2, num_classes),
    )
    return tuple(jnp.asarray(a, float if a.dtype == np.float64 else int) for a in arrays)


def oracle(logits, q, class_weights, z_loss=0.0, label_smoothing=0.0):
    """Optax × weights for targets that are distributions, and the z-loss by its formula; use it in float64."""
    q = (1 - label_smoothing) * q + label_smoothing / logits.shape[-1]
    loss = optax.softmax_cross_entropy(logits, q * jnp.broadcast_to(class_weights, q.shape))
    return loss + z_loss * jnp.log(jnp.sum(jnp.exp(logits), -1)) ** 2


def one_hot(labels, logits):
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


@pytest.mark.parametrize("shape", [(), (0,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("label_smoothing, z_loss", [(0.0, 0.0), (0.0, 0.01), (0.2, 0.1), (1.0, 0.0)])
def test_values_are_optax_times_weights(shape, label_smoothing, z_loss, x64):
    x, y, soft, w = problem(shape)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    for function, labels, q in (
        (softmax_cross_entropy, y, one_hot(y, x)),
        (softmax_cross_entropy_with_soft_labels, soft, soft),
    ):
        run = jax.jit(ft.partial(function, **options))
        assert tree_allclose(run(x, labels, w), oracle(x, q, w, z_loss, label_smoothing))
        assert tree_allclose(run(x, labels), oracle(x, q, jnp.ones(5), z_loss, label_smoothing))


def test_integer_labels_are_optax_integer_labels_times_the_weight_of_the_label(x64):
    x, y, _, w = problem((40,), 10)
    expected = optax.softmax_cross_entropy_with_integer_labels(x, y) * w[y]
    assert tree_allclose(softmax_cross_entropy(x, y, w), expected)


def test_one_hot_soft_labels_are_integer_labels(x64):
    x, y, _, w = problem()
    for label_smoothing, z_loss in ((0.0, 0.0), (0.3, 0.1)):
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        soft = softmax_cross_entropy_with_soft_labels(x, one_hot(y, x), w, **options)
        assert tree_allclose(soft, softmax_cross_entropy(x, y, w, **options))


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients_are_those_of_torch(torch, label_smoothing, weighted, x64):
    x, y, soft, w = problem((40,), 10)
    y = y.at[3].set(-100)
    options = {"weight": torch.tensor(np.array(w)) if weighted else None, "label_smoothing": label_smoothing}
    for function, labels, where in (
        (softmax_cross_entropy, y, y != -100),
        (softmax_cross_entropy_with_soft_labels, soft, None),
    ):
        torch_x = torch.tensor(np.array(x), requires_grad=True)
        expected = torch.nn.functional.cross_entropy(
            torch_x, torch.tensor(np.array(labels)), reduction="none", **options
        )
        (gradient,) = torch.autograd.grad(expected.sum(), torch_x)

        def ours(x, function=function, labels=labels, where=where):
            return function(x, labels, w if weighted else None, where=where, label_smoothing=label_smoothing)

        assert tree_allclose(ours(x), expected.detach().numpy())
        assert tree_allclose(jax.jit(jax.grad(lambda x, ours=ours: ours(x).sum()))(x), gradient.numpy())


def test_the_two_means(torch, x64):
    assert "torch" in (inspect.getdoc(eqx_dynloss.loss) or "").lower()
    x, y, _, w = problem((40,), 3)
    loss = softmax_cross_entropy(x, y, w)
    by_torch = torch.nn.functional.cross_entropy(*(torch.tensor(np.array(a)) for a in (x, y, w)))
    assert tree_allclose(jnp.sum(loss) / jnp.sum(w[y]), by_torch.numpy())
    schedule = StaticWeights(w)
    assert tree_allclose(
        DynamicalLoss(schedule)(x, y, 0),
        jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x, y) * w[y]) * 3 / w.sum(),
    )
    assert not np.allclose(jnp.mean(loss), by_torch.numpy())
    # Balanced classes and weights that sum to the number of classes: the two are the same.
    balanced, w = jnp.arange(39) % 3, w * 3 / w.sum()
    loss = softmax_cross_entropy(x[:39], balanced, w)
    assert tree_allclose(jnp.mean(loss), jnp.sum(loss) / jnp.sum(w[balanced]))


@pytest.mark.parametrize("dtype, result", [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")])
def test_low_precision_is_computed_and_returned_in_float32(dtype, result):
    x, y, soft, w = problem((64,), 10)
    x, soft = x.astype(dtype), soft.astype(dtype)
    for function, labels in ((softmax_cross_entropy, y), (softmax_cross_entropy_with_soft_labels, soft)):
        for weights in (None, w, w.astype(dtype)):
            loss = jax.jit(ft.partial(function, label_smoothing=0.1, z_loss=0.01))(x, labels, weights)
            with jax.enable_x64(True):
                wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, w if weights is None else weights, soft)]
                q = one_hot(y, wide[0]) if function is softmax_cross_entropy else wide[2]
                expected = oracle(wide[0], q, jnp.ones(10) if weights is None else wide[1], 0.01, 0.1)
            assert loss.dtype == result
            assert tree_allclose(loss, expected, same_dtype=False, rtol=2e-6, atol=2e-6)
        gradient = jax.jit(jax.grad(lambda x, f=function, y=labels: f(x, y, w).sum()))(x)
        assert gradient.dtype == dtype


@pytest.mark.parametrize("name", ["grad", "jvp of value and grad", "jacrev of jacrev", "vmap of jvp of grad"])
@pytest.mark.parametrize("kind", ["integer", "soft"])
def test_derivatives_with_every_option_are_those_of_the_formula(name, kind, x64):
    x, y, soft, w = problem((4,), 3)
    y, soft, w = y.at[1].set(-7), soft.at[1].set(jnp.nan), w.at[2].set(0.0)
    x, dx, dw = x.at[1].set(jnp.inf), jnp.cos(x), jnp.sin(w)
    where = jnp.array([True, False, True, True])
    labels, q = (y, one_hot(y, x)) if kind == "integer" else (soft, soft)
    function = softmax_cross_entropy if kind == "integer" else softmax_cross_entropy_with_soft_labels

    def ours(x, w):
        return jnp.sum(function(x, labels, w, where=where, label_smoothing=0.2, z_loss=0.1) ** 2)

    def theirs(x, w):
        return jnp.sum(oracle(x[jnp.array([0, 2, 3])], q[jnp.array([0, 2, 3])], w, 0.1, 0.2) ** 2)

    actual = jax.jit(lambda *args: DERIVATIVES[name](ours, *args))(x, w, dx, dw)
    expected = jax.jit(lambda *args: DERIVATIVES[name](theirs, *args))(x.at[1].set(0.0), w, dx, dw)
    assert tree_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad, bad_label", [(jnp.inf, -1), (-jnp.inf, 2**31 - 1), (jnp.nan, 5)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "options"])
def test_masked_examples_give_exactly_nothing(bad, bad_label, options):
    x, y, soft, w = problem((3, 2))
    where = jnp.array([[True, False], [False, True], [True, True]])
    x_bad = jnp.where(where[..., None], x, bad)
    y_bad = jnp.where(where, y, bad_label)
    soft_bad = jnp.where(where[..., None], soft, bad)
    for function, labels, clean in (
        (softmax_cross_entropy, y_bad, y),
        (softmax_cross_entropy_with_soft_labels, soft_bad, soft),
    ):

        @jax.jit
        def run(x, w, labels, where, function=function):
            f = lambda x, w: function(x, labels, w, where=where, **options)
            total = lambda x, w: jnp.sum(f(x, w))
            return f(x, w), jax.grad(total, (0, 1))(x, w), jax.jvp(jax.grad(total), (x, w), (jnp.ones_like(x), w))[1]

        value, (grad_x, grad_w), second = run(x_bad, w, labels, where)
        assert not np.any(value[~where]) and not np.any(grad_x[~where]) and not np.any(second[~where])
        assert tree_allclose(run(x, w, clean, where), (value, (grad_x, grad_w), second))
        assert tree_allclose(value[where], function(x, clean, w, **options)[where])


def test_everything_masked_is_zero():
    x, _, soft, w = problem()
    where = jnp.zeros(7, bool)
    f = lambda x, w: jnp.sum(softmax_cross_entropy(x * jnp.nan, jnp.full(7, -1), w, where=where, z_loss=1.0))
    value, gradients = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)
    assert value == 0 and not np.any(gradients[1])
    assert not np.any(softmax_cross_entropy_with_soft_labels(x * jnp.nan, soft, w, where=where))


def test_empty_batches_have_empty_gradients():
    x, y, soft, w = problem((0,))
    for function, labels in ((softmax_cross_entropy, y), (softmax_cross_entropy_with_soft_labels, soft)):
        f = lambda x, w, function=function, labels=labels: jnp.sum(function(x, labels, w, label_smoothing=0.1))
        value, (grad_x, grad_w) = jax.jit(jax.value_and_grad(f, (0, 1)))(x, w)
        assert value == 0 and grad_x.shape == (0, 5)
        assert tree_allclose(grad_w, jnp.zeros(5))


def test_soft_labels_of_ruled_out_classes(x64):
    x = jnp.array([0.0, -jnp.inf, 1.0])
    inside, outside, w = jnp.array([0.25, 0.0, 0.75]), jnp.array([0.2, 0.3, 0.5]), jnp.array([1.0, 2.0, 0.5])
    f = softmax_cross_entropy_with_soft_labels
    expected = oracle(x[jnp.array([0, 2])], inside[jnp.array([0, 2])], w[jnp.array([0, 2])])
    assert tree_allclose(f(x, inside, w), expected)
    assert np.all(np.isfinite(jax.grad(f)(x, inside, w))) and np.all(np.isfinite(jax.jit(jax.hessian(f))(x, inside, w)))
    assert f(x, outside, w) == jnp.inf and np.all(np.isfinite(jax.grad(f)(x, outside, w)))
    # A weight of zero silences the infinite term, as for integer labels.
    silent = w.at[1].set(0.0)
    expected = oracle(x[jnp.array([0, 2])], outside[jnp.array([0, 2])], w[jnp.array([0, 2])])
    assert tree_allclose(f(x, outside, silent), expected)
    assert np.all(np.isfinite(jax.grad(f)(x, outside, silent)))


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_soft_labels_lose_no_accuracy_to_an_offset(offset):
    x, _, soft, w = problem((64,), 10)
    x = jnp.round(4 * x) / 4
    shifted = softmax_cross_entropy_with_soft_labels(x + offset, soft, w)
    assert tree_allclose(shifted, softmax_cross_entropy_with_soft_labels(x, soft, w), rtol=2e-6, atol=2e-6)


def squared_by_hand(outputs, labels, class_weights, weighting):
    """In float64 NumPy, number by number: the losses, and their sum's derivatives in the outputs and in the weights."""
    f, y, w = np.asarray(outputs, np.float64), np.asarray(labels), np.asarray(class_weights, np.float64)
    loss, grad_f, grad_w = np.zeros(y.shape), np.zeros(f.shape), np.zeros(w.shape)
    for example in np.ndindex(y.shape):
        for unit in range(f.shape[-1]):
            weighed_by = y[example] if weighting == "sample" else unit
            error = f[example][unit] - (1.0 if unit == y[example] else 0.0)
            loss[example] += w[weighed_by] * error**2
            grad_f[(*example, unit)] = 2 * w[weighed_by] * error
            grad_w[weighed_by] += error**2
    return loss, grad_f, grad_w


WEIGHTINGS = pytest.mark.parametrize("weighting", ["sample", "unit"])


@WEIGHTINGS
@pytest.mark.parametrize("shape, num_classes", [((), 3), ((0,), 5), ((2, 3, 5), 7), ((9,), 1)], ids=str)
def test_squared_errors_and_their_derivatives_are_those_by_hand(weighting, shape, num_classes, x64):
    x, y, _, w = problem(shape, num_classes)
    w = w.at[0].set(0.0)  # which has a derivative too
    function = ft.partial(squared_error, weighting=weighting)
    loss, grad_x, grad_w = squared_by_hand(x, y, w, weighting)
    assert tree_allclose(jax.jit(function)(x, y, w), loss)
    gradients = jax.jit(jax.grad(lambda x, w: jnp.sum(function(x, y, w)), (0, 1)))(x, w)
    assert tree_allclose(gradients, (grad_x, grad_w))


@WEIGHTINGS
def test_squared_errors_without_weights_are_plain(weighting, x64):
    x, y, _, _ = problem((40,), 10)
    plain = np.sum((np.asarray(x) - np.eye(10)[y]) ** 2, -1)
    assert tree_allclose(squared_error(x, y, weighting=weighting), plain)
    assert tree_allclose(squared_error(x, y, jnp.ones(10), weighting=weighting), plain)


@WEIGHTINGS
def test_squared_errors_are_those_of_torch(torch, weighting, x64):
    x, y, _, _ = problem((40,), 10)
    torch_x, target = torch.tensor(np.array(x), requires_grad=True), torch.tensor(np.eye(10)[y])
    expected = torch.nn.functional.mse_loss(torch_x, target, reduction="none").sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), torch_x)
    function = ft.partial(squared_error, weighting=weighting)
    assert tree_allclose(function(x, y), expected.detach().numpy())
    assert tree_allclose(jax.grad(lambda x: function(x, y).sum())(x), gradient.numpy())


@WEIGHTINGS
@pytest.mark.parametrize("name", ["jvp of value and grad", "vmap of hessian"])
def test_derivatives_of_squared_errors_are_those_of_the_formula(weighting, name, x64):
    x, y, _, w = problem((4,), 3)
    y, w, dx, dw = y.at[1].set(-7).at[2].set(0), w.at[2].set(0.0), jnp.cos(x), jnp.sin(w)
    where, kept = jnp.array([True, False, True, True]), jnp.array([0, 2, 3])

    def ours(x, w):
        return jnp.sum(squared_error(x, y, w, weighting=weighting, where=where) ** 2)

    def theirs(x, w):
        x, target = x[kept], one_hot(y[kept], x)
        weight = (target @ w)[:, None] if weighting == "sample" else w[None]
        return jnp.sum(jnp.sum(weight * (x - target) ** 2, -1) ** 2)

    actual, expected = (jax.jit(ft.partial(DERIVATIVES[name], f))(x, w, dx, dw) for f in (ours, theirs))
    assert tree_allclose(actual, expected, rtol=1e-10, atol=1e-10)


@WEIGHTINGS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_squared_errors_of_low_precision_are_computed_and_returned_in_float32(weighting, dtype):
    x, y, _, w = problem((64,), 10)
    x, w = x.astype(dtype), w.astype(dtype)
    value, pullback = jax.vjp(lambda x: squared_error(x, y, w, weighting=weighting), x)
    (gradient,) = pullback(jnp.ones(64))
    loss, grad_x, _ = squared_by_hand(x, y, w, weighting)
    assert value.dtype == "float32" and gradient.dtype == dtype
    assert tree_allclose(value, loss, same_dtype=False, rtol=2e-6, atol=2e-6)
    assert tree_allclose(gradient, grad_x, same_dtype=False)


@WEIGHTINGS
def test_squared_errors_take_labels_of_any_integer_dtype(weighting):
    x, _, _, w = problem((6,), 300)
    y = jnp.array([0, 1, 44, 99, 126, 127])
    expected = squared_error(x, y, w, weighting=weighting)
    for dtype in ("int8", "uint8", "uint32"):
        assert tree_allclose(squared_error(x, y.astype(dtype), w, weighting=weighting), expected)


@WEIGHTINGS
@pytest.mark.parametrize("bad, bad_label", [(jnp.inf, -1), (jnp.nan, 2)])
def test_masked_squared_errors_give_exactly_nothing(weighting, bad, bad_label):
    x, y, _, w = problem((3, 2))
    where = jnp.array([[True, False], [False, True], [True, True]])

    @jax.jit
    def run(x, y):
        f = lambda x, w: squared_error(x, y, w, weighting=weighting, where=where)
        total = lambda x, w: jnp.sum(f(x, w))
        return f(x, w), jax.grad(total, (0, 1))(x, w), jax.jvp(jax.grad(total), (x, w), (jnp.ones_like(x), w))[1]

    clean = run(x, y)
    value, (grad_x, _), second = run(jnp.where(where[..., None], x, bad), jnp.where(where, y, bad_label))
    assert not np.any(value[~where]) and not np.any(grad_x[~where]) and not np.any(second[~where])
    assert tree_allclose((value, (grad_x, _), second), clean, rtol=0, atol=0)
    assert tree_allclose(value[where], squared_error(x, y, w, weighting=weighting)[where])


@WEIGHTINGS
@pytest.mark.parametrize("label, output", [(-1, 1.0), (5, jnp.inf), (2**31 - 1, jnp.nan)])
def test_the_squared_error_of_a_label_out_of_range_is_nan_without_gradient(weighting, label, output):
    x, y, _, w = problem()
    x, y = x.at[3].set(output), y.at[3].set(label)
    f = lambda x, w: squared_error(x, y, w, weighting=weighting)
    assert np.array_equal(np.isnan(f(x, w)), np.arange(7) == 3)
    grad_x, grad_w = jax.jit(jax.grad(lambda x, w: jnp.sum(f(x, w)), (0, 1)))(x, w)
    assert not np.any(grad_x[3]) and np.all(np.isfinite(grad_x)) and np.all(np.isfinite(grad_w))


def test_a_weight_of_zero_silences_an_infinite_squared_error():
    x = jnp.array([[0.5, -jnp.inf, 0.0], [0.5, 1e30, 0.0], [0.5, 2.0, 1.0]])
    w = jnp.array([1.0, 0.0, 2.0])
    sample, unit = (ft.partial(squared_error, weighting=weighting) for weighting in ("sample", "unit"))
    # The first two labels have no weight; the second class of unit-weighted errors has none.
    for function, labels, expected in ((sample, [1, 1, 0], [0.0, 0.0, 5.25]), (unit, [2, 2, 0], [2.25] * 3)):
        y = jnp.array(labels)
        assert tree_allclose(function(x, y, w), jnp.array(expected))
        total = lambda x, w, y=y, function=function: jnp.sum(function(x, y, w))
        derivatives = jax.jit(lambda x, w, f=total: (jax.grad(f, (0, 1))(x, w), jax.hessian(f)(x, w)))(x, w)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(derivatives))
    assert sample(x, jnp.array([0, 0, 0]), w)[0] == jnp.inf
    # Squares that are finite, but whose sum is not.
    assert sample(jnp.full((1, 3), 1.5e19), jnp.array([1]), w)[0] == 0


@pytest.mark.parametrize(
    "labels, weights, where, sentence",
    [
        ((5,), (3,), None, "outputs must have the batch shape of the labels.*got outputs of shape"),
        ((4, 1), (3,), None, "outputs must have the batch shape"),
        ((4,), (2,), None, "class_weights must hold one weight for each of the 3 classes"),
        ((4,), (3,), (1,), "where must have the batch shape"),
    ],
)
def test_shapes_that_do_not_fit_squared_errors_are_refused_without_type_checks(labels, weights, where, sentence):
    where = None if where is None else jnp.ones(where, bool)
    with pytest.raises(ValueError, match=sentence):
        undecorated(squared_error)(jnp.zeros((4, 3)), jnp.zeros(labels, int), jnp.ones(weights), where=where)


def test_an_unknown_weighting_is_refused_without_type_checks():
    with pytest.raises(ValueError, match='weighting must be "sample" or "unit", got \'class\''):
        undecorated(squared_error)(jnp.zeros((4, 3)), jnp.zeros(4, int), weighting="class")


BOTH = pytest.mark.parametrize("function", [softmax_cross_entropy, softmax_cross_entropy_with_soft_labels])


@BOTH
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_label_smoothing_out_of_range_is_refused(function, value):
    labels = jnp.zeros(2, int) if function is softmax_cross_entropy else jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
        function(jnp.zeros((2, 3)), labels, label_smoothing=value)


@BOTH
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_negative_z_loss_is_refused(function, value):
    labels = jnp.zeros(2, int) if function is softmax_cross_entropy else jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="z_loss must not be negative"):
        function(jnp.zeros((2, 3)), labels, z_loss=value)


@pytest.mark.parametrize(
    "labels, weights, where, sentence",
    [
        ((5,), (3,), None, "logits must have the batch shape"),
        ((4, 1), (3,), None, "logits must have the batch shape"),
        ((4,), (2,), None, "class_weights must hold one weight for each of the 3 classes"),
        ((4,), (4, 3), None, "class_weights must hold one weight"),
        ((4,), (3,), (1,), "where"),
        ((4,), (3,), (5,), "where"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_without_type_checks(labels, weights, where, sentence, monkeypatch):
    monkeypatch.setattr(eqx_dynloss.loss, "weighted_xent", undecorated(weighted_xent))
    where = None if where is None else jnp.ones(where, bool)
    with pytest.raises(ValueError, match=sentence):
        undecorated(softmax_cross_entropy)(jnp.zeros((4, 3)), jnp.zeros(labels, int), jnp.ones(weights), where=where)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2), (1, 3), (3,), ()], ids=str)
def test_soft_labels_of_another_shape_are_refused_without_type_checks(shape):
    with pytest.raises(ValueError, match="(?i)(logits|labels) must have the .*shape"):
        undecorated(softmax_cross_entropy_with_soft_labels)(jnp.zeros((4, 3)), jnp.zeros(shape))


def test_wrong_shapes_are_refused_in_this_package():
    with pytest.raises(Exception, match="(?s)Type-check error.*class_weights"):
        softmax_cross_entropy(jnp.zeros((4, 3)), jnp.zeros(4, int), jnp.ones(2))
