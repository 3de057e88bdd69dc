"""Ways to write the convolutions of several members, from which `eqx_dynloss.convolution` has chosen.

The arithmetic is the same in all. Every form takes images `[members, batch, height, width, channels]` and kernels
`[members, 3, 3, channels, channels]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eqx_dynloss.convolution import conv3x3

Form = Callable[[Array, Array], Array]


def ours(x: Array, k: Array) -> Array:
    """`conv3x3`, of one member. Inside a network its channels are where a GPU wants them, last, in any case."""
    return conv3x3(x.transpose(0, 3, 1, 2), k).transpose(0, 2, 3, 1)


def plain(x: Array, k: Array) -> Array:
    """XLA's own convolution, of one member."""
    return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def nine_products(x: Array, k: Array) -> Array:
    """A product of matrices for each of the nine places of the kernel."""
    return sum((_product(window, k[:, n // 3, n % 3]) for n, window in enumerate(_windows(x))), jnp.zeros((), x.dtype))


def product_of_patches(x: Array, k: Array) -> Array:
    """One product of matrices a member, with the nine neighbours of every pixel side by side."""
    return _product(jnp.concatenate(_windows(x), -1), k.reshape(len(k), 9 * k.shape[3], k.shape[4]))


FORMS: dict[str, Form] = {
    "ours, mapped": jax.vmap(ours),
    "grouped": jax.vmap(plain),
    "nine batched products": nine_products,
    "batched product of patches": product_of_patches,
}


def with_gradients(form: Form) -> Callable[[Array, Array, Array], Any]:
    """The form as a function of images, kernels and the output's cotangent: its output and both gradients."""

    def function(x, k, dy):
        y, pullback = jax.vjp(form, x, k)
        return y, pullback(dy)

    return function


def _windows(x: Array) -> list[Array]:
    height, width = x.shape[2:4]
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]


def _product(x: Array, matrices: Array) -> Array:
    return jnp.einsum("snhwi,sio->snhwo", x, matrices)
