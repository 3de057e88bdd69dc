"""What a loss takes: anything that `jnp.asarray` takes, if it fits; if not, one sentence that says why.

And what is done to operands everywhere: the dtype that they are summed in, and how they are divided over devices.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def outputs(values: Any, name: str = "logits") -> Array:
    """What a network gives, as floating-point numbers with at least one class along the last axis."""
    values = real(values, name)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must have an axis of at least one class, got shape {values.shape}.")
    return values


def class_indices(labels: Any, outputs: Array, name: str = "logits") -> Array:
    """Labels as integers, one for each example of `outputs`."""
    labels = jnp.asarray(labels)
    if labels.shape == outputs.shape:
        raise ValueError(
            f"labels must be class indices, one for each example, got the shape of the {name}, {labels.shape}: "
            "use jnp.argmax(labels, -1), or softmax_cross_entropy_with_soft_labels, which takes distributions."
        )
    if labels.shape != outputs.shape[:-1]:
        raise ValueError(
            f"{name} must have the batch shape of the labels plus one axis of classes, "
            f"got {name} of shape {outputs.shape} for labels of shape {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be class indices, so integers, got {labels.dtype}: use labels.astype(int).")
    return labels


def distributions(labels: Any, outputs: Array) -> Array:
    """Labels as a number for each class of each example."""
    labels = real(labels, "labels")
    if labels.shape != outputs.shape:
        raise ValueError(f"soft labels must have the shape of the logits, {outputs.shape}, got {labels.shape}.")
    return labels


def weights(class_weights: Any, outputs: Array) -> Array:
    """One number for each class; ones for None."""
    num_classes = outputs.shape[-1]
    if class_weights is None:
        return jnp.ones(num_classes, accumulation_dtype(outputs.dtype))
    class_weights = real(class_weights, "class_weights")
    if class_weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must hold one weight for each of the {num_classes} classes, got shape "
            f"{class_weights.shape}: to weight examples, multiply the result."
        )
    return class_weights


def mask(where: Any, outputs: Array, *, of_classes: bool = True) -> Array | None:
    """A boolean for each example, or for each class of each example: what a 2 would mean is anybody's guess."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise ValueError(
            f"where must be boolean, got {where.dtype}: use where=mask != 0, or multiply the result to weight examples."
        )
    batch_shape = outputs.shape[:-1]
    if where.shape != batch_shape and not (of_classes and where.shape == outputs.shape):
        other = f", or that of the logits, {outputs.shape}" if of_classes else ""
        raise ValueError(f"where must have the batch shape {batch_shape} of the labels{other}, got {where.shape}.")
    return where


def option(value: Any, name: str, dtype: Any, highest: float = math.inf) -> Array | None:
    """A number from 0 to `highest`, or traced, which `or_nan` is for; None if it is known to be 0."""
    if np.shape(value):
        raise ValueError(f"{name} must be a single number, got shape {np.shape(value)}: use jax.vmap for several.")
    if isinstance(value, Tracer):
        return value.astype(dtype)
    if not 0 <= float(value) <= highest:
        words = "must not be negative" if highest == math.inf else f"must be between 0 and {highest:g}"
        raise ValueError(f"{name} {words}, got {value}.")
    return jnp.asarray(value, dtype) if float(value) else None


def or_nan(value: Array, highest: float = math.inf) -> Array:
    """NaN for what is not from 0 to `highest`."""
    return jnp.where((value >= 0) & (value <= highest), value, jnp.nan)


def classes_last(axis: Any, logits: Any, *others: Any) -> list[Any]:
    """Logits, and what has as many axes as they have, with the classes along the last axis, as a flat index."""
    if axis == -1:
        return [logits, *others]
    try:
        axes = [operator.index(a) for a in (axis if isinstance(axis, tuple) else (axis,))]
    except TypeError:
        raise ValueError(f"axis must be an integer or a tuple of integers, got {axis!r}.") from None
    ndim = np.ndim(logits)
    if not axes or not all(-ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) < len(axes):
        raise ValueError(f"axis must name different axes of the logits, which have {ndim}, got {axis!r}.")

    def move(values):
        if values is None or np.ndim(values) != ndim:
            return values
        moved = jnp.moveaxis(jnp.asarray(values), axes, range(-len(axes), 0))
        return moved.reshape(*moved.shape[: ndim - len(axes)], math.prod(moved.shape[ndim - len(axes) :]))

    return [move(values) for values in (logits, *others)]


def real(values: Any, name: str) -> Array:
    """Real numbers as floating-point numbers."""
    values = jnp.asarray(values)
    if jnp.issubdtype(values.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real numbers, got {values.dtype}.")
    return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float)


def is_explicit(x: Array) -> bool:
    """Whether an array is on an explicitly sharded mesh, where its type says along which axes it is divided."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def broadcast_like(values: Array, like: Array) -> Array:
    """`jnp.broadcast_to` the shape of another array, divided as that is: its gradient stays divided, too."""
    if not is_explicit(like):
        return jnp.broadcast_to(values, like.shape)
    sharding = jax.typeof(like).sharding
    pairs = zip(values.shape, sharding.spec[like.ndim - values.ndim :], strict=True)
    own = PartitionSpec(*(None if size == 1 else axis for size, axis in pairs))
    values = jax.sharding.reshard(values, NamedSharding(sharding.mesh, own))
    return jnp.broadcast_to(values, like.shape, out_sharding=sharding)


def accumulation_dtype(dtype: Any) -> Any:
    """What numbers of a dtype are summed in: 16-bit ones in float32."""
    # Not promote_types: it refuses bfloat16 with float32 under strict dtype promotion.
    return jnp.float32 if dtype.itemsize < 4 else dtype
