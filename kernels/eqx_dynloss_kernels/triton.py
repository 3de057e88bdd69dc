r"""The fused forward pass for NVIDIA GPUs: a Pallas kernel that reads the logits once.

A program of the kernel takes a few whole rows, or one row in blocks of columns. It keeps the running maximum and the
running sum of exponentials (online softmax: Milakov and Gimelshein, 2018, arXiv:1805.02867), one `exp` a logit, looks
up the true logit and its weight, and writes three numbers a row. The Triton backend is used, with explicit parameters:
the other one for GPUs, Mosaic, needs rows of a multiple of 16 bytes and a Hopper GPU or later.
"""

import functools as ft
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Float32, Integer

from .launch import launch
from .operands import or_nan


def forward(
    logits: Float[Array, "rows classes"],
    labels: Integer[Array, " rows"],
    where: Bool[Array, " rows"] | None,
    class_weights: Float[Array, "groups classes"],
    label_smoothing: Float[Array, " smoothing_groups"] | None,
    z_loss: Float[Array, " z_groups"] | None,
) -> tuple[Float32[Array, " rows"], Float32[Array, " rows"], Float32[Array, " rows"]]:
    """As `plain.forward`, but the rows come in equal groups that have class weights and options of their own."""
    num_rows, num_classes = logits.shape
    block_rows, block_columns, num_warps = launch(num_rows, num_classes)
    if class_weights.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64):
        class_weights = class_weights.astype(jnp.float32)
    by_row = pl.BlockSpec((block_rows,), lambda i: (i,))
    padded = pl.cdiv(num_classes, block_columns) * block_columns
    inputs = {"logits": (logits, pl.BlockSpec((block_rows, padded), lambda i: (i, 0))), "labels": (labels, by_row)}
    if where is not None:
        inputs["where"] = where, by_row
    rows_per_group = {}
    for name, array in {"weights": class_weights, "smoothing": label_smoothing, "z": z_loss}.items():
        if array is not None:
            rows_per_group[name] = num_rows // len(array)
            inputs[name] = array.reshape(-1), pl.BlockSpec((array.size,), lambda i: (0,))
    kernel = ft.partial(
        _kernel,
        names=tuple(inputs),
        shape=(num_rows, num_classes),
        block=(block_rows, block_columns),
        rows_per_group=rows_per_group,
    )
    # Inside jax.shard_map the results vary over the mesh axes that the arguments do.
    out_shape = jax.ShapeDtypeStruct((num_rows,), jnp.float32, manual_axis_type=jax.typeof(logits).manual_axis_type)
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(num_rows, block_rows),),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[by_row] * 3,
        out_shape=[out_shape] * 3,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=2),
        name="weighted_xent",
    )(*(array for array, _ in inputs.values()))


