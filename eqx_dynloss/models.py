"""The papers' two networks. Both take one example; `jax.vmap(model)` takes a batch, as everywhere in Equinox."""

from typing import Literal

import equinox as eqx
import jax
import jax.nn.initializers as jinit
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from .convolution import conv3x3
from .linear import hidden_layer, last_layer


class MLP(eqx.Module):
    """A fully connected ReLU network: the paper's for the spiral with 2 inputs, width 100 and 3 outputs.

    With up to four inputs, an infinite one makes every output NaN on a CPU (see `eqx_dynloss.linear`).
    """

    layers: tuple[eqx.nn.Linear, ...]

    def __init__(
        self,
        in_size: int,
        width: int,
        out_size: int,
        *,
        depth: int = 1,
        init: Literal["paper", "glorot"] = "paper",
        use_bias: bool = True,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `in_size`, `width`, `out_size`: numbers of inputs, of units in every hidden layer, and of outputs.
        - `depth`: the number of hidden layers.
        - `init`: `"paper"` draws weights from N(0, 1/fan_in) and starts the biases at 0; `"glorot"` draws weights from
            the truncated Glorot normal distribution and biases from N(0, 0.01²). The biases are trained in both.
        - `use_bias`: whether there are biases at all. On the spiral, without them, the network stays at chance.
        """
        if init not in ("paper", "glorot"):
            raise ValueError(f'init must be "paper" or "glorot", got {init!r}.')
        sizes = (in_size, *([width] * depth), out_size)
        keys = jr.split(key, depth + 1)
        self.layers = tuple(
            _linear(i, o, init, use_bias, key=k) for i, o, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
        )

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, " out_size"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(hidden_layer(layer, x))
        return last_layer(last, x)


class Convolution(eqx.Module):
    """A 3×3 convolution with bias, He-normal weights and biases that start at 0. Channels first."""

    kernel: Float[Array, "3 3 in_channels out_channels"]
    bias: Float[Array, " out_channels"]

    def __init__(self, in_channels: int, out_channels: int, *, key: PRNGKeyArray):
        # Drawn as a matrix, which gives the same numbers: the random bits of four axes take XLA:CPU seconds to compile.
        matrix = jinit.he_normal()(key, (9 * in_channels, out_channels), float)
        self.kernel = matrix.reshape(3, 3, in_channels, out_channels)
        self.bias = jnp.zeros(out_channels)

    def __call__(self, x: Float[Array, "in_channels height width"]) -> Float[Array, "out_channels height width"]:
        """In the dtype of `x`."""
        return _add_bias(conv3x3(x, self.kernel.astype(x.dtype)), self.bias)


@jax.custom_jvp
def _add_bias(
    x: Float[Array, "channels height width"], bias: Float[Array, " channels"]
) -> Float[Array, "channels height width"]:
    return x + jnp.broadcast_to(bias[:, None, None], x.shape).astype(x.dtype)


@_add_bias.defjvp
def _(primals, tangents):
    (x, bias), (dx, dbias) = primals, tangents
    # In the dtype of the bias, in which its gradient is then a sum over images and pixels: in bfloat16 it is far off.
    wide = dx.astype(bias.dtype) + jnp.broadcast_to(dbias[:, None, None], x.shape)
    return _add_bias(x, bias), wide.astype(x.dtype)


class Myrtle(eqx.Module):
    """Myrtle5, the paper's network for CIFAR-10: four 3×3 convolutions of constant width and a linear layer.

    conv-ReLU, conv-ReLU, pool, conv-ReLU, pool, conv-ReLU, then the mean over what is left of the image, and a linear
    layer; pools are 2×2 means. No normalisation, no dropout. At width 64: 112,960 weights and 266 biases. The
    initialisation (He-normal, zero biases) is this library's choice; the paper does not state one.

    The images and activations, and the products and their gradients, may have another dtype than the parameters; the
    sums over images and pixels that are the biases' gradients, the last mean and the linear layer keep the parameters'.

    ??? cite

        Shankar et al.: *Neural Kernels Without Tangents*, ICML 2020.
    """

    convolutions: tuple[Convolution, ...]
    head: eqx.nn.Linear
    compute_dtype: np.dtype | None = eqx.field(static=True)

    def __init__(
        self,
        width: int = 64,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        compute_dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `width`, `in_channels`, `num_classes`: channels of every convolution and of the images, and outputs.
        - `compute_dtype`: of everything up to the last mean; `None` is that of the parameters, float32.
            `jnp.bfloat16` is for GPUs: on a CPU it takes as long as float32, or longer.
        """
        self.compute_dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
        keys = jr.split(key, 5)
        channels = (in_channels, width, width, width)
        self.convolutions = tuple(Convolution(c, width, key=k) for c, k in zip(channels, keys[:4], strict=True))
        self.head = _linear(width, num_classes, "he", key=keys[4])

    def __call__(self, x: Float[Array, "height width in_channels"]) -> Float[Array, " num_classes"]:
        """`x` is one image, as it is stored, channels last; its height and width divisible by 4."""
        first, second, third, fourth = self.convolutions
        x = x.transpose(2, 0, 1).astype(self.compute_dtype or self.head.weight.dtype)
        x = _relu(first(x))
        x = _pool(_relu(second(x)))
        x = _pool(_relu(third(x)))
        x = _relu(fourth(x))
        return self.head(jnp.mean(x.astype(self.head.weight.dtype), (1, 2)))


@jax.custom_jvp
def _relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """ReLU, differentiated by its output: a GPU then fuses it into the convolution, whose own output nobody needs."""
    return jnp.maximum(x, 0)


@_relu.defjvp
def _(primals, tangents):
    y, (dx,) = _relu(*primals), tangents
    return y, jnp.where(y != 0, dx, 0)  # XLA would make x > 0 of y > 0


@jax.custom_jvp
def _pool(x: Float[Array, "channels height width"]) -> Float[Array, "channels height/2 width/2"]:
    """The mean of every 2×2 pixels. As sums of slices, which XLA:CPU fuses with the ReLU before them."""
    x = _squares(x)
    return 0.25 * ((x[:, :, 0, :, 0] + x[:, :, 0, :, 1]) + (x[:, :, 1, :, 0] + x[:, :, 1, :, 1]))


@_pool.defjvp
def _(primals, tangents):
    # The transpose of a mean is a broadcast, which is fused as well; that of slices is not.
    return _pool(*primals), jnp.mean(_squares(*tangents), (2, 4))


def _squares(x: Float[Array, "channels height width"]) -> Float[Array, "channels height/2 2 width/2 2"]:
    channels, height, width = x.shape
    return x.reshape(channels, height // 2, 2, width // 2, 2)


def _linear(in_size: int, out_size: int, init: str, use_bias: bool = True, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    wkey, bkey = jr.split(key)
    axes = {"in_axis": 1, "out_axis": 0}
    draw = {
        "paper": jinit.variance_scaling(1.0, "fan_in", "normal", **axes),
        "glorot": jinit.glorot_normal(**axes),
        "he": jinit.he_normal(**axes),
    }[init]
    weight = draw(wkey, (out_size, in_size), float)
    bias = 0.01 * jr.normal(bkey, (out_size,)) if init == "glorot" else jnp.zeros(out_size)
    linear = eqx.nn.Linear(in_size, out_size, use_bias, key=key)
    linear = eqx.tree_at(lambda layer: layer.weight, linear, weight)
    return eqx.tree_at(lambda layer: layer.bias, linear, bias) if use_bias else linear
