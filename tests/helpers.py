import functools as ft
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

_TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def tree_allclose(actual, expected, *, rtol=None, atol=None, same_dtype=True):
    """Whether two PyTrees have the same structure, shapes and (unless told not to look) dtypes, and close values.

    The tolerance, relative and absolute, is that of the coarser of the two dtypes. NaN is close to nothing.
    """
    leaves, structure = jax.tree.flatten(actual)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    if structure != expected_structure:
        return False
    return all(_close(*pair, rtol, atol, same_dtype) for pair in zip(leaves, expected_leaves, strict=True))


def _close(x, y, rtol, atol, same_dtype):
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape or (same_dtype and x.dtype != y.dtype):
        return False
    if not (jnp.issubdtype(x.dtype, jnp.inexact) or jnp.issubdtype(y.dtype, jnp.inexact)):
        return np.array_equal(x, y)
    tolerance = max(_TOLERANCE.get(dtype.name, 0.0) for dtype in (x.dtype, y.dtype))
    rtol, atol = (tolerance if given is None else given for given in (rtol, atol))
    return np.allclose(x.astype(np.float64), y.astype(np.float64), rtol=rtol, atol=atol)


def slow(*values):
    """A set of parameters that is only tested with `-m slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def undecorated(function):
    """The function as users have it who do not switch jaxtyping's checks on."""
    return inspect.unwrap(function)


def _scanned(f):
    """Twice f, summed by a scan whose body is rematerialised."""

    def summed(x, w):
        body = jax.checkpoint(lambda total, scale: (total + f(scale * x, w), None))
        return jax.lax.scan(body, jnp.zeros((), x.dtype), jnp.ones(2, x.dtype))[0]

    return summed


def _stack(x):
    return jnp.stack([x, 0.5 * x, -x])


_both = ft.partial(jax.grad, argnums=(0, 1))
_vg = ft.partial(jax.value_and_grad, argnums=(0, 1))
_fwd, _rev = ft.partial(jax.jacfwd, argnums=(0, 1)), ft.partial(jax.jacrev, argnums=(0, 1))

# Every way to differentiate a scalar function f(x, w) once or twice; dx and dw are tangents of x and w.
DERIVATIVES = {
    "value": lambda f, x, w, dx, dw: f(x, w),
    "grad": lambda f, x, w, dx, dw: _both(f)(x, w),
    "grad of one at a time": lambda f, x, w, dx, dw: (jax.grad(f)(x, w), jax.grad(f, 1)(x, w)),
    "jvp": lambda f, x, w, dx, dw: jax.jvp(f, (x, w), (dx, dw)),
    "jvp of one at a time": lambda f, x, w, dx, dw: (
        jax.jvp(lambda x: f(x, w), (x,), (dx,)),
        jax.jvp(lambda w: f(x, w), (w,), (dw,)),
    ),
    "linearize": lambda f, x, w, dx, dw: jax.linearize(f, x, w)[1](dx, dw),
    "vjp": lambda f, x, w, dx, dw: jax.vjp(f, x, w)[1](jnp.ones((), x.dtype)),
    "jvp of value and grad": lambda f, x, w, dx, dw: jax.jvp(_vg(f), (x, w), (dx, dw)),
    "grad of jvp": lambda f, x, w, dx, dw: _both(lambda x, w: jax.jvp(f, (x, w), (dx, dw))[1])(x, w),
    "vjp of grad": lambda f, x, w, dx, dw: jax.vjp(_both(f), x, w)[1]((dx, dw)),
    "jvp of jvp": lambda f, x, w, dx, dw: jax.jvp(lambda x, w: jax.jvp(f, (x, w), (dx, dw)), (x, w), (x * dx, w * dw)),
    "linearize of grad": lambda f, x, w, dx, dw: jax.linearize(_both(f), x, w)[1](dx, dw),
    "jacfwd of jacrev": lambda f, x, w, dx, dw: _fwd(_rev(f))(x, w),
    "jacrev of jacrev": lambda f, x, w, dx, dw: _rev(_rev(f))(x, w),
    "jacrev of jacfwd": lambda f, x, w, dx, dw: _rev(_fwd(f))(x, w),
    "scan": lambda f, x, w, dx, dw: jax.jvp(_vg(_scanned(f)), (x, w), (dx, dw)),
    "vmap, shared weights": lambda f, x, w, dx, dw: jax.vmap(_vg(f), (0, None))(_stack(x), w),
    "vmap, weights per member": lambda f, x, w, dx, dw: jax.vmap(_vg(f))(_stack(x), _stack(w)),
    "vmap, weights per member, shared logits": lambda f, x, w, dx, dw: jax.vmap(_vg(f), (None, 0))(x, _stack(w)),
    "vmap of jvp of grad": lambda f, x, w, dx, dw: jax.vmap(
        lambda x, w: jax.jvp(_both(f), (x, w), (dx, dw)), (0, None)
    )(_stack(x), w),
    "vmap of hessian": lambda f, x, w, dx, dw: jax.vmap(jax.hessian(f), (0, 0))(_stack(x), _stack(w)),
    "nested vmap": lambda f, x, w, dx, dw: jax.vmap(jax.vmap(_both(f), (0, None)), (None, 0))(_stack(x), _stack(w)),
    "grad of vmap": lambda f, x, w, dx, dw: _both(lambda x, w: jnp.sum(jax.vmap(f)(_stack(x), _stack(w)) ** 2))(x, w),
}
