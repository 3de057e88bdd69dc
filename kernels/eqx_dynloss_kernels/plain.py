r"""Weighted softmax cross-entropy in plain JAX: the specification of every other implementation.

With target distribution $q$ (one-hot, or smoothed), class weights $w$ and logits $x$, each class's term keeps the
weight of that class:

$$\ell = \sum_c w_c\,q_c\,(\mathrm{lse}(x) - x_c).$$

Written for XLA: one `exp` per logit is kept and shared by value and derivative. The value gathers the true logit, which
reads one number a row; the derivative selects it by comparison with an iota, whose transpose fuses where a scatter does
not. Everything is computed from logits shifted by their maximum, so that no digits are lost to a common offset.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


@ft.partial(jax.custom_jvp, nondiff_argnums=(3,))
def weighted_xent(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    class_weights: Float[Array, " classes"],
    label_smoothing: float,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """See `eqx_dynloss_kernels.weighted_xent`."""
    x, labels, w = _widen(logits, labels, class_weights)
    exps, total, shift = _exponentials(x)
    log_total = jnp.log(total)
    return _values(logits, labels, w, label_smoothing, log_total, shift), log_total + shift


@ft.partial(weighted_xent.defjvp, symbolic_zeros=True)
def _weighted_xent_jvp(label_smoothing, primals, tangents):
    # All of this is differentiated again for second derivatives: the softmax is e/Σe, so that no rule is applied twice.
    dlogits, _, dweights = tangents
    x, labels, w = _widen(*primals)
    num_classes = x.shape[-1]
    exps, total, shift = _exponentials(x)
    log_total = jnp.log(total)
    shifted = x - shift[..., None]
    loss = _values(primals[0], labels, w, label_smoothing, log_total, shift)
    dloss = dlse = jnp.zeros_like(log_total)
    if not _is_zero(dlogits):
        dx = dlogits.astype(x.dtype)
        dlse = jnp.sum(exps * dx, -1) / total
        dloss = (1 - label_smoothing) * _select(w, labels) * (dlse - _pick(dx, labels))
        if label_smoothing:
            dloss += label_smoothing / num_classes * (jnp.sum(w) * dlse - jnp.sum(_rows(w, dx) * dx, -1))
    if not _is_zero(dweights):
        # This must be linear in the tangent: what is silenced depends on the weight.
        dw = dweights.astype(w.dtype)
        nll = _silence(_nll(primals[0], labels, log_total, shift), _select(w, labels))
        dloss += (1 - label_smoothing) * _select(dw, labels) * nll
        if label_smoothing:
            logits = _silence(shifted, _rows(w, x))
            dloss += label_smoothing / num_classes * (jnp.sum(dw) * log_total - jnp.sum(_rows(dw, x) * logits, -1))
    return (loss, log_total + shift), (jnp.where(_in_range(labels, x), dloss, 0), dlse)


def _values(logits, labels, w, label_smoothing, log_total, shift):
    """The losses from shifted logits: their logsumexp is small, and so is its rounding, whatever the logits' offset."""
    weight = _select(w, labels)
    loss = (1 - label_smoothing) * weight * _silence(_nll(logits, labels, log_total, shift), weight)
    if label_smoothing:
        shifted = logits.astype(w.dtype) - shift[..., None]
        num_classes = shifted.shape[-1]
        rows = _rows(w, shifted)
        loss += label_smoothing / num_classes * (jnp.sum(w) * log_total - jnp.sum(rows * _silence(shifted, rows), -1))
    return jnp.where(_in_range(labels, logits), loss, jnp.nan)


def _in_range(labels, logits):
    return (labels >= 0) & (labels < logits.shape[-1])


def _nll(logits, labels, log_total, shift):
    """−log softmax at the label. Gathered from the logits as they came, so that nothing wider is ever stored."""
    at_label = jnp.take_along_axis(logits, labels[..., None], -1, mode="fill", fill_value=0)[..., 0]
    return log_total - (at_label.astype(log_total.dtype) - shift)


def _silence(x, weight):
    """`x`, but 0 for an infinity that a weight of 0 multiplies."""
    return jnp.where((weight == 0) & jnp.isinf(x), 0, x)


def _exponentials(x):
    """exp(x − shift), its sum, and the shift: the row's maximum, or 0 where that is infinite."""
    top = jnp.max(jax.lax.stop_gradient(x), -1, initial=-jnp.inf)
    shift = jnp.where(jnp.isfinite(top), top, 0)
    exps = jnp.exp(x - shift[..., None])
    return exps, jnp.sum(exps, -1), shift


def _pick(x, labels):
    """The entry of each row that its label names, 0 if none."""
    is_label = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == labels.astype(jnp.int32)[..., None]
    return jnp.sum(jnp.where(is_label, x, 0), -1)


def _select(w, labels):
    """The weight of each label, 0 if there is no such class."""
    return w.at[labels].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _rows(w, x):
    return jnp.broadcast_to(w, x.shape)


def _widen(logits, labels, class_weights):
    # Not promote_types: it refuses bfloat16 with float32 under strict dtype promotion.
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    # 1000 does not fit into int8, nor 256 into uint8: comparing labels with the number of classes would wrap around.
    labels = labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels
    return logits.astype(dtype), labels, class_weights.astype(dtype)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
