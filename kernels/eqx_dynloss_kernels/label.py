"""What a label names: an entry of its row, and the weight of its class.

Taking an entry out of every row is a linear map of the rows, and its transpose puts numbers where the entries were. On
a CPU these are a gather and a scatter, which cost less than comparing all entries with the label; elsewhere the
comparison is fused into the pass over the logits. As primitives, because the platform is only known when a program is
lowered, and because `jax.experimental.checkify` fails on the scatter that JAX makes of a gather from rows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from .operands import is_explicit, vary_alike


def in_range(labels, logits):
    return (labels >= 0) & (labels < logits.shape[-1])


def is_label(labels, shape):
    """For rows of a shape, which entries their labels name."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == labels.astype(jnp.int32)[..., None]


def weight(w, labels):
    """The weight of each label, 0 if there is no such class."""
    sharding = None
    if is_explicit(labels):
        sharding = jax.typeof(labels).sharding  # of the result, which has to be said
        w = jax.sharding.reshard(w, NamedSharding(sharding.mesh, PartitionSpec(None)))  # few: all of them everywhere
    return w.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False, out_sharding=sharding)


def entry(x, labels):
    """The entry of each row that its label names; of a label out of range, any entry, or 0."""
    return _compared(x, labels) if is_explicit(x) else _gathered(x, labels)


def entry_of_tangent(x, labels, *, widened: bool):
    """`entry`, in a form to be transposed.

    `widened`: whether what comes out of that is rounded to narrower numbers than those of `x`. A scatter would stand
    between the two: one more array of all entries.
    """
    if widened or x.shape[-1] < 64 or is_explicit(x):
        return _compared(x, labels)
    return _entry_p.bind(*vary_alike(x, labels))


def _compared(x, labels):
    return jnp.sum(jnp.where(is_label(labels, x.shape), x, 0), -1)


def _gathered(x, labels):
    return jnp.take_along_axis(x, labels[..., None], -1, mode="clip")[..., 0]


def _placed(entries, labels, *, num_classes):
    return jnp.where(is_label(labels, (*labels.shape, num_classes)), entries[..., None], 0)


def _scattered(entries, labels, *, num_classes):
    rows = jax.ShapeDtypeStruct((*labels.shape, num_classes), entries.dtype)
    return jax.linear_transpose(lambda x: _gathered(x, labels), rows)(entries)[0]


def _primitive(name, function, cpu_function, transpose):
    primitive = Primitive(name)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(cpu_function, multiple_results=False), platform="cpu")
    ad.deflinear2(primitive, transpose)
    ad.defjvp(primitive, lambda tangent, x, labels, **params: primitive.bind(tangent, labels, **params), None)

    @primitive.def_impl
    def call(x, labels, **params):
        with jax.disable_jit(False):  # what is disabled would come back here
            return jax.jit(lambda *args: primitive.bind(*args, **params))(x, labels)

    def batch(operands, axes, **params):
        size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
        stacked = [
            jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(operands, axes, strict=True)
        ]
        return primitive.bind(*stacked, **params), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


_entry_p = _primitive(
    "entry_at_label",
    _compared,
    _gathered,
    lambda ct, x, labels: [_place_p.bind(*vary_alike(ct, labels), num_classes=x.aval.shape[-1]), None],
)
_place_p = _primitive(
    "place_at_label",
    _placed,
    _scattered,
    lambda ct, entries, labels, *, num_classes: [_entry_p.bind(*vary_alike(ct, labels)), None],
)


@_entry_p.def_abstract_eval
def _(x, labels):
    return labels.update(dtype=x.dtype, weak_type=False)


@_place_p.def_abstract_eval
def _(entries, labels, *, num_classes):
    sharding = NamedSharding(entries.sharding.mesh, PartitionSpec(*entries.sharding.spec, None))
    return entries.update(shape=(*labels.shape, num_classes), weak_type=False, sharding=sharding)
