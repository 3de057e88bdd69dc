r"""Weighted softmax cross-entropy in plain JAX: the specification of every other implementation.

With target distribution $q$ (one-hot, or smoothed), class weights $w$ and logits $x$, each class's term keeps the
weight of that class:

$$\ell = \sum_c w_c\,q_c\,(\mathrm{lse}(x) - x_c).$$

Written for XLA: one `exp` per logit is kept and shared by value and derivative, and the true logit is selected by
comparison with an iota, which fuses where a gather and its scatter do not.
"""

import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@ft.partial(jax.custom_jvp, nondiff_argnums=(3,))
def weighted_xent(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    class_weights: Float[Array, " classes"],
    label_smoothing: float,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """See `eqx_dynloss_kernels.weighted_xent`."""
    x, w = _widen(logits, class_weights)
    exps, total, shift = _exponentials(x)
    return _values(x, labels, w, label_smoothing, jnp.log(total) + shift)


@ft.partial(weighted_xent.defjvp, symbolic_zeros=True)
def _weighted_xent_jvp(label_smoothing, primals, tangents):
    # All of this is differentiated again for second derivatives: the softmax is e/Σe, so that no rule is applied twice.
    logits, labels, class_weights = primals
    x, w = _widen(logits, class_weights)
    dlogits, _, dweights = tangents
    num_classes = x.shape[-1]
    exps, total, shift = _exponentials(x)
    lse = jnp.log(total) + shift
    loss, _ = _values(x, labels, w, label_smoothing, lse)
    dloss = dlse = jnp.zeros_like(lse)
    if not _is_zero(dlogits):
        dx = dlogits.astype(x.dtype)
        dlse = jnp.sum(exps / total[..., None] * dx, -1)
        dloss = (1 - label_smoothing) * _select(w, labels) * (dlse - _pick(dx, labels))
        if label_smoothing:
            dloss += label_smoothing / num_classes * (jnp.sum(w) * dlse - jnp.sum(_rows(w, dx) * dx, -1))
    if not _is_zero(dweights):
        dw = dweights.astype(w.dtype)
        dloss += (1 - label_smoothing) * _select(dw, labels) * (lse - _pick(x, labels))
        if label_smoothing:
            dloss += label_smoothing / num_classes * (jnp.sum(dw) * lse - jnp.sum(_rows(dw, x) * x, -1))
    return (loss, lse), (dloss, dlse)


def _values(x, labels, w, label_smoothing, lse):
    nll = lse - _pick(x, labels)
    weight = _select(w, labels)
    loss = (1 - label_smoothing) * jnp.where(weight == 0, 0, weight * nll)  # a weight of 0 silences an infinite loss
    if label_smoothing:
        num_classes = x.shape[-1]
        loss += label_smoothing / num_classes * (jnp.sum(w) * lse - jnp.sum(_rows(w, x) * x, -1))
    in_range = (labels >= 0) & (labels < x.shape[-1])
    return jnp.where(in_range, loss, jnp.nan), lse


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


def _widen(logits, class_weights):
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    return logits.astype(dtype), class_weights.astype(dtype)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)
