"""The 3×3 convolution and its weight gradient on a CPU: as products of matrices, half as many as it has by definition.

Winograd's minimal filtering over rows. Four rows of the output depend on six rows of the input and three of the kernel,
and are bilinear in them: by definition in twelve products, and in six as `OUTPUT @ ((KERNEL @ k) * (INPUT @ x))`, where
the matrices evaluate and interpolate polynomials. What is multiplied are matrices [channels, pixels], and columns stay
as they are: an image, its left and its right neighbours are three times the channels.

Eight images of 32×32 take one core 0.22, 0.67 and 1.9 ms from 16, 32 and 64 channels to as many, and XLA's convolution
0.40, 0.89 and 3.1; the weight gradient as long as that, and XLA's 0.43, 1.5 and 5.0 (jax 0.12; AVX-512). By definition,
written in the same way, it was 0.31, 1.0 and 3.2, and 0.39, 1.1 and 3.2.

The price is precision, in float32 1.7 to 2.8 times the rounding error of XLA's convolution (with 64 channels 0.49
instead of 0.27 millionths of the output's standard deviation), and that a pixel which is not finite reaches all rows of
its group of four, and of the next where it is beside it.

??? cite

    Winograd: *Arithmetic Complexity of Computations*, SIAM 1980; Lavin and Gray: *Fast Algorithms for Convolutional
    Neural Networks*, CVPR 2016. Points that are small powers of the square root of 2 are our choice: with the usual
    0, ±1, ±2 the rounding error is 1.4 times as large.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from eqx_dynloss_kernels.operands import accumulation_dtype
from jax import lax
from jaxtyping import Array, Float

ROWS = 4  # of the output
CACHED = 2**17  # numbers of a part of the images: 512 KiB in float32


def _matrices(points: Sequence[float]):
    """`OUTPUT` [4,6], `KERNEL` [6,3] and `INPUT` [6,6], from Lagrange's interpolation at the points and at infinity.

    The scale of Lagrange's polynomials is with the kernel, which is small.
    """
    others = [[q for q in points if q != p] for p in points]
    scales = [math.prod(p - q for q in rest) for p, rest in zip(points, others, strict=True)]
    output = np.array([[p**row for p in points] + [float(row == ROWS - 1)] for row in range(ROWS)])
    kernel = np.array([[p**row / s for row in range(3)] for p, s in zip(points, scales, strict=True)] + [[0, 0, 1]])
    rising = lambda roots: np.poly(roots)[::-1]  # the coefficients of a polynomial with these roots
    inputs = np.array([[*rising(rest), 0] for rest in others] + [rising(points)])
    return output, kernel, np.where(abs(inputs) < 1e-9, 0, inputs)


OUTPUT, KERNEL, INPUT = _matrices([0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5)])


def convolution(
    x: Float[Array, "images in_channels height width"], k: Float[Array, "3 3 in_channels out_channels"]
) -> Float[Array, "images out_channels height width"]:
    """Zero padding and stride 1. A part of the images at a time, whose copies stay in the cache."""
    (num_images, in_channels, height, width), out_channels = x.shape, k.shape[3]
    kernel = jnp.stack(_mixed(KERNEL, k.reshape(3, 3 * in_channels, out_channels).astype(accumulation_dtype(k.dtype))))

    def of_part(x):
        products = _products(kernel, _inputs(x), contracting=((1,), (1,)))
        groups = _groups(height)
        rows = _mixed(OUTPUT, products.reshape(len(products), out_channels, len(x), groups, width))
        out = jnp.stack(rows, 3).swapaxes(0, 1).reshape(len(x), out_channels, groups * ROWS, width)
        return out[:, :, :height].astype(x.dtype)

    parts = _parts(x, max(in_channels, out_channels))
    out = of_part(x) if len(parts) < 2 else lax.map(of_part, parts)
    return out.reshape(num_images, out_channels, height, width)


def weight_gradient(
    x: Float[Array, "images in_channels height width"], dy: Float[Array, "images out_channels height width"]
) -> Float[Array, "3 3 in_channels out_channels"]:
    """The transpose of `convolution` in the kernel: of the images, and of the gradient with respect to its output.

    The images are transformed as there, which XLA then does once for both. Summed in float32 for 16-bit inputs.
    """
    in_channels, out_channels = x.shape[1], dy.shape[1]

    def of_part(x, dy):
        return _products(_inputs(x), _pixels_last(_mixed(OUTPUT.T, _rows(dy))), contracting=((2,), (2,)))

    parts = tuple(_parts(a, max(in_channels, out_channels)) for a in (x, dy))
    if len(parts[0]) < 2:
        total = of_part(x, dy)
    else:
        zeros = of_part(x[:0], dy[:0])  # made like this, as shard_map wants them
        total, _ = lax.scan(lambda total, part: (total + of_part(*part), None), zeros, parts)
    return jnp.stack(_mixed(KERNEL.T, total)).reshape(3, 3, in_channels, out_channels).astype(x.dtype)


def _mixed(matrix, parts):
    """The matrix times the parts: for every row of it, their sum with these factors."""
    return [sum(float(c) * part for c, part in zip(row, parts, strict=True) if c) for row in matrix]


def _products(a, b, contracting):
    """Of six pairs of matrices."""
    return lax.dot_general(a, b, (contracting, ((0,), (0,))))


def _rows(x):
    """[N,C,H,W] → four times [C,N,⌈H/4⌉,W]: the first rows of every group of four, the second ones, …"""
    num_images, channels, height, width = x.shape
    groups = _groups(height)
    x = jnp.pad(x.astype(accumulation_dtype(x.dtype)), ((0, 0), (0, 0), (0, groups * ROWS - height), (0, 0)))
    grouped = x.reshape(num_images, channels, groups, ROWS, width)
    return [grouped[:, :, :, row].swapaxes(0, 1) for row in range(ROWS)]


def _inputs(x):
    """[N,C,H,W] → [6,3C,N·⌈H/4⌉·W]: of every pixel's left neighbour, itself, its right neighbour."""
    width = x.shape[3]
    rows = _rows(x)
    mixed = _pixels_last(_mixed(INPUT, [_moved(rows[-1], 1), *rows, _moved(rows[0], -1)]))
    column = np.arange(mixed.shape[2]) % width
    left = jnp.where(column > 0, _moved(mixed, 1), 0)
    right = jnp.where(column < width - 1, _moved(mixed, -1), 0)
    return jnp.concatenate([left, mixed, right], 1)


def _groups(height):
    return -(-height // ROWS)


def _pixels_last(parts):
    """Six times [C,N,G,W] → [6,C,N·G·W]"""
    return jnp.stack(parts).reshape(len(parts), len(parts[0]), math.prod(parts[0].shape[1:]))


def _moved(x, by):
    """Along the third axis, with zeros from outside."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(by, -by, 0) if i == 2 else (0, 0, 0) for i in range(x.ndim)])


def _parts(x, channels):
    """[N,…] → [parts,N/parts,…]"""
    num_images, _, height, width = x.shape
    most = max(1, CACHED // max(1, channels * height * width))
    size = next((n for n in range(min(most, num_images), 0, -1) if num_images % n == 0), 1)
    return x.reshape(num_images // size, size, *x.shape[1:])
