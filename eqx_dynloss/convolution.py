"""A 3×3 convolution that stays fast in a scan, under vmap over models, and under both.

`lax.conv_general_dilated` has three traps on a CPU. The weight gradient that autodiff makes of it is a convolution in a
layout for which XLA:CPU has no fast code inside `lax.scan` (one to two orders of magnitude slower). `vmap` over kernels
makes a grouped convolution, slower than a Python loop over the models. And channels are the long side of its product:
16 of them reach half the speed of 64.

A convolution, its input gradient and its weight gradient are three bilinear maps, and each is a transpose of the other
two. Here they are three primitives that say so: JAX derives every derivative in every mode from that, each in a form
that XLA is fast on; on a CPU products of matrices, whose long side are pixels. Under `vmap`, one batched operand is
folded into an axis that the other does not share (images into the batch, kernels into the output channels); two batched
operands are mapped over, one kernel after another. On a GPU as well: for a layer of eight members an H100 takes as long
for that as for a grouped convolution, with a fifth of the temporary memory, and half as long as for batched matrix
products (`benchmarks/records/h100.json`).

Channels come first, as everywhere in Equinox. On a GPU, XLA puts them last by itself.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
from eqx_dynloss_kernels.operands import accumulation_dtype
from eqx_dynloss_kernels.primitives import run, vary_alike
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def conv3x3(
    images: Float[Array, "*batch in_channels height width"],
    kernel: Float[Array, "3 3 in_channels out_channels"],
) -> Float[Array, "*batch out_channels height width"]:
    """Convolution with zero padding (SAME) and stride 1; channels first, as in Equinox, any batch shape.

    The same function as `lax.conv_general_dilated(images, kernel, (1, 1), "SAME",
    dimension_numbers=("NCHW", "HWIO", "NCHW"))`, with every derivative, `vmap`, `scan` and `remat`.

    **Arguments:**

    - `images`: `[..., I, H, W]`.
    - `kernel`: `[3, 3, I, O]`, of the same dtype.

    **Returns:** `[..., O, H, W]`.
    """
    if images.ndim < 3 or kernel.ndim != 4 or kernel.shape[:3] != (3, 3, images.shape[-3]):
        raise ValueError(
            "images must have shape [..., in_channels, height, width] and the kernel [3, 3, in_channels, "
            f"out_channels], got {images.shape} and {kernel.shape}."
        )
    flat = images.reshape(math.prod(images.shape[:-3]), *images.shape[-3:])
    out = _conv_p.bind(*vary_alike(flat, kernel))
    return out.reshape(*images.shape[:-3], *out.shape[1:])


def _conv(x, k):
    """[N,I,H,W], [3,3,I,O] → [N,O,H,W]"""
    return _plain(_at_least_8_channels(x, 1), _at_least_8_channels(k, 2), ("NCHW", "HWIO", "NCHW"))


def _input_grad(dy, k):
    """[N,O,H,W], [3,3,I,O] → [N,I,H,W]: a convolution with the kernel flipped and its channels swapped."""
    return _conv(dy, _transposed(k))


def _weight_grad(x, dy):
    """[N,I,H,W], [N,O,H,W] → [3,3,I,O]: channels play the part of the batch, and the batch that of the channels.

    A GPU sums in float32 by itself: asked for a float32 result, it would first write float32 copies of both operands.
    """
    return _plain(_at_least_8_channels(x, 1), dy, ("CNHW", "IOHW", "HWNC"))[:, :, : x.shape[1]]


def _plain(x, k, dimension_numbers):
    return lax.conv_general_dilated(x, k, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dimension_numbers)


def _transposed(k):
    return k[::-1, ::-1].swapaxes(2, 3)


def _at_least_8_channels(x, axis):
    """Numbers of 16 bits with zeros up to 8 channels: for fewer, cuDNN has slow tensor-core kernels or none."""
    missing = max(0, 8 - x.shape[axis]) if x.dtype.itemsize == 2 else 0
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


CACHED = 2**17  # numbers: 512 KiB in float32


def _conv_cpu(x, k):
    """The same, as a product for every image: of all rows of the kernel with the image and its left and right
    neighbours. What comes of the three rows is then added, each moved by one row of the image more than the last.

    From 16 to 16 channels, 8 images of 32×32 take one core 0.49 ms, and XLA's convolution 0.78 (jax 0.12; AVX-512).
    """
    _, in_channels, height, width = x.shape
    out_channels = k.shape[3]
    # Concatenated, which XLA does once before a loop over images; a transposition alone it would repeat in it.
    rows = jnp.concatenate([k[i].transpose(2, 0, 1).reshape(out_channels, 3 * in_channels) for i in range(3)])

    def some(x):
        parts = _products(jnp.broadcast_to(rows, (len(x), *rows.shape)), _columns(x), ((2,), (1,)))
        above, beside, below = jnp.moveaxis(parts.reshape(len(x), 3, out_channels, height * width), 1, 0)
        out = lax.optimization_barrier(_down(above, width) + beside + _down(below, -width))
        return out.astype(x.dtype).reshape(len(x), out_channels, height, width)

    parts = _cached_parts(x, max(in_channels, out_channels))
    return some(x) if len(parts) < 2 else lax.map(some, parts).reshape(len(x), out_channels, height, width)


def _input_grad_cpu(dy, k):
    return _conv_cpu(dy, _transposed(k))


def _weight_grad_cpu(x, dy):
    """The same, as a product for every image: of the image and its left and right neighbours, which are there already
    from `_conv_cpu`, with the gradient and what is above and below. In float32 for 16-bit inputs, as it sums over
    many images and pixels.

    From 16 to 16 channels, 8 images of 32×32 take one core 0.56 ms, and XLA's convolution 0.80.
    """
    in_channels, out_channels = x.shape[1], dy.shape[1]
    some = lambda x, dy: jnp.sum(_products(_columns(x), _rows(dy), ((2,), (2,))), 0)
    parts = tuple(_cached_parts(a, max(in_channels, out_channels)) for a in (x, dy))
    if len(parts[0]) < 2:
        total = some(x, dy)
    else:
        like = some(x[:0], dy[:0])  # zeros, as shard_map wants them
        total, _ = lax.scan(lambda total, part: (total + some(*part), None), like, parts)
    return total.reshape(3, in_channels, 3, out_channels).transpose(2, 0, 1, 3)[::-1].astype(x.dtype)


def _products(a, b, contracting):
    """Of matrices, one for every image."""
    dimensions = (contracting, ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, preferred_element_type=accumulation_dtype(a.dtype))


def _columns(x):
    """[N,C,H,W] → [N,3C,H·W]: every pixel's left neighbour, itself, its right neighbour."""
    column = np.arange(x.shape[2] * x.shape[3]) % x.shape[3]
    left, here, right = _neighbours(x, 1)
    left, right = jnp.where(column > 0, left, 0), jnp.where(column < x.shape[3] - 1, right, 0)
    return jnp.concatenate([left, here, right], 1)


