"""What a label names: an entry of its row, and the weight of its class.

Taking an entry out of every row, or out of one row for all labels, is a linear map, and its transpose puts numbers
where the entries were. They are a gather and a scatter: on a CPU these cost less than comparing all entries of a row
with the label; elsewhere the comparison is fused into the pass over the logits. As primitives, because the platform is
only known when a program is lowered, and because `jax.experimental.checkify` fails on the scatter that JAX makes of a
batched gather.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from .operands import is_explicit
from .primitives import run, vary_alike


def widened(labels):
    """Labels that can be compared with the number of classes: 1000 does not fit into int8, nor 256 into uint8."""
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def in_range(labels, logits):
    return (labels >= 0) & (labels < logits.shape[-1])


def is_label(labels, shape):
    """For rows of a shape, which entries their labels name."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == labels.astype(jnp.int32)[..., None]


def weight(w, labels):
    """The weight of each label, 0 if there is no such class."""
    if is_explicit(labels):
        sharding = jax.typeof(labels).sharding  # of the result, which has to be said
        w = jax.sharding.reshard(w, NamedSharding(sharding.mesh, PartitionSpec(None)))  # few: all of them everywhere
        return _taken(w, labels, out_sharding=sharding)
    return _entry_p.bind(*vary_alike(w, labels), compared=False)


def entry(x, labels):
    """The entry of each row that its label names; of a label out of range, any entry, or 0."""
    if is_explicit(x):
        return _compared(x, labels)
    return jnp.take_along_axis(x, labels[..., None], -1, mode="clip")[..., 0]


def entry_of_tangent(x, labels, *, widened: bool):
    """`entry`, in a form to be transposed.

    `widened`: whether what comes out of that is rounded to narrower numbers than those of `x`. A scatter would stand
    between the two: one more array of all entries.
    """
    if widened or x.shape[-1] < 64 or is_explicit(x):
        return _compared(x, labels)
    return _entry_p.bind(*vary_alike(x, labels), compared=True)


# x [*rows, classes], labels [*rows, *more] → entries [*rows, *more], and back. `compared`: by comparison, but on a CPU.


def _taken(x, labels, **options):
    return x.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False, **options)


def _gathered(x, labels, **_):
    take = _taken
    for _ in x.shape[:-1]:
        take = jax.vmap(take)
    return take(x, labels)


def _scattered(entries, labels, *, shape, **_):
    # Not `jax.linear_transpose`: in a `shard_map`, its operand is the same on all devices, and gradients are summed.
    x, entries, labels = vary_alike(jnp.zeros(shape, entries.dtype), entries, labels)
    return jax.vjp(lambda x: _gathered(x, labels), x)[1](entries)[0]


def _compared(x, labels):
    return jnp.sum(jnp.where(is_label(labels, x.shape), x, 0), -1)


def _placed(entries, labels, shape):
    return jnp.where(is_label(labels, shape), entries[..., None], 0)


_entry_p, _place_p = Primitive("entry_at_label"), Primitive("place_at_label")


@_entry_p.def_abstract_eval
def _(x, labels, *, compared):
    return labels.update(dtype=x.dtype, weak_type=False)


@_place_p.def_abstract_eval
def _(entries, labels, *, shape, compared):
    sharding = NamedSharding(entries.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return entries.update(shape=shape, weak_type=False, sharding=sharding)


ad.deflinear2(
    _entry_p,
    lambda ct, x, labels, *, compared: [
        _place_p.bind(*vary_alike(ct, labels), shape=x.aval.shape, compared=compared),
        None,
    ],
)
ad.deflinear2(
    _place_p,
    lambda ct, entries, labels, *, shape, compared: [_entry_p.bind(*vary_alike(ct, labels), compared=compared), None],
)


def _entry_elsewhere(x, labels, *, compared):
    return _compared(x, labels) if compared else _gathered(x, labels)


def _place_elsewhere(entries, labels, *, shape, compared):
    return _placed(entries, labels, shape) if compared else _scattered(entries, labels, shape=shape)


def _stacked(operands, axes):
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    return [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]


def _batch_entry(operands, axes, **params):
    x, labels = operands
    if axes[0] is None and x.ndim == 1:  # one row for even more labels
        return _entry_p.bind(x, jnp.moveaxis(labels, axes[1], 0), **params), 0
    return _entry_p.bind(*_stacked(operands, axes), **params), 0


def _batch_place(operands, axes, *, shape, **params):
    entries, labels = _stacked(operands, axes)
    return _place_p.bind(entries, labels, shape=(len(labels), *shape), **params), 0


for primitive, function, cpu_function, batch in (
    (_entry_p, _entry_elsewhere, _gathered, _batch_entry),
    (_place_p, _place_elsewhere, _scattered, _batch_place),
):
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu_function, multiple_results=False), platform="cpu")
    ad.defjvp(primitive, lambda tangent, x, labels, p=primitive, **params: p.bind(tangent, labels, **params), None)
    batching.primitive_batchers[primitive] = batch
    primitive.def_impl(ft.partial(run, primitive))
