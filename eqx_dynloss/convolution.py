"""A 3×3 convolution that stays fast in a scan, under vmap over models, and under both.

`lax.conv_general_dilated` has three traps on a CPU. The weight gradient that autodiff makes of it is a convolution in a
layout for which XLA:CPU has no fast code inside `lax.scan` (one to two orders of magnitude slower). `vmap` over kernels
makes a grouped convolution, slower than a Python loop over the models. And 16 channels reach half the speed of 64.

A convolution, its input gradient and its weight gradient are three bilinear maps, and each is a transpose of the other
two. Here they are three primitives that say so: JAX derives every derivative in every mode from that, each in a form
that XLA is fast on; on a CPU those of `winograd`, products of matrices. Under `vmap`, one batched operand is
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
from eqx_dynloss_kernels.primitives import run, vary_alike
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from . import winograd


def conv3x3(
    images: Float[Array, "*batch in_channels height width"],
    kernel: Float[Array, "3 3 in_channels out_channels"],
) -> Float[Array, "*batch out_channels height width"]:
    """Convolution with zero padding (SAME) and stride 1; channels first, as in Equinox, any batch shape.

    The same function as `lax.conv_general_dilated(images, kernel, (1, 1), "SAME",
    dimension_numbers=("NCHW", "HWIO", "NCHW"))`, with every derivative, `vmap`, `scan` and `remat`; on a CPU with two
    to three times its rounding error (see `eqx_dynloss.winograd`).

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


def _input_grad_cpu(dy, k):
    return winograd.convolution(dy, _transposed(k))


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


_conv_p = _primitive("conv3x3", _conv, winograd.convolution, free_axes=(0, 3), output_axes=(0, 1))
_input_grad_p = _primitive("conv3x3_input_grad", _input_grad, _input_grad_cpu, free_axes=(0, 2), output_axes=(0, 1))
_weight_grad_p = _primitive(
    "conv3x3_weight_grad", _weight_grad, winograd.weight_gradient, free_axes=(1, 1), output_axes=(2, 3)
)

ad.defbilinear(_conv_p, lambda ct, x, k: _input_grad_p.bind(ct, k), lambda ct, x, k: _weight_grad_p.bind(x, ct))
ad.defbilinear(_input_grad_p, lambda ct, dy, k: _conv_p.bind(ct, k), lambda ct, dy, k: _weight_grad_p.bind(ct, dy))
ad.defbilinear(_weight_grad_p, lambda ct, x, dy: _input_grad_p.bind(dy, ct), lambda ct, x, dy: _conv_p.bind(x, ct))
