"""How far the gradients of Myrtle5 are from those in float64."""

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
    rng = np.random.default_rng(0)
    images, labels = rng.normal(1, 1, (num_images, size, size, 3)), np.arange(num_images) % 2
    loss = DynamicalLoss(OscillatingWeights(10, 3.0, 5))

    def gradient(model, images):
        return jax.jit(jax.grad(lambda model: loss(jax.vmap(model)(images), labels, 2)))(model)

    model = Myrtle(width, compute_dtype=compute_dtype, key=jr.key(0))
    with jax.default_matmul_precision(precision):
        actual = gradient(model, jnp.asarray(images, jnp.float32))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        like = jax.tree.structure(Myrtle(width, key=jr.key(0)))
        leaves = [jnp.asarray(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(model)]
        exact = gradient(jax.tree.unflatten(like, leaves), jnp.asarray(images))
    return {
        jax.tree_util.keystr(path): _relative_error(np.asarray(ours, np.float64), np.asarray(theirs))
        for (path, ours), theirs in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(exact), strict=True)
    }


def _relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
