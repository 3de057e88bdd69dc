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
    dimension_numbers=("NHWC", "HWIO", "NHWC"))`, with every derivative, `vmap`, `scan` and `remat`.

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


_plain = ft.partial(
    lax.conv_general_dilated,
    window_strides=(1, 1),
    padding=((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def _conv(x, k):
    """[N,H,W,I], [3,3,I,O] → [N,H,W,O]"""
    return _plain(x, k)


def _input_grad(dy, k):
    """[N,H,W,O], [3,3,I,O] → [N,H,W,I]: a convolution with the kernel flipped and its channels swapped."""
    return _plain(dy, k[::-1, ::-1].swapaxes(2, 3))


def _weight_grad(x, dy):
    """[N,H,W,I], [N,H,W,O] → [3,3,I,O]: channels play the part of the batch, and the batch that of the channels."""
    return _wide_weight_grad(x, dy).astype(x.dtype)


def _wide_weight_grad(x, dy):
    """The same, in float32 for 16-bit inputs: it sums over many images and pixels."""
    dw = _plain(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), preferred_element_type=accumulation_dtype(x.dtype))
    return dw.transpose(1, 2, 0, 3)


def _weight_grad_cpu(x, dy):
    """The same, summed over chunks of images that stay in the cache; large images as one matrix product a chunk."""
    num_images, height, width, channels = x.shape
    as_product = height * width >= 256 and min(channels, dy.shape[-1]) >= 16
    wide_grad, pixels = (_weight_product, 2048) if as_product else (_wide_weight_grad, 8192)
    chunk = max(1, min(num_images, pixels // (height * width)))
    num_chunks = num_images // chunk if num_images else 0
    if num_chunks < 2:
        return wide_grad(x, dy).astype(x.dtype)
    first = chunk + num_images % chunk  # what is left over goes with the first chunk

    def split(a):
        return a[first:].reshape(num_chunks - 1, chunk, *a.shape[1:])

    total = wide_grad(x[:first], dy[:first])
    parts = (split(x), split(dy))
    return lax.scan(lambda total, part: (total + wide_grad(*part), None), total, parts)[0].astype(x.dtype)


def _weight_product(x, dy):
    """`_wide_weight_grad` as one product of two matrices with a row for every pixel.

    Images get a column of zeros on their right and a row below, and all pixels become one sequence: a neighbour in
    column or row is then a fixed number of places away, and lies on zeros where there is none. The nine sums over
    pixels of x[row + i, column + j]·dy[row, column] are those of x, j places on, times dy, i rows back: three copies of
    each side by side.
    """
    num_images, height, width, _ = x.shape
    num_pixels = num_images * (height + 1) * (width + 1)

    def three_shifts(a, places):
        rows = jnp.pad(a, ((0, 0), (0, 1), (0, 1), (0, 0))).reshape(num_pixels, -1)
        rows = jnp.pad(lax.optimization_barrier(rows), ((places, places), (0, 0)))
        return jnp.concatenate([rows[i * places : i * places + num_pixels] for i in range(3)], 1)

    # The barriers keep XLA from computing elements one by one where it could copy.
    shifted = lax.optimization_barrier((three_shifts(x, 1), three_shifts(dy, width + 1)))
    products = jnp.matmul(shifted[0].T, shifted[1], preferred_element_type=accumulation_dtype(x.dtype))
    return products.reshape(3, x.shape[-1], 3, dy.shape[-1])[:, :, ::-1].transpose(2, 0, 1, 3)


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


_conv_p = _primitive("conv3x3", _conv, _conv, free_axes=(0, 3), output_axes=(0, 3))
_input_grad_p = _primitive("conv3x3_input_grad", _input_grad, _input_grad, free_axes=(0, 2), output_axes=(0, 3))
_weight_grad_p = _primitive("conv3x3_weight_grad", _weight_grad, _weight_grad_cpu, free_axes=(3, 3), output_axes=(2, 3))

ad.defbilinear(_conv_p, lambda ct, x, k: _input_grad_p.bind(ct, k), lambda ct, x, k: _weight_grad_p.bind(x, ct))
ad.defbilinear(_input_grad_p, lambda ct, dy, k: _conv_p.bind(ct, k), lambda ct, dy, k: _weight_grad_p.bind(ct, dy))
ad.defbilinear(_weight_grad_p, lambda ct, x, dy: _input_grad_p.bind(dy, ct), lambda ct, x, dy: _conv_p.bind(x, ct))
