"""What every implementation of the weighted cross-entropy owes: values, every derivative, the edges of its domain."""

import eqx_dynloss_kernels
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_dynloss_kernels import weighted_xent
from jaxtyping import TypeCheckError

from ..helpers import DERIVATIVES, slow, tree_allclose

IMPLEMENTATIONS = ["xla", "pallas"]


class Xent:
    """An implementation under test. The kernel, which takes no float64, gets float32 in its place."""

    def __init__(self, implementation):
        self.implementation = implementation

    def __call__(self, logits, labels, class_weights, label_smoothing=0.0):
        x = logits.astype(jnp.float32) if self.is_pallas and logits.dtype == jnp.float64 else logits
        loss, lse = weighted_xent(
            x, labels, class_weights, label_smoothing=label_smoothing, implementation=self.implementation
        )
        return (loss.astype(logits.dtype), lse.astype(logits.dtype)) if x.dtype != logits.dtype else (loss, lse)

    def close(self, actual, expected, *, rtol=None, atol=None, same_dtype=True):
        if self.is_pallas:
            rtol, atol = max(rtol or 0, 1e-5), max(atol or 0, 1e-5)
        return tree_allclose(actual, expected, rtol=rtol, atol=atol, same_dtype=same_dtype)

    @property
    def is_pallas(self):
        return self.implementation == "pallas"


@pytest.fixture(params=IMPLEMENTATIONS)
def xent(request):
    if request.param == "pallas":
        request.getfixturevalue("interpreted")
    return Xent(request.param)


def oracle(logits, labels, class_weights, label_smoothing=0.0):
    """Optax × weights; use it in float64."""
    lse = jax.nn.logsumexp(logits, -1)
    if label_smoothing == 0:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels) * class_weights[labels]
    else:
        q = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
        loss = optax.softmax_cross_entropy(logits, q * jnp.broadcast_to(class_weights, logits.shape))
    return loss, lse


def by_formula(logits, labels, class_weights, label_smoothing, v):
    """NumPy, float64: loss, logsumexp, and the gradient of v · loss in the logits and in the class weights."""
    x, w, v = (np.asarray(a, np.float64) for a in (logits, class_weights, v))
    num_classes = x.shape[-1]
    q = (1 - label_smoothing) * (
        np.arange(num_classes) == np.asarray(labels)[..., None]
    ) + label_smoothing / num_classes
    shift = x.max(-1, keepdims=True)
    exps = np.exp(x - shift)
    log_total = np.log(exps.sum(-1, keepdims=True))
    nll = log_total - (x - shift)
    t = q * w
    loss = (t * np.where(t == 0, 0, nll)).sum(-1)
    grad_x = v[..., None] * (t.sum(-1, keepdims=True) * exps / exps.sum(-1, keepdims=True) - t)
    grad_w = (v[..., None] * q * np.where(q == 0, 0, nll)).reshape(-1, num_classes).sum(0)
    return loss, (shift + log_total)[..., 0], grad_x, grad_w


def problem(shape, num_classes, seed=0, scale=3.0):
    rng = np.random.RandomState(seed)
    logits = scale * rng.randn(*shape, num_classes)
    labels = np.asarray(rng.randint(num_classes, size=shape), np.int32)
    return logits, labels, rng.uniform(0.1, 2, num_classes), rng.randn(*shape)


def check_against_formula(xent, logits, labels, class_weights, v, label_smoothing, rtol, grad_rtol):
    @jax.jit
    def run(x, y, w, v):
        loss, lse = xent(x, y, w, label_smoothing)
        return loss, lse, jax.grad(lambda x, w: jnp.sum(v * xent(x, y, w, label_smoothing)[0]), argnums=(0, 1))(x, w)

    loss, lse, (grad_x, grad_w) = run(logits, labels, class_weights, v)
    assert (grad_x.dtype, grad_w.dtype) == (logits.dtype, class_weights.dtype)
    expected = by_formula(logits, labels, class_weights, label_smoothing, v)
    scale = max(1.0, np.abs(np.asarray(v)).max(initial=0) * np.asarray(class_weights, np.float64).max())
    assert tree_allclose(loss, expected[0], rtol=rtol, atol=rtol, same_dtype=False)
    assert tree_allclose(lse, expected[1], rtol=rtol, atol=rtol, same_dtype=False)
    assert tree_allclose(grad_x, expected[2], rtol=grad_rtol, atol=grad_rtol * scale, same_dtype=False)
    assert tree_allclose(grad_w, expected[3], rtol=grad_rtol, atol=10 * grad_rtol * scale, same_dtype=False)
    return loss, lse


