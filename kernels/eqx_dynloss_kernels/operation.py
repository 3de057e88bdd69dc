r"""The operation: its derivatives, how it is mapped, and which implementation computes its value.

Three layers, each the only one to know its part. The outer one is a `custom_jvp` whose rule is plain JAX: it needs
nothing but the value's own by-products, it can be differentiated again, and its transpose p − q is one fused pass over
the logits that XLA writes as well as we could. The second is a `custom_vmap` that turns mapped axes into further batch
axes, so that a kernel sees one large problem instead of many small ones. The third picks the kernel or plain JAX when
the program is lowered, by its platform.
"""

import functools as ft
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import launch, plain

Implementation = Literal["xla", "pallas"]


class Options(NamedTuple):
    """What is static about the operation."""

    label_smoothing: float
    z_loss: float
    implementation: Implementation | None


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward(options: Options, logits, labels, class_weights, where):
    """As `plain.forward`: (loss, total, shift)."""
    if options.implementation == "xla" or not launch.possible(logits):
        return plain.forward(logits, labels, class_weights, where, options.label_smoothing, options.z_loss)
    return _mapped(options)(logits, labels, class_weights, where)


@ft.partial(forward.defjvp, symbolic_zeros=True)
def _forward_jvp(options, primals, tangents):
    # The rule is differentiated again for second derivatives: total has its own tangent, and the shift is a constant.
    # exp(x − shift) is what plain.forward computed, and XLA sees that: one exp a logit for value and derivative.
    logits, labels, class_weights, where = primals
    dlogits, _, dweights, _ = tangents
    epsilon = options.label_smoothing
    loss, total, shift = forward(options, *primals)
    x, labels, w = plain.prepared(*primals)
    exps = jnp.exp(x - shift[..., None])
    dloss = dtotal = jnp.zeros_like(total)
    if not _is_zero(dlogits):
        dx = dlogits.astype(x.dtype)
        if where is not None:
            dx = jnp.where(where[..., None], dx, 0)
        dtotal = jnp.sum(exps * dx, -1)
        dlse = dtotal / total
        dloss = (1 - epsilon) * plain.at_label(w, labels) * (dlse - _picked(dx, labels))
        if epsilon:
            rows = jnp.broadcast_to(w, x.shape)
            dloss += epsilon / x.shape[-1] * (jnp.sum(w) * dlse - jnp.sum(rows * dx, -1))
        if options.z_loss:
            dloss += 2 * options.z_loss * (jnp.log(total) + shift) * dlse
    if not _is_zero(dweights):
        # This must be linear in the tangent: what is silenced depends on the weight.
        dw = dweights.astype(w.dtype)
        log_total = jnp.log(total)
        nll = plain.silenced(plain.nll(logits, labels, log_total, shift), plain.at_label(w, labels))
        nll = nll if where is None else jnp.where(where, nll, 0)
        dloss += (1 - epsilon) * plain.at_label(dw, labels) * nll
        if epsilon:
            rows, drows = jnp.broadcast_to(w, x.shape), jnp.broadcast_to(dw, x.shape)
            shifted = plain.silenced(x - shift[..., None], rows)
            dloss += epsilon / x.shape[-1] * (jnp.sum(dw) * log_total - jnp.sum(drows * shifted, -1))
    counts = plain.in_range(labels, x) if where is None else plain.in_range(labels, x) & where
    dtotal = dtotal if where is None else jnp.where(where, dtotal, 0)
    return (loss, total, shift), (jnp.where(counts, dloss, 0), dtotal, jnp.zeros_like(shift))


def _picked(x, labels):
    """The entry of each row that its label names, 0 if none. By comparison: its transpose fuses, a scatter does not."""
    is_label = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == labels.astype(jnp.int32)[..., None]
    return jnp.sum(jnp.where(is_label, x, 0), -1)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _mapped(options: Options):
    """The value alone. Class weights may have leading axes: they are the first batch axes, and the mapped ones."""

    @jax.custom_batching.custom_vmap
    def value(logits, labels, class_weights, where):
        on_cuda, elsewhere = ft.partial(_fused, options), ft.partial(_plain, options)
        if options.implementation == "pallas":
            return lax.platform_dependent(
                logits, labels, class_weights, where, cuda=on_cuda, default=ft.partial(_refused, options)
            )
        if not launch.worthwhile(logits):
            return elsewhere(logits, labels, class_weights, where)
        return lax.platform_dependent(logits, labels, class_weights, where, cuda=on_cuda, default=elsewhere)

    @value.def_vmap
    def fold(axis_size, in_batched, logits, labels, class_weights, where):
        logits_batched, labels_batched, weights_batched, where_batched = in_batched
        if not logits_batched and options.implementation is None:
            # Several losses of the same logits: XLA reads them once, the kernel would need a copy for each.
            axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
            return jax.vmap(ft.partial(_plain, options), axes)(logits, labels, class_weights, where), (True,) * 3
        stack = lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        logits, labels = stack(logits, logits_batched), stack(labels, labels_batched)
        if weights_batched or class_weights.ndim > 1:
            class_weights = stack(class_weights, weights_batched)
        if where is not None:
            where = stack(where, where_batched)
        return value(logits, labels, class_weights, where), (True,) * 3

    return value


def _plain(options, logits, labels, class_weights, where):
    function = ft.partial(plain.forward, label_smoothing=options.label_smoothing, z_loss=options.z_loss)
    for _ in class_weights.shape[:-1]:
        function = jax.vmap(function)
    return function(logits, labels, class_weights, where)


def _fused(options, logits, labels, class_weights, where):
    from . import triton  # Pallas for Triton is not in every version of JAX

    num_classes = logits.shape[-1]
    outputs = triton.forward(
        logits.reshape(-1, num_classes),
        labels.reshape(-1),
        class_weights.reshape(-1, num_classes),
        None if where is None else where.reshape(-1),
        options.label_smoothing,
        options.z_loss,
    )
    return tuple(x.reshape(labels.shape) for x in outputs)


_only_on_cuda = Primitive("weighted_xent_only_on_cuda")
_only_on_cuda.def_abstract_eval(lambda x: x)


def _refused(options, logits, *args):
    """Raises where the platform becomes known: when it is lowered for another one than CUDA, or called there."""
    return _plain(options, _only_on_cuda.bind(logits), *args)


@_only_on_cuda.def_impl
def _raise(*_):
    raise ValueError(
        'implementation="pallas" is for NVIDIA GPUs, and this program is for another platform: use "xla", or None, '
        "which picks what fits."
    )


mlir.register_lowering(_only_on_cuda, _raise)
