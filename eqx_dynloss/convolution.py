"""A 3×3 convolution that stays fast in a scan, under vmap over models, and under both.

`lax.conv_general_dilated` has two traps on a CPU. The weight gradient that autodiff makes of it is a convolution in a
layout for which XLA:CPU has no fast code inside `lax.scan` (one to two orders of magnitude slower). And `vmap` over
kernels makes a grouped convolution, slower than a Python loop over the models.

A convolution, its input gradient and its weight gradient are three bilinear maps, and each is a transpose of the other
two. Here they are three primitives that say so: JAX derives every derivative in every mode from that, each in a form
that XLA is fast on. Under `vmap`, one batched operand is folded into an axis that the other does not share (images into
the batch, kernels into the output channels); two batched operands are mapped over, one plain convolution after another.
On a GPU as well: for a layer of eight members an H100 takes as long for that as for a grouped convolution, with a fifth
of the temporary memory, and half as long as for batched matrix products (`benchmarks/records/h100.json`).
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
from eqx_dynloss_kernels.operands import accumulation_dtype
from eqx_dynloss_kernels.primitives import run, vary_alike
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float


def conv3x3(
    images: Float[Array, "*batch height width in_channels"],
    kernel: Float[Array, "3 3 in_channels out_channels"],
) -> Float[Array, "*batch height width out_channels"]:
    """Convolution with zero padding (SAME) and stride 1; channels last, any batch shape.

    The same function as `lax.conv_general_dilated(images, kernel, (1, 1), "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"))`, with every derivative, `vmap`, `scan` and `remat`. A pixel that is
    infinite or NaN may, on a CPU and with up to 16 channels, make NaN of up to three more columns beside it.

    **Arguments:**

    - `images`: `[..., H, W, I]`.
    - `kernel`: `[3, 3, I, O]`, of the same dtype.

    **Returns:** `[..., H, W, O]`.
    """
    if kernel.shape[:3] != (3, 3, images.shape[-1]) or kernel.ndim != 4:
        raise ValueError(
            f"kernel must have shape [3, 3, in_channels, out_channels] for images of {images.shape[-1]} channels, "
            f"got {kernel.shape}."
        )
    flat = images.reshape(math.prod(images.shape[:-3]), *images.shape[-3:])
    return _conv_p.bind(*vary_alike(flat, kernel)).reshape(*images.shape[:-1], kernel.shape[-1])


CACHED = 2**19  # numbers: 2 MiB in float32

_plain = ft.partial(
    lax.conv_general_dilated,
    window_strides=(1, 1),
    padding=((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def _conv(x, k):
    """[N,H,W,I], [3,3,I,O] → [N,H,W,O]"""
    return _plain(_at_least_8_channels(x, 3), _at_least_8_channels(k, 2))


def _at_least_8_channels(x, axis):
    """Numbers of 16 bits with zeros up to 8 channels: for fewer, cuDNN has slow tensor-core kernels or none."""
    missing = max(0, 8 - x.shape[axis]) if x.dtype.itemsize == 2 else 0
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _conv_cpu(x, k):
    """The same. Of few channels, neighbouring columns of the output are channels of one position: more for a register.

    Such a block of columns sees two columns more than it has, and each of its columns the kernel one further right.
    """
    width, (in_channels, out_channels) = x.shape[2], k.shape[2:]
    block = _block_of_columns(in_channels, out_channels)
    if block == 1:
        return _plain(x, k)
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1 + -width % block), (0, 0)))
    shifted = [jnp.pad(k, ((0, 0), (j, block - 1 - j), (0, 0), (0, 0))) for j in range(block)]
    out = _plain(padded, jnp.concatenate(shifted, -1), window_strides=(1, block), padding=((1, 1), (0, 0)))
    return out.reshape(*x.shape[:2], block * out.shape[2], out_channels)[:, :, :width]


def _block_of_columns(in_channels, out_channels):
    """How many columns: with what updates of Myrtle at widths 8 to 64 are fastest on jax 0.10.2 and 0.12 alike.

    A layer of 8 images of 32×32 takes one core 0.68 times as long with 0.10.2 (0.97 times with 0.12) from 16 to 16
    channels, 0.6 (0.6) from 8 to 8, and, of four columns, 0.31 (0.78) from 3 to 16; from 32 to 32 it took 1.3 (1.3).
    """
    if in_channels > 16 or out_channels > 32:
        return 1
    most = 4 if in_channels < 8 else 2
    return most if out_channels <= 16 else most // 2


def _input_grad(dy, k):
    """[N,H,W,O], [3,3,I,O] → [N,H,W,I]: a convolution with the kernel flipped and its channels swapped."""
    return _conv(dy, _transposed(k))


def _input_grad_cpu(dy, k):
    return _conv_cpu(dy, _transposed(k))


def _transposed(k):
    return k[::-1, ::-1].swapaxes(2, 3)


def _weight_grad(x, dy):
    """[N,H,W,I], [N,H,W,O] → [3,3,I,O]

    A GPU sums in float32 by itself: asked for a float32 result, it would first write float32 copies of both operands.
    """
    padded = _at_least_8_channels(x, 3)
    return _weight_conv(padded, dy)[:, :, : x.shape[3]]


def _weight_conv(x, dy, padding=((1, 1), (1, 1)), **options):
    """Channels play the part of the batch, and the batch that of the channels."""
    dw = _plain(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), padding=padding, **options)
    return dw.transpose(1, 2, 0, 3)


def _wide_weight_grad(x, dy, **options):
    """The same, in float32 for 16-bit inputs: it sums over many images and pixels."""
    return _weight_conv(x, dy, preferred_element_type=accumulation_dtype(x.dtype), **options)


def _weight_grad_cpu(x, dy):
    """The same, summed over chunks of images that stay in the cache.

    With chunks of twice the size an update of Myrtle5-64 takes 1.2 times as long. From 8 to 8 channels, pairs of
    columns take 0.6 times as long as single ones, from 16 to 16, 0.8 to 1.2 times.
    """
    x, dy = lax.optimization_barrier((x, dy))  # or XLA computes them again, element by element, as it transposes them
    num_images, height, width, in_channels = x.shape
    out_channels = dy.shape[-1]
    wide_grad = _weight_grad_of_pairs if max(in_channels, out_channels) <= 8 else _wide_weight_grad
    chunk = max(1, min(num_images, CACHED // (height * width * (in_channels + out_channels))))
    num_chunks, rest = divmod(num_images, chunk) if num_images else (0, 0)
    if num_chunks < 2:
        return wide_grad(x, dy).astype(x.dtype)

    def add(total, start):
        parts = (lax.dynamic_slice_in_dim(a, start, chunk) for a in (x, dy))
        return total + wide_grad(*parts), None

    first = chunk + rest  # what is left over goes with the first chunk
    total = wide_grad(x[:first], dy[:first])
    return lax.scan(add, total, jnp.arange(first, num_images, chunk))[0].astype(x.dtype)


def _weight_grad_of_pairs(x, dy):
    """`_wide_weight_grad` with pairs of columns as channels, twice as many, for a kernel of two pairs' width."""
    num_images, height, width, in_channels = x.shape
    pairs = (width + 1) // 2
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1 + width % 2), (0, 0)))
    dy = jnp.pad(dy, ((0, 0), (0, 0), (0, width % 2), (0, 0)))
    x = x.reshape(num_images, height, pairs + 1, 2 * in_channels)
    dy = dy.reshape(num_images, height, pairs, 2 * dy.shape[-1])
    dw = _wide_weight_grad(x, dy, padding=((1, 1), (0, 0))).reshape(3, 4, in_channels, 2, -1)
    return dw[:, :3, :, 0] + dw[:, 1:, :, 1]  # what either column of a pair sees


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


_conv_p = _primitive("conv3x3", _conv, _conv_cpu, free_axes=(0, 3), output_axes=(0, 3))
_input_grad_p = _primitive("conv3x3_input_grad", _input_grad, _input_grad_cpu, free_axes=(0, 2), output_axes=(0, 3))
_weight_grad_p = _primitive("conv3x3_weight_grad", _weight_grad, _weight_grad_cpu, free_axes=(3, 3), output_axes=(2, 3))

ad.defbilinear(_conv_p, lambda ct, x, k: _input_grad_p.bind(ct, k), lambda ct, x, k: _weight_grad_p.bind(x, ct))
ad.defbilinear(_input_grad_p, lambda ct, dy, k: _conv_p.bind(ct, k), lambda ct, dy, k: _weight_grad_p.bind(ct, dy))
ad.defbilinear(_weight_grad_p, lambda ct, x, dy: _input_grad_p.bind(dy, ct), lambda ct, x, dy: _conv_p.bind(x, ct))
