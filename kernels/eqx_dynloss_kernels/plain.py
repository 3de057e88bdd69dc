r"""Weighted softmax cross-entropy in plain JAX: the specification of every other implementation.

With target distribution $q$ (one-hot, or smoothed), class weights $w$ and logits $x$, each class's term keeps the
weight of that class, and the squared logsumexp has a coefficient $z$ of its own:

$$\ell = \sum_c w_c\,q_c\,(\mathrm{lse}(x) - x_c) + z\,\mathrm{lse}(x)^2.$$

Everything is computed from logits shifted by their maximum, so that no digits are lost to a common offset.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from . import label
from .operands import accumulation_dtype, broadcast_like, or_nan


def forward(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    where: Bool[Array, "*batch"] | None,
    class_weights: Float[Array, " classes"],
    label_smoothing: Float[Array, ""] | None,
    z_loss: Float[Array, ""] | None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The losses, and what the softmax needs: the total Σ exp(x − shift) and the shift.

    An example that is masked has loss 0, total 1 and shift 0. A label out of range has the loss NaN.
    """
    x, labels, w = prepared(logits, labels, where, class_weights)
    top = jnp.max(x, -1, initial=-jnp.inf)
    shift = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.sum(jnp.exp(x - shift[..., None]), -1)
    log_total = jnp.log(total)
    at_label, spread = targets(w, labels, None if label_smoothing is None else or_nan(label_smoothing, 1.0))
    loss = at_label * silenced(nll(logits, labels, log_total, shift), at_label)
    if spread is not None:
        loss += spread_out(spread, log_total, x - shift[..., None])
    if z_loss is not None:
        loss += or_nan(z_loss) * (log_total + shift) ** 2
    loss = jnp.where(label.in_range(labels, x), loss, jnp.nan)
    if where is None:
        return loss, total, shift
    return jnp.where(where, loss, 0), jnp.where(where, total, 1), jnp.where(where, shift, 0)


def prepared(logits, labels, where, class_weights):
    """Logits and weights in the dtype of the computation; a masked example as one that is certain to be harmless."""
    dtype = accumulation_dtype(logits.dtype)
    x, labels = logits.astype(dtype), label.widened(labels)
    if where is not None:
        x, labels = jnp.where(where[..., None], x, 0), jnp.where(where, labels, 0)
    return x, labels, class_weights.astype(dtype)


def targets(w, labels, label_smoothing):
    """The weighted target: what the label's class has of it, and, if there is smoothing, every class besides."""
    if label_smoothing is None:
        return label.weight(w, labels), None
    return (1 - label_smoothing) * label.weight(w, labels), label_smoothing / w.size * w


def spread_out(spread, log_total, shifted):
    """The loss of what is spread over the classes, Σ_c spread_c (log_total − shifted_c); `spread` may differ by row."""
    rows = broadcast_like(spread, shifted)
    return jnp.sum(spread, -1) * log_total - jnp.sum(rows * silenced(shifted, rows), -1)


def nll(logits, labels, log_total, shift):
    """−log softmax at the label; of a label out of range, whose loss will be NaN, at another one.

    Taken from the logits as they came, so that nothing wider is ever stored.
    """
    return log_total - (label.entry(logits, labels).astype(log_total.dtype) - shift)


def silenced(x, weight):
    """`x`, but 0 for an infinity that a weight of 0 multiplies."""
    return jnp.where((weight == 0) & jnp.isinf(x), 0, x)
