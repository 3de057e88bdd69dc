r"""Weighted softmax cross-entropy in plain JAX: the specification of every other implementation.

With target distribution $q$ (one-hot, or smoothed), class weights $w$ and logits $x$, each class's term keeps the
weight of that class, and the squared logsumexp has a coefficient $z$ of its own:

$$\ell = \sum_c w_c\,q_c\,(\mathrm{lse}(x) - x_c) + z\,\mathrm{lse}(x)^2.$$

Everything is computed from logits shifted by their maximum, so that no digits are lost to a common offset.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer


def forward(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    class_weights: Float[Array, " classes"],
    where: Bool[Array, "*batch"] | None,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The losses, and what the softmax needs: the total Σ exp(x − shift) and the shift.

    An example that is masked has loss 0, total 1 and shift 0. A label out of range has the loss NaN.
    """
    x, labels, w = prepared(logits, labels, class_weights, where)
    top = jnp.max(x, -1, initial=-jnp.inf)
    shift = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.sum(jnp.exp(x - shift[..., None]), -1)
    log_total = jnp.log(total)
    weight = at_label(w, labels)
    loss = (1 - label_smoothing) * weight * silenced(nll(logits, labels, log_total, shift), weight)
    if label_smoothing:
        shifted, rows = x - shift[..., None], jnp.broadcast_to(w, x.shape)
        spread = jnp.sum(w) * log_total - jnp.sum(rows * silenced(shifted, rows), -1)
        loss += label_smoothing / x.shape[-1] * spread
    if z_loss:
        loss += z_loss * (log_total + shift) ** 2
    loss = jnp.where(in_range(labels, x), loss, jnp.nan)
    if where is None:
        return loss, total, shift
    return jnp.where(where, loss, 0), jnp.where(where, total, 1), jnp.where(where, shift, 0)


def prepared(logits, labels, class_weights, where):
    """Logits and weights in the dtype of the computation; a masked example as one that is certain to be harmless."""
    # Not promote_types: it refuses bfloat16 with float32 under strict dtype promotion.
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    # 1000 does not fit into int8, nor 256 into uint8: comparing labels with the number of classes would wrap around.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    x = logits.astype(dtype)
    if where is not None:
        x, labels = jnp.where(where[..., None], x, 0), jnp.where(where, labels, 0)
    return x, labels, class_weights.astype(dtype)


def in_range(labels, logits):
    return (labels >= 0) & (labels < logits.shape[-1])


def nll(logits, labels, log_total, shift):
    """−log softmax at the label; of a label out of range, whose loss will be NaN, at another one.

    Gathered from the logits as they came, so that nothing wider is ever stored.
    """
    true = jnp.take_along_axis(logits, labels[..., None], -1, mode="clip")[..., 0]
    return log_total - (true.astype(log_total.dtype) - shift)


def silenced(x, weight):
    """`x`, but 0 for an infinity that a weight of 0 multiplies."""
    return jnp.where((weight == 0) & jnp.isinf(x), 0, x)


def at_label(w, labels):
    """The weight of each label, 0 if there is no such class."""
    sharding = jax.typeof(labels).sharding  # on an explicitly sharded mesh the result's has to be said
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return w.at[labels].get(
        mode="fill", fill_value=0, wrap_negative_indices=False, out_sharding=sharding if explicit else None
    )
