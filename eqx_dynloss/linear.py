"""The layers of an MLP in forms whose gradient is fast, when there is a batch of examples.

XLA:CPU folds transpositions into the products of a gradient, and then takes a slow path; barriers keep it from that. On
the spiral an update takes half the time for it. Elsewhere, layers of few inputs or outputs are sums of products, which
XLA fuses with what stands before and after them: compiled for an H100, an update of 344 networks on the spiral moves
103 MB, and 351 with matrix products.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

THIN = 4  # inputs or outputs, at most


def hidden_layer(layer: eqx.nn.Linear, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
    """`layer(x)`. Of few inputs, an infinite one makes every output NaN on a CPU."""
    if len(x) > THIN:
        return layer(x)
    return lax.platform_dependent(layer.weight, layer.bias, x, cpu=_few_inputs_cpu, default=_few_inputs)


def last_layer(layer: eqx.nn.Linear, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
    """`layer(x)`, whose outputs are not transposed with those of the rest of the batch."""
    few = len(layer.weight) <= THIN
    product = lax.platform_dependent(layer.weight, x, cpu=_product_cpu, default=_few_outputs if few else jnp.matmul)
    return product if layer.bias is None else product + layer.bias


def _few_inputs(weight, bias, x):
    products = [column * one for column, one in zip(weight.T, x, strict=True)]
    return sum(products[1:], products[0]) if bias is None else sum(products, bias)


def _few_inputs_cpu(weight, bias, x):
    """The same. The bias is the weight of one more input: as the gradient of a `+` it would be a sum over the examples,
    which is slow. The product with the identity brings the examples to the last axis, `[inputs, examples]`, in which
    the gradient of the weights is a plain product of two matrices.
    """
    weight = weight.T
    if bias is not None:
        x = jnp.append(x, jnp.ones(1, x.dtype))
        weight = jnp.append(weight, bias[None], 0)
    x = lax.optimization_barrier(jnp.eye(len(x), dtype=x.dtype) @ x)
    return lax.optimization_barrier(x @ weight)


def _few_outputs(weight, x):
    return jnp.sum(weight * jnp.broadcast_to(x, weight.shape), 1)


def _product_cpu(weight, x):
    return lax.optimization_barrier(weight @ x)