def _kernel(*refs, names, shape, block, rows_per_group):
    *inputs, loss_ref, total_ref, shift_ref = refs
    inputs = dict(zip(names, inputs, strict=True))
    logits_ref, weights_ref = inputs["logits"], inputs["weights"]
    (num_rows, num_classes), (block_rows, block_columns) = shape, block
    local = jnp.arange(block_rows, dtype=jnp.int32)
    rows = pl.program_id(0) * block_rows + local
    exists = rows < num_rows

    def group(name):
        each = rows_per_group[name]
        return rows // each if each < num_rows else jnp.zeros_like(rows)

    def option(name, highest=math.inf):
        if name not in inputs:
            return None
        return or_nan(plgpu.load(inputs[name].at[group(name)], mask=exists, other=0), highest)

    first_weight, smoothing, z = group("weights") * num_classes, option("smoothing", 1.0), option("z")

    label = plgpu.load(inputs["labels"].at[:], mask=exists, other=0)
    label = label if label.dtype.itemsize == 8 else label.astype(jnp.int32)
    in_range = (label >= 0) & (label < num_classes)
    label = jnp.where(in_range, label, 0).astype(jnp.int32)
    counts = exists & plgpu.load(inputs["where"].at[:], mask=exists, other=False) if "where" in inputs else exists
    has_label = in_range & counts
    # A program with one row need not read it if it is masked. With several rows, that makes the compiler run out of
    # registers.
    is_read = counts if block_rows == 1 else exists

    def of_block(start):
        """Of a block of columns: the shift, the total, the sum of the spread target, and that of it times x − shift."""
        columns = start + jnp.arange(block_columns, dtype=jnp.int32)
        mask = _outer(is_read, columns < num_classes)
        x = plgpu.load(logits_ref.at[:, pl.ds(start, block_columns)], mask=mask, other=-jnp.inf).astype(jnp.float32)
        top = jnp.max(x, 1)
        shift = jnp.where(jnp.abs(top) < jnp.inf, top, 0.0)
        x = x - shift[:, None]
        total = jnp.sum(jnp.exp(x), 1)
        if smoothing is None:
            return shift, total, jnp.zeros_like(total), jnp.zeros_like(total)
        w = plgpu.load(weights_ref.at[_outer_sum(first_weight, columns)], mask=mask, other=0).astype(jnp.float32)
        spread = (smoothing / num_classes)[:, None] * w
        return shift, total, jnp.sum(spread, 1), jnp.sum(spread * _silenced(x, spread), 1)

    num_blocks = pl.cdiv(num_classes, block_columns)
    sums = of_block(0)
    if num_blocks > 1:
        sums = lax.fori_loop(1, num_blocks, lambda i, sums: _merged(sums, of_block(i * block_columns)), sums)
    shift, total, spread, weighted = sums

    log_total = jnp.log(total)
    weight = plgpu.load(weights_ref.at[first_weight + label], mask=has_label, other=0).astype(jnp.float32)
    true = plgpu.load(logits_ref.at[local, label], mask=has_label, other=0).astype(jnp.float32)
    if smoothing is not None:
        weight = (1 - smoothing) * weight
    loss = weight * _silenced(log_total - (true - shift), weight)
    if smoothing is not None:
        loss += spread * log_total - weighted
    if z is not None:
        lse = log_total + shift
        loss += z * lse * lse
    loss = jnp.where(in_range, loss, jnp.nan)
    plgpu.store(loss_ref.at[:], jnp.where(counts, loss, 0.0), mask=exists)
    plgpu.store(total_ref.at[:], jnp.where(counts, total, 1.0), mask=exists)
    plgpu.store(shift_ref.at[:], jnp.where(counts, shift, 0.0), mask=exists)


def _merged(one, other):
    """The sums over two blocks from those over each."""
    largest = [jnp.where(total == 0, -jnp.inf, shift) for shift, total, _, _ in (one, other)]
    top = jnp.maximum(*largest)
    new_shift = jnp.where(jnp.abs(top) < jnp.inf, top, 0.0)

    def moved(shift, total, spread, weighted):
        # A total of 0 has no shift yet, and an infinite one never will: they stay, whatever multiplies them.
        scales = (total > 0) & (total < jnp.inf)
        total = jnp.where(scales, total * jnp.exp(shift - new_shift), total)
        return total, spread, weighted + jnp.where(spread == 0, 0.0, spread * (shift - new_shift))

    return new_shift, *(x + y for x, y in zip(moved(*one), moved(*other), strict=True))


def _outer(rows, columns):
    shape = (rows.size, columns.size)
    return jnp.broadcast_to(rows[:, None], shape) & jnp.broadcast_to(columns[None, :], shape)


def _outer_sum(rows, columns):
    shape = (rows.size, columns.size)
    return jnp.broadcast_to(rows[:, None], shape) + jnp.broadcast_to(columns[None, :], shape)


def _silenced(x, weight):
    return jnp.where((weight == 0) & (jnp.abs(x) == jnp.inf), 0.0, x)
