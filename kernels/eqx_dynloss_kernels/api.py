"""The public operation and the choice of its implementation."""

from typing import get_args

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, Real

from . import label, launch, operands, plain
from .operation import Implementation as Implementation
from .operation import Operands, forward


def weighted_xent(
    logits: Real[ArrayLike, "*batch classes"] | list,
    labels: Integer[ArrayLike, "*batch"] | list,
    class_weights: Real[ArrayLike, " classes"] | list | tuple | None = None,
    *,
    where: Bool[ArrayLike, "..."] | list | None = None,
    label_smoothing: Real[ArrayLike, ""] = 0.0,
    z_loss: Real[ArrayLike, ""] = 0.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Weighted softmax cross-entropy of every example, and the logsumexp of its logits.

    Differentiable in the logits, the class weights, the label smoothing and the z-loss, any number of times, in forward
    and reverse mode.

    **Arguments:**

    - `logits`: unnormalised log-probabilities; float16 and bfloat16 are computed and returned in float32.
    - `labels`: class indices; a label out of range makes its example's loss NaN.
    - `class_weights`: one weight per class; `None` is all ones.
    - `where`: boolean, of the shape of the labels: examples that count; or of the shape of the logits: the classes
        that each example has. What does not count is as if it were not there. An example that does not count, or has no
        class, has loss and logsumexp 0, and no gradient. A mask of classes is left to plain JAX.
    - `label_smoothing`: the share of the target that is spread evenly over the classes, each with its own weight.
    - `z_loss`: coefficient of the squared logsumexp in the loss. Both may be traced; out of range, the loss is NaN.
    - `implementation`: `"xla"` is plain JAX, `"pallas"` the kernel for NVIDIA GPUs, Ampere or later. `None` picks by
        platform, dtype and size. A named one works or raises. To export a program, name `"xla"`.

    **Returns:** `(loss, logsumexp)`, float32, or float64 for float64 logits.

    **Raises:** `ValueError` for operands that do not fit, and if the named implementation cannot do it. On another
    platform than CUDA, `"pallas"` raises when the program is compiled.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f'implementation must be None, "xla" or "pallas", got {implementation!r}.')
    x = operands.outputs(logits)
    y = operands.class_indices(labels, x)
    w = operands.weights(class_weights, x)
    mask = operands.mask(where, x)
    dtype = operands.accumulation_dtype(x.dtype)
    smoothing = operands.option(label_smoothing, "label_smoothing", dtype, 1.0)
    z = operands.option(z_loss, "z_loss", dtype)
    if implementation == "pallas" and x.size and (reason := launch.obstacle(x)):
        raise ValueError(f'implementation="pallas" cannot be used here: {reason}. "xla" and None can.')
    if mask is None or mask.ndim < x.ndim:
        loss, total, shift = forward(implementation, Operands(x, y, mask, w, smoothing, z))
        return loss, jnp.log(total) + shift
    if implementation == "pallas":
        raise ValueError('implementation="pallas" cannot be used here: where is a mask of classes. "xla" and None can.')
    return _of_some_classes(x, y, mask, w, smoothing, z)


def _of_some_classes(x, labels, mask, w, smoothing, z):
    """The same for examples that have some of the classes only: the others' logits are −inf, and get no smoothing."""
    known = label.in_range(label.widened(labels), x) & jnp.any(mask & label.is_label(labels, x.shape), -1)
    labels = jnp.where(known, labels.astype(jnp.int32), -1)
    counts = jnp.any(mask, -1)
    x = jnp.where(mask, x, -jnp.inf)
    loss, total, shift = forward("xla", Operands(x, labels, counts, w, None, None))
    log_total = jnp.log(total)
    if smoothing is not None:
        smoothing = operands.or_nan(smoothing, 1.0)
        share = smoothing / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1).astype(loss.dtype)
        spread = jnp.where(mask, share * operands.broadcast_like(w.astype(loss.dtype), x), 0)
        loss = (1 - smoothing) * loss + plain.spread_out(spread, log_total, x.astype(loss.dtype) - shift[..., None])
    lse = log_total + shift
    if z is not None:
        loss += operands.or_nan(z) * lse**2
    return jnp.where(counts, loss, 0), lse
