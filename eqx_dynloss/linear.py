"""The layers of an MLP in forms whose gradient XLA:CPU is fast at, when there is a batch of examples.

It folds transpositions into the products of a gradient, and then takes a slow path; barriers keep it from that. On the
spiral an update takes half the time for it.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

THIN = 4  # inputs, at most


def hidden_layer(layer: eqx.nn.Linear, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
    """`layer(x)`. Of few inputs, an infinite one makes every output NaN.

    The bias is then the weight of one more input: as the gradient of a `+` it would be a sum over the examples, which
    is slow. The product with the identity brings the examples to the last axis, `[inputs, examples]`, in which the
    gradient of the weights is a plain product of two matrices.
    """
    if len(x) > THIN:
        return layer(x)
    weight = layer.weight.T
    if layer.bias is not None:
        x = jnp.append(x, jnp.ones(1, x.dtype))
        weight = jnp.append(weight, layer.bias[None], 0)
    x = lax.optimization_barrier(jnp.eye(len(x), dtype=x.dtype) @ x)
    return lax.optimization_barrier(x @ weight)


def last_layer(layer: eqx.nn.Linear, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
    """`layer(x)`, whose outputs are not transposed with those of the rest of the batch."""
    product = lax.optimization_barrier(layer.weight @ x)
    return product if layer.bias is None else product + layer.bias
