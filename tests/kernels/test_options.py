"""Label smoothing and z-loss as operands: traced, mapped and differentiated, in every implementation."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from eqx_dynloss_kernels import weighted_xent

from ..helpers import slow, tree_allclose
from .test_triton import SEVERAL, W, X, Y, launches, lowered_for_cuda, struct
from .test_weighted_xent import problem


@pytest.fixture(params=[slow(None), "xla", "pallas"])  # on a CPU None is "xla"
def implementation(request):
    if request.param == "pallas":
        request.getfixturevalue("interpreted")
    return request.param


def oracle(x, y, w, smoothing, z):
    """Optax × weights, and the z-loss by its formula; use it in float64."""
    q = (1 - smoothing) * jax.nn.one_hot(y, x.shape[-1], dtype=x.dtype) + smoothing / x.shape[-1]
    loss = optax.softmax_cross_entropy(x, q * jnp.broadcast_to(w, q.shape))
    return loss + z * jax.nn.logsumexp(x, -1) ** 2


def arrays(num_classes=5, dtype=jnp.float32):
    x, y, w, v = problem((6,), num_classes)
    return jnp.asarray(x, dtype), jnp.asarray(y), jnp.asarray(w, dtype), jnp.asarray(v, dtype)


DERIVATIVES = {
    "value": lambda f: f,
    "gradient": lambda f: jax.grad(f, (0, 1, 2, 3)),
    "gradient in the options": lambda f: jax.grad(f, (2, 3)),
    "Jacobian": lambda f: jax.jacfwd(f, (0, 1, 2, 3)),
    "Hessian": lambda f: jax.hessian(f, (0, 1, 2, 3)),
    "Hessian, reverse": lambda f: jax.jacrev(jax.grad(f, (0, 1, 2, 3)), (0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_is_that_of_the_formula(name, implementation, x64):
    if implementation == "pallas" and name not in ("value", "gradient", "Hessian"):
        pytest.skip("the same rules as for plain JAX")
    x, y, w, v = arrays(dtype=jnp.float64)
    low = jnp.float32 if implementation == "pallas" else jnp.float64  # the kernel takes no float64

    def ours(x, w, smoothing, z):
        xent = ft.partial(weighted_xent, label_smoothing=smoothing, z_loss=z, implementation=implementation)
        return jnp.sum(v * xent(x.astype(low), y, w)[0].astype(x.dtype) ** 2)

    def theirs(x, w, smoothing, z):
        return jnp.sum(v * oracle(x, y, w, smoothing, z) ** 2)

    for smoothing, z in ((0.1, 0.01), (0.0, 0.0), (1.0, 2.0)):
        actual, expected = (
            jax.jit(DERIVATIVES[name](f))(x, w, jnp.asarray(smoothing), jnp.asarray(z)) for f in (ours, theirs)
        )
        tolerance = 1e-4 if implementation == "pallas" else 1e-10
        assert tree_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0, 0), (0, 0, None, 0, None), (None, None, None, 0, 0), (0, 0, 0, None, 0)])
def test_every_member_has_options_of_its_own(axes, implementation):
    x, y, w, _ = arrays()
    smoothing, z = jnp.array([0.0, 0.1, 1.0]), jnp.array([0.5, 0.0, 0.01])
    args = jnp.stack([x, 2 * x, -x]), jnp.stack([y, y[::-1], y]), jnp.stack([w, w**2, w + 1]), smoothing, z
    args = [a if axis == 0 else a[1] for a, axis in zip(args, axes, strict=True)]

    def loss(x, y, w, smoothing, z):
        return weighted_xent(x, y, w, label_smoothing=smoothing, z_loss=z, implementation=implementation)[0]

    gradient = lambda *args: jax.grad(lambda x, w, s, z: loss(x, args[1], w, s, z).sum(), (0, 1, 2, 3))(
        args[0], *args[2:]
    )
    values, gradients = (jax.jit(jax.vmap(f, axes))(*args) for f in (loss, gradient))
    for i in range(3):
        own = [a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)]
        assert tree_allclose(values[i], oracle(*own), rtol=1e-5, atol=1e-5)
        alone = gradient(*own)
        assert tree_allclose(jax.tree.map(lambda a, i=i: a[i], gradients), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outer", [(None, None, 0, 0), (None, None, 0, None), (0, 0, None, None)], ids=str)
@pytest.mark.parametrize("inner", [(0, 0, None, None), (0, None, None, 0), (None, None, 0, 0)], ids=str)
def test_members_of_members(outer, inner, implementation):
    x, y, w, _ = arrays()
    args = []
    for array, *axes in zip((x, w, jnp.array(0.1), jnp.array(0.2)), outer, inner, strict=True):
        sizes = [1 if axis is None else n for axis, n in zip(axes, (3, 2), strict=True)]
        scales = 1 + jnp.arange(float(np.prod(sizes))).reshape(sizes)
        args.append(jnp.expand_dims(array, (0, 1)) * jnp.expand_dims(scales, tuple(range(2, array.ndim + 2))))

    def loss(x, w, smoothing, z):
        return weighted_xent(x, y, w, label_smoothing=smoothing, z_loss=z, implementation=implementation)[0]

    def only(indices):  # the axes that are mapped are kept, the others have one entry
        return [a[tuple(i if a.shape[k] > 1 else 0 for k, i in enumerate(indices))] for a in args]

    mapped = [a[:, 0] if i is None else a for a, i in zip(args, inner, strict=True)]
    mapped = [a[0] if o is None else a for a, o in zip(mapped, outer, strict=True)]
    values = jax.jit(jax.vmap(jax.vmap(loss, inner), outer))(*mapped)
    for i in range(3):
        for j in range(2):
            one_x, one_w, smoothing, z = only((i, j))
            assert tree_allclose(values[i, j], oracle(one_x, y, one_w, smoothing, z), rtol=1e-5, atol=1e-5)


def test_a_traced_zero_is_as_good_as_a_known_one(implementation):
    """Also where a smoothing of more than 0 would make the loss infinite."""
    x, y, w, _ = arrays()
    x = x.at[0, (y[0] + 1) % 5].set(-jnp.inf)
    known = lambda x, w: weighted_xent(x, y, w, implementation=implementation)
    traced = lambda x, w, s, z: weighted_xent(x, y, w, label_smoothing=s, z_loss=z, implementation=implementation)
    total = lambda f: lambda x, w, *options: f(x, w, *options)[0].sum()
    assert tree_allclose(jax.jit(traced)(x, w, 0.0, 0.0), known(x, w), rtol=0, atol=0)
    gradients = (jax.jit(jax.grad(total(f), (0, 1)))(x, w, *o) for f, o in ((traced, (0.0, 0.0)), (known, ())))
    assert tree_allclose(*gradients)


@pytest.mark.parametrize("zero", [0, 0.0, np.float64(0), np.zeros(()), jnp.zeros(())], ids=lambda zero: str(type(zero)))
def test_a_known_zero_costs_nothing(zero):
    x, y, w, _ = arrays()
    program = lambda **options: str(jax.make_jaxpr(lambda x, w: weighted_xent(x, y, w, **options))(x, w))
    assert program(label_smoothing=zero, z_loss=zero) == program()
    assert program(label_smoothing=0.1) != program() != program(z_loss=0.1)


@pytest.mark.parametrize("name, bad", [("label_smoothing", 1.5), ("label_smoothing", -0.1), ("z_loss", -1.0)])
def test_out_of_range_is_refused_if_it_is_known_and_nan_if_it_is_traced(name, bad, implementation):
    x, y, w, _ = arrays()
    xent = lambda **options: weighted_xent(x, y, w, implementation=implementation, **options)[0]
    with pytest.raises(ValueError, match=f"{name} must"):
        xent(**{name: bad})
    constant = jnp.asarray(bad)
    with pytest.raises(ValueError, match=f"{name} must"):
        jax.jit(lambda: xent(**{name: constant}))()
    assert np.all(np.isnan(jax.jit(lambda value: xent(**{name: value}))(bad)))
    with pytest.raises(Exception, match=name):
        xent(**{name: jnp.zeros(6)})


def test_traced_options_are_operands_of_the_one_launch():
    def loss(x, y, w, smoothing, z):
        return weighted_xent(x, y, w, label_smoothing=smoothing, z_loss=z)[0]

    def step(*args):
        return jax.grad(lambda x, w, s, z: jnp.mean(loss(x, args[1], w, s, z)), (0, 1, 2, 3))(args[0], *args[2:])

    one, each = struct(()), struct((8,))
    for function in (loss, step):
        assert launches(lowered_for_cuda(function, X, Y, W, one, one)) == [(512, "512x1000xf32")]
        assert launches(lowered_for_cuda(jax.vmap(function), *SEVERAL, each, each)) == [(4096, "4096x1000xf32")]
        shared = jax.vmap(function, (0, 0, None, None, 0))
        assert launches(lowered_for_cuda(shared, *SEVERAL[:2], W, one, each)) == [(4096, "4096x1000xf32")]
