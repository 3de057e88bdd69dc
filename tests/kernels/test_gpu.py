"""The Pallas kernel on a GPU: its numbers against float64, at full size, and whether `None` chooses well."""

import functools as ft
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_dynloss_kernels import weighted_xent
from eqx_dynloss_kernels.api import Implementation

from ..helpers import tree_allclose
from .test_weighted_xent import by_formula, problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fully_optimised"),
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="for NVIDIA GPUs: pytest -m gpu, where there is one"),
]

SHAPES = [(65537, 3), (65536, 10), (4097, 1000), (4096, 1001), (1023, 8192), (512, 32768), (129, 50257), (64, 262144)]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype, grad_rtol", [("float32", 1e-5), ("bfloat16", 8e-3), ("float16", 2e-3)])
@pytest.mark.parametrize("num_rows, num_classes", SHAPES)
def test_value_and_gradients_are_those_of_float64(num_rows, num_classes, dtype, grad_rtol, label_smoothing):
    x, labels, w, v = problem((num_rows,), num_classes)
    logits = jnp.asarray(x, dtype)
    args = jnp.asarray(labels), jnp.asarray(w, jnp.float32), jnp.asarray(v, jnp.float32)

    @jax.jit
    def run(x, y, w, v):
        xent = ft.partial(weighted_xent, label_smoothing=label_smoothing, implementation="pallas")
        return xent(x, y, w), jax.grad(lambda x: jnp.sum(v * xent(x, y, w)[0]))(x)

    (loss, lse), gradient = run(logits, *args)
    rounded = np.asarray(logits.astype(jnp.float32), np.float64)
    expected = by_formula(rounded, labels, np.asarray(args[1]), label_smoothing, np.asarray(args[2]))
    assert tree_allclose(loss, expected[0], rtol=1e-5, atol=1e-5, same_dtype=False)
    assert tree_allclose(lse, expected[1], rtol=2e-6, atol=2e-6, same_dtype=False)
    error = np.abs(np.asarray(gradient, np.float64) - expected[2])
    row = np.abs(v)[:, None] * w.max()  # what p − onehot, which cancels, is multiplied by
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    assert np.all(error <= grad_rtol * np.abs(expected[2]) + max(5e-7, 1e-2 * grad_rtol) * row + smallest)


def test_every_member_has_its_own_weights():
    x, y, _, _ = problem((8, 512), 1000)
    w = np.random.RandomState(2).uniform(0.1, 2, (8, 1000))
    loss, _ = jax.jit(jax.vmap(ft.partial(weighted_xent, implementation="pallas")))(
        jnp.asarray(x, jnp.float32), jnp.asarray(y), jnp.asarray(w, jnp.float32)
    )
    for member in range(8):
        expected = by_formula(x[member], y[member], w[member], 0, np.ones(512))[0]
        assert tree_allclose(loss[member], expected, rtol=1e-5, atol=1e-5, same_dtype=False)


def test_the_last_of_more_than_two_to_the_31_logits():
    shape = (17000, 131072)  # bfloat16: 4.5 GB
    logits = jax.jit(lambda: jnp.zeros(shape, jnp.bfloat16).at[-1, -1].set(20.0))()
    labels = jnp.full(shape[0], shape[1] - 1)
    loss, _ = jax.jit(ft.partial(weighted_xent, implementation="pallas"))(logits, labels, jnp.ones(shape[1]))
    assert tree_allclose(loss[:-1], jnp.full(shape[0] - 1, np.log(shape[1]), jnp.float32))
    assert tree_allclose(loss[-1], np.log(np.exp(20.0) + shape[1] - 1) - 20.0, same_dtype=False)


@pytest.mark.parametrize("num_rows, num_classes", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_none_does_not_choose_the_slower_implementation(num_rows, num_classes, dtype):
    """By a fifth, at most."""
    x, y, w, _ = problem((num_rows,), num_classes)
    args = jnp.asarray(x, dtype), jnp.asarray(y), jnp.asarray(w, jnp.float32)
    steps = {}
    for implementation in (None, *get_args(Implementation)):
        loss = lambda x, y, w, i=implementation: jnp.mean(weighted_xent(x, y, w, implementation=i)[0])
        steps[implementation] = jax.jit(jax.grad(loss)).lower(*args).compile()
    times = {implementation: [] for implementation in steps}
    for _ in range(30):
        for implementation, step in steps.items():
            jax.block_until_ready(step(*args))
            start = time.perf_counter()
            jax.block_until_ready([step(*args) for _ in range(20)])
            times[implementation].append(time.perf_counter() - start)
    medians = {implementation: np.median(times[implementation]) for implementation in times}
    assert medians[None] <= 1.2 * min(medians.values()), medians
