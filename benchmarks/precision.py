"""How far the gradients of Myrtle5 are from those in float64."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights


def gradient_errors(
    width: int, size: int, compute_dtype: str | None = None, precision: str | None = None, num_images: int = 64
) -> dict[str, float]:
    """Relative errors (norms over all elements) of the gradient of every parameter, by name, on the default device.

    **Arguments:**

    - `width`, `size`, `num_images`: of the network, of the images, and how many.
    - `compute_dtype`: as for `Myrtle`.
    - `precision`: of products of float32 (`jax.default_matmul_precision`).
    """
    model = Myrtle(width, compute_dtype=compute_dtype, key=jr.key(0))
    images = np.random.default_rng(0).normal(1, 1, (num_images, size, size, 3))
    with jax.default_matmul_precision(precision):
        actual = _gradient(model, jnp.asarray(images, jnp.float32))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        like = jax.tree.structure(eqx.filter_eval_shape(Myrtle, width, key=jr.key(0)))
        leaves = [jnp.asarray(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(model)]
        exact = _gradient(jax.tree.unflatten(like, leaves), jnp.asarray(images))
    return {
        jax.tree_util.keystr(path): _relative_error(np.asarray(ours, np.float64), np.asarray(theirs))
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(exact), strict=True)
    }


@eqx.filter_jit
def _gradient(model: Myrtle, images: jax.Array) -> Myrtle:
    """Of a dynamical loss, with labels of two classes, while another one is at its peak."""
    loss, labels = DynamicalLoss(OscillatingWeights(10, 3.0, 5)), np.arange(len(images)) % 2
    return jax.grad(lambda model: loss(jax.vmap(model)(images), labels, 2))(model)


def _relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