def _rows(x):
    """[N,C,H,W] → [N,3C,H·W]: what is above every pixel, itself, what is below."""
    return jnp.concatenate(_neighbours(x, x.shape[3]), 1)


def _neighbours(x, distance):
    """[N,C,H,W] → three times [N,C,H·W]: what is so far before each pixel in a row of all, itself, what is after."""
    num_images, channels, height, width = x.shape
    pixels = height * width
    padded = jnp.pad(x.reshape(num_images, channels, pixels), ((0, 0), (0, 0), (distance, distance)))
    padded = lax.optimization_barrier(padded)  # or XLA computes what x is made of three times
    return [padded[..., start : start + pixels] for start in (0, distance, 2 * distance)]


def _down(x, pixels):
    """Images, whose pixels are one axis, moved along it; zeros come after them."""
    return lax.pad(x, jnp.zeros((), x.dtype), [*[(0, 0, 0)] * (x.ndim - 1), (pixels, -pixels, 0)])


def _cached_parts(x, channels):
    """[N,…] → [parts,N/parts,…]: three copies of a part, with so many channels, stay in the cache."""
    num_images, _, height, width = x.shape
    most = max(1, CACHED // (3 * channels * height * width))
    size = next((n for n in range(min(most, num_images), 0, -1) if num_images % n == 0), 1)
    return x.reshape(num_images // size, size, *x.shape[1:])


def _primitive(name, function, cpu_function, free_axes, output_axes):
    """A bilinear map of two operands as a primitive.

    `free_axes` holds, for each operand, its axis that the other operand does not share; `output_axes`, where that axis
    is in the output.
    """
    primitive = Primitive(name)
    primitive.def_impl(ft.partial(run, primitive))

    @primitive.def_abstract_eval
    def _(a, b):
        out = jax.eval_shape(function, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (a, b)))
        return a.update(shape=out.shape, dtype=out.dtype, weak_type=False)

    def batch(operands, axes):
        operands = [v if axis is None else jnp.moveaxis(v, axis, 0) for v, axis in zip(operands, axes, strict=True)]
        if None not in axes:
            return lax.map(lambda pair: primitive.bind(*pair), tuple(operands)), 0
        which = int(axes[0] is None)
        free, output = free_axes[which], output_axes[which]
        batched = operands[which]
        size, *shape = batched.shape
        # [B, …, F, …] → […, B·F, …], and back in the output
        operands[which] = jnp.moveaxis(batched, 0, free).reshape(*shape[:free], size * shape[free], *shape[free + 1 :])
        out = primitive.bind(*operands)
        split = (*out.shape[:output], size, shape[free], *out.shape[output + 1 :])
        return out.reshape(split), output

    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu_function, multiple_results=False), platform="cpu")
    return primitive


_conv_p = _primitive("conv3x3", _conv, _conv_cpu, free_axes=(0, 3), output_axes=(0, 1))
_input_grad_p = _primitive("conv3x3_input_grad", _input_grad, _input_grad_cpu, free_axes=(0, 2), output_axes=(0, 1))
_weight_grad_p = _primitive("conv3x3_weight_grad", _weight_grad, _weight_grad_cpu, free_axes=(1, 1), output_axes=(2, 3))

ad.defbilinear(_conv_p, lambda ct, x, k: _input_grad_p.bind(ct, k), lambda ct, x, k: _weight_grad_p.bind(x, ct))
ad.defbilinear(_input_grad_p, lambda ct, dy, k: _conv_p.bind(ct, k), lambda ct, dy, k: _weight_grad_p.bind(ct, dy))
ad.defbilinear(_weight_grad_p, lambda ct, x, dy: _input_grad_p.bind(dy, ct), lambda ct, x, dy: _conv_p.bind(x, ct))