@pytest.mark.parametrize(
    "shape, num_classes",
    [((), 1), ((7,), 1), ((), 3), ((0,), 2), ((7,), 2), ((2, 3, 5), 3), ((2, 0, 5), 10), ((64,), 10), ((2, 3), 1001)],
    ids=str,
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_every_batch_shape_and_number_of_classes(xent, shape, num_classes, label_smoothing):
    logits, labels, w, v = problem(shape, num_classes)
    args = (
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(labels),
        jnp.asarray(w, jnp.float32),
        jnp.asarray(v, jnp.float32),
    )
    loss, lse = check_against_formula(xent, *args, label_smoothing, 2e-6, 5e-6)
    assert loss.shape == lse.shape == shape and loss.dtype == lse.dtype == jnp.float32


@pytest.mark.parametrize("weights_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "dtype, result, rtol, grad_rtol",
    [
        ("float32", "float32", 2e-6, 5e-6),
        (
            "bfloat16",
            "float32",
            2e-6,
            4e-3,
        ),  # the loss is as good as float32; the gradient is rounded to the logits' dtype
        ("float16", "float32", 2e-6, 6e-4),
        ("float64", "float64", 1e-14, 1e-13),
    ],
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_every_dtype_is_as_accurate_as_it_can_be(xent, dtype, result, rtol, grad_rtol, weights_dtype, label_smoothing):
    if weights_dtype == "bfloat16":
        grad_rtol = max(grad_rtol, 4e-3)
    if xent.is_pallas and dtype == "float64":
        pytest.skip("the kernel takes no float64")
    with jax.enable_x64(dtype == "float64"):
        logits, labels, w, v = problem((64,), 10)
        w = jnp.asarray(w, dtype if dtype == "float64" and weights_dtype == "float32" else weights_dtype)
        args = (jnp.asarray(logits, dtype), jnp.asarray(labels), w, jnp.asarray(v, result))
        loss, lse = check_against_formula(xent, *args, label_smoothing, rtol, grad_rtol)
    assert loss.dtype == lse.dtype == result


@pytest.mark.parametrize("offset", [100.0, 1e4, -1e6])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_common_offset_of_the_logits_costs_no_accuracy(xent, offset, label_smoothing):
    logits, labels, w, v = problem((64,), 10)
    logits = jnp.asarray(np.round(logits * 4) / 4 + offset, jnp.float32)  # quarters: exact in float32
    args = (logits, jnp.asarray(labels), jnp.asarray(w, jnp.float32), jnp.asarray(v, jnp.float32))
    check_against_formula(xent, *args, label_smoothing, 2e-6, 1e-5)


# The implementations share the rules for derivatives: of an interpreted one those are enough that use it in other ways.
INTERPRETED = ["value", "grad", "jvp of value and grad", "vjp of grad", "scan", "vmap of hessian", "nested vmap"]


# Through rules that another of DERIVATIVES, or another test here, goes through as well.
OTHER_WAYS = ["grad of one at a time", "jvp of one at a time", "linearize", "linearize of grad", "jacrev of jacrev"]
OTHER_WAYS += ["vmap of jvp of grad"]


@pytest.mark.parametrize("name", [slow(name) if name in OTHER_WAYS else name for name in DERIVATIVES])
def test_every_derivative_is_that_of_optax_times_weights(xent, name, x64):
    if xent.is_pallas and name not in INTERPRETED:
        pytest.skip("the same rules as for plain JAX")
    logits, _, w, v = problem((5,), 4)
    rng = np.random.RandomState(1)
    w[1] = 0.0  # silenced, and yet the loss has a derivative in it
    labels = jnp.array([0, 1, 2, 1, 3])
    v, *args = (jnp.asarray(a) for a in (v, logits, w, rng.randn(5, 4), rng.randn(4)))

    def derivative(function):
        def f(x, w):
            (plain, lse), (smoothed, _) = (function(x, labels, w, label_smoothing) for label_smoothing in (0.0, 0.2))
            return jnp.sum(v * plain * (1 + 0.1 * plain)) + jnp.sum(smoothed**2) + 0.3 * jnp.sum(lse**2)

        return jax.jit(lambda *args: DERIVATIVES[name](f, *args))(*args)

    assert xent.close(derivative(xent), derivative(oracle), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["jvp", "jvp of value and grad", "vjp of grad"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_derivatives_in_low_precision_keep_dtypes(xent, name, dtype):
    logits, labels, w, _ = problem((5,), 4)
    rng = np.random.RandomState(1)
    x, dx = (jnp.asarray(a, dtype) for a in (logits, rng.randn(5, 4)))
    w, dw = (jnp.asarray(a, jnp.float32) for a in (w, rng.randn(4)))
    f = lambda x, w: jnp.sum(xent(x, jnp.asarray(labels), w)[0])
    actual = jax.jit(lambda *args: DERIVATIVES[name](f, *args))(x, w, dx, dw)
    g = lambda x, w: jnp.sum(oracle(x, jnp.asarray(labels), w)[0])
    with jax.enable_x64(True):
        expected = DERIVATIVES[name](g, *(jnp.asarray(np.asarray(a, np.float64)) for a in (x, w, dx, dw)))
    tolerance = {"float32": 1e-5, "bfloat16": 0.03, "float16": 4e-3}[dtype]
    assert xent.close(actual, expected, rtol=tolerance, atol=tolerance, same_dtype=False)


@pytest.mark.parametrize(
    "dtype, num_classes",
    [("int8", 10), ("int8", 128), ("int8", 1001), ("uint8", 10), ("uint8", 256), ("uint8", 1001)]  # more than fit
    + [("int16", 1001), ("uint16", 1001), ("int32", 10), ("uint32", 10), ("int64", 10)],
)
def test_every_label_dtype(xent, dtype, num_classes, x64):
    logits, labels, w, _ = problem((50,), num_classes)
    highest = min(num_classes - 1, int(np.iinfo(dtype).max))
    labels = np.minimum(labels, highest)
    labels[0] = highest
    loss, _ = jax.jit(xent)(jnp.asarray(logits), jnp.asarray(labels, dtype), jnp.asarray(w))
    assert xent.close(loss, by_formula(logits, labels, w, 0, np.ones(50))[0], same_dtype=False)


@pytest.mark.parametrize(
    "label, dtype",
    [(-1, "int32"), (-100, "int32"), (3, "int32"), (-3, "int8"), (127, "int8"), (255, "uint8"), (2**31 - 1, "int32")]
    + [(2**32 - 1, "uint32"), (2**32 + 1, "int64"), (-(2**32) + 1, "int64")],
)
@pytest.mark.parametrize("label_smoothing", [slow(0.0), 0.1])
def test_labels_out_of_range_give_nan_and_leave_the_others_alone(xent, label, dtype, label_smoothing, x64):
    labels = jnp.array([1, label, 2], dtype)
    x, w = jnp.ones((3, 3)), jnp.ones(3)
    loss, lse = jax.jit(xent, static_argnums=3)(x, labels, w, label_smoothing)
    assert np.array_equal(np.isnan(loss), [False, True, False])
    gradient = jax.grad(lambda x: jnp.sum(xent(x, labels, w, label_smoothing)[0]))(x)
    assert not gradient[1].any() and gradient[0].any() and gradient[2].any()
    assert xent.close(lse, jax.nn.logsumexp(x, -1))
    of_classes, _ = weighted_xent(x, labels, w, where=jnp.ones((3, 3), bool), label_smoothing=label_smoothing)
    assert np.array_equal(np.isnan(of_classes), [False, True, False])


def reduced_hessian(logits, label, weight):
    """w (diag p − p pᵀ)."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return weight * (np.diag(p) - np.outer(p, p))


@pytest.mark.parametrize("label", [0, 3])
def test_logits_of_minus_infinity_rule_a_class_out(xent, label, x64):
    x, y = jnp.array([0.3, -jnp.inf, 1.0, -0.5, -jnp.inf]), jnp.array(label)
    w = jnp.array([0.5, 2.0, 1.0, 1.5, 0.0])
    f = lambda x, w: xent(x, y, w)[0]
    loss, lse, grad_x, _ = by_formula(x, label, w, 0, 1.0)
    assert xent.close(xent(x, y, w), (loss, lse), same_dtype=False)
    assert xent.close(jax.grad(f)(x, w), grad_x, same_dtype=False)
    hessian = reduced_hessian(np.asarray(x), label, float(w[label]))
    for second in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: jax.jacrev(jax.jacfwd(f))):
        assert xent.close(jax.jit(second(f))(x, w), hessian, same_dtype=False)
    nll = np.zeros(5)
    nll[label] = loss / w[label]
    for jacobian in (jax.jacrev, jax.jacfwd):
        assert xent.close(jax.jit(jacobian(f, 1))(x, w), nll, same_dtype=False)
        assert np.all(np.isfinite(jax.jit(jacobian(jax.grad(f), 1))(x, w)))


def test_a_label_that_is_ruled_out_costs_infinitely_much_with_a_finite_gradient(xent):
    x, w = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([1.0, 2.0, 1.0])
    f = lambda x: xent(x, jnp.array(1), w)[0]
    assert f(x) == jnp.inf
    p = np.exp([0.0, -np.inf, 1.0]) / (1 + np.e)
    assert xent.close(jax.jit(jax.grad(f))(x), 2 * (p - [0, 1, 0]), same_dtype=False)
    assert np.all(np.isfinite(jax.jit(jax.hessian(f))(x)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_weight_of_zero_silences_an_infinite_loss(xent, label_smoothing, x64):
    x, w = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([1.0, 0.0, 2.0])
    for label in (0, 1):
        f = lambda x, label=label: xent(x, jnp.array(label), w, label_smoothing)[0]
        loss, _, grad_x, _ = by_formula(x, label, w, label_smoothing, 1.0)
        assert np.isfinite(loss)
        assert xent.close(f(x), loss, same_dtype=False)
        assert xent.close(jax.jit(jax.grad(f))(x), grad_x, same_dtype=False)
        assert np.all(np.isfinite(jax.jit(jax.hessian(f))(x)))
        value, tangent = jax.jvp(
            lambda x, w, label=label: xent(x, jnp.array(label), w, label_smoothing)[0],
            (x, w),
            (jnp.ones(3), jnp.array([1.0, 0.0, 1.0])),
        )
        assert np.isfinite(value) and np.isfinite(tangent)


def test_smoothing_over_a_class_that_is_ruled_out_is_infinite_with_a_finite_gradient(xent):
    x, w = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([1.0, 0.5, 2.0])
    f = lambda x: xent(x, jnp.array(0), w, 0.1)[0]
    assert f(x) == jnp.inf
    assert xent.close(jax.jit(jax.grad(f))(x), by_formula(x, 0, w, 0.1, 1.0)[2], same_dtype=False)


def test_a_weight_of_zero_still_has_a_derivative(xent):
    x, y, w = jnp.array([0.0, 1.0, 2.0]), jnp.array(1), jnp.array([1.0, 0.0, 1.0])
    f = lambda w: xent(x, y, w)[0]
    (value, gradient), (dvalue, _) = jax.jvp(jax.value_and_grad(f), (w,), (jnp.ones(3),))
    assert value == 0
    assert xent.close(gradient, jnp.array([0.0, 1.407606, 0.0]))
    assert xent.close(dvalue, jnp.array(1.407606))  # differentiating the rule gives what the rule gives


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(xent, size):
    x = jnp.array([[size, -size, 0.0], [-size, -size, -size], [size, size, 0.0]], jnp.float32)
    y, w = jnp.array([1, 0, 0]), jnp.array([1.0, 0.5, 2.0])
    f = lambda x: jnp.sum(xent(x, y, w)[0])
    loss, _ = xent(x, y, w)
    assert xent.close(loss, jnp.array([size, np.log(3), np.log(2)], jnp.float32))
    assert xent.close(jax.jit(jax.grad(f))(x), by_formula(x, y, w, 0, np.ones(3))[2], same_dtype=False)
    assert np.all(np.isfinite(jax.jit(jax.hessian(f))(x)))


def test_a_row_without_any_possible_class_is_nan_and_leaves_the_others_alone(xent):
    x = jnp.array([[-jnp.inf] * 3, [0.0, 1.0, 2.0], [0.0, jnp.inf, 0.0], [jnp.nan, 0.0, 0.0]])
    y, w = jnp.array([0, 1, 1, 2]), jnp.array([1.0, 0.5, 2.0])
    loss, lse = xent(x, y, w)
    assert np.array_equal(np.isnan(loss), [True, False, True, True])
    assert np.array_equal(lse[:3], np.asarray([-np.inf, jax.nn.logsumexp(x[1]), np.inf]))
    gradient = jax.grad(lambda x: jnp.sum(xent(x, y, w)[0]))(x)
    assert np.all(np.isfinite(gradient[1]))
    assert not np.any(np.isfinite(gradient[0]))


def test_losses_are_never_negative(xent):
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.randn(2000, 5) * np.exp(rng.uniform(-5, 8, (2000, 1))), jnp.float32)
    loss, _ = xent(x, jnp.argmax(x, -1), jnp.ones(5))
    assert np.all(np.asarray(loss) >= 0)


def test_an_unknown_implementation_is_refused():
    with pytest.raises((ValueError, TypeCheckError), match="implementation"):
        weighted_xent(jnp.zeros((1, 2)), jnp.zeros(1, int), jnp.ones(2), implementation="cuda")  # pyright: ignore


def test_wrong_shapes_are_refused_in_this_package():
    with pytest.raises(Exception, match="(?s)Type-check error.*labels"):
        eqx_dynloss_kernels.weighted_xent(jnp.zeros((4, 3)), jnp.zeros(5, int), jnp.ones(3))
