r"""The operation: its derivatives, how it is mapped, and which implementation computes its value.

Two layers. The outer one is a `custom_jvp` whose rule is plain JAX: it needs nothing but the value's own by-products,
it can be differentiated again, and its transpose p − q is one fused pass over the logits that XLA writes as well as we
could. The inner one, the value alone, is a primitive. Its batching rule turns mapped axes into further batch axes, so
that a kernel sees one large problem instead of many small ones; and what it lowers to depends on the platform, which
is known only then: the kernel for CUDA, if it is possible and worth it, and plain JAX elsewhere.
"""

import functools as ft
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from . import label, launch, plain
from .operands import broadcast_like
from .primitives import run, vary_alike

Implementation = Literal["xla", "pallas"]


class Operands(NamedTuple):
    """What the operation is a function of. A label smoothing or z-loss of None is 0, and costs nothing.

    Inside the primitive, class weights and options may have leading axes: they are the first of the batch axes.
    """

    logits: Any
    labels: Any
    where: Any
    class_weights: Any
    label_smoothing: Any
    z_loss: Any


_SHARED = Operands(logits=None, labels=None, where=None, class_weights=1, label_smoothing=0, z_loss=0)  # axes of each


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward(implementation: Implementation | None, operands: Operands):
    """As `plain.forward`: (loss, total, shift)."""
    if implementation == "xla" or launch.obstacle(operands.logits):
        return tuple(_plain(operands))
    args, structure = jax.tree.flatten(operands)
    return tuple(_value.bind(*vary_alike(*args), implementation=implementation, structure=structure))


@ft.partial(forward.defjvp, symbolic_zeros=True)
def _forward_jvp(implementation, primals, tangents):
    # The rule is differentiated again for second derivatives: total has its own tangent, and the shift is a constant.
    # exp(x − shift) is what plain.forward computed, and XLA sees that: one exp a logit for value and derivative.
    (operands,), (tangent,) = primals, tangents
    logits, labels, where, class_weights, smoothing, z_loss = operands
    loss, total, shift = forward(implementation, operands)
    x, labels, w = plain.prepared(logits, labels, where, class_weights)
    at_label, spread = plain.targets(w, labels, smoothing)
    shifted = x - shift[..., None]
    exps = jnp.exp(shifted)
    dloss = dtotal = jnp.zeros_like(total)
    if _moves(tangent.logits):
        dx = tangent.logits.astype(x.dtype)
        if where is not None:
            dx = jnp.where(where[..., None], dx, 0)
        dtotal = jnp.sum(exps * dx, -1)
        dlse = dtotal / total
        dloss = at_label * (dlse - label.entry_of_tangent(dx, labels, widened=x.dtype != logits.dtype))
        if spread is not None:
            dloss += jnp.sum(spread) * dlse - jnp.sum(broadcast_like(spread, x) * dx, -1)
        if z_loss is not None:
            dloss += 2 * z_loss * (jnp.log(total) + shift) * dlse
    dtargets = []
    if _moves(tangent.class_weights):  # in which the targets are linear
        dtargets.append(plain.targets(tangent.class_weights.astype(w.dtype), labels, smoothing))
    if _moves(tangent.label_smoothing):
        dsmoothing = tangent.label_smoothing
        dtargets.append((-dsmoothing * label.weight(w, labels), dsmoothing / w.size * w))
    for dat_label, dspread in dtargets:
        # This must be linear in the tangents: what is silenced depends on the targets.
        log_total = jnp.log(total)
        nll = plain.silenced(plain.nll(logits, labels, log_total, shift), at_label)
        dloss += dat_label * (nll if where is None else jnp.where(where, nll, 0))
        if spread is not None:
            finite = plain.silenced(shifted, broadcast_like(spread, x))
            dloss += jnp.sum(dspread) * log_total - jnp.sum(broadcast_like(dspread, x) * finite, -1)
    if _moves(tangent.z_loss):
        dloss += tangent.z_loss * (jnp.log(total) + shift) ** 2
    counts = label.in_range(labels, x) if where is None else label.in_range(labels, x) & where
    dtotal = dtotal if where is None else jnp.where(where, dtotal, 0)
    return (loss, total, shift), (jnp.where(counts, dloss, 0), dtotal, jnp.zeros_like(shift))


def _moves(tangent) -> bool:
    return tangent is not None and not isinstance(tangent, jax.custom_derivatives.SymbolicZero)


_value = Primitive("weighted_xent")
_value.multiple_results = True
_value.def_impl(ft.partial(run, _value))


@_value.def_abstract_eval
def _types(logits, labels, *_, **params):
    return [labels.update(dtype=jnp.float32, weak_type=False)] * 3


def _fold(args, axes, *, implementation, structure):
    operands, axes = (Operands(*jax.tree.unflatten(structure, values)) for values in (args, axes))
    if axes.logits != 0 and implementation is None:
        # Several losses of the same logits: XLA reads them once, the kernel would need a copy for each. And where the
        # mapped axis is not the first, it would need one with the axes exchanged.
        softmax = 0 if axes.logits is not None or axes.where is not None else None
        out_axes = [0, softmax, softmax]
        return jax.vmap(_plain, (axes,), out_axes)(operands), out_axes
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)

    def stack(x, axis, shared):
        if x is None or (axis is None and x.ndim == shared):
            return x
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)

    stacked = Operands(*map(stack, operands, axes, _SHARED))
    return _value.bind(*jax.tree.leaves(stacked), implementation=implementation, structure=structure), [0, 0, 0]


batching.primitive_batchers[_value] = _fold


def _jvp(primals, tangents, *, implementation, structure):
    # For the outer rule's sake: JAX 0.10 takes it off in what jax.checkpoint recomputes.
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in primals]
    active = [i for i, t in enumerate(tangents) if floating[i] and not isinstance(t, ad.Zero)]

    def function(*values):
        args = [*primals]
        for i, value in zip(active, values, strict=True):
            args[i] = value
        return list(_by_group(ft.partial(forward, implementation), jax.tree.unflatten(structure, args)))

    return jax.jvp(function, [primals[i] for i in active], [tangents[i] for i in active])


ad.primitive_jvps[_value] = _jvp


def _by_group(function, operands: Operands):
    """Calls a function that knows no groups: maps it over the leading axes of class weights and options."""
    extra = [0 if x is None or rank is None else x.ndim - rank for x, rank in zip(operands, _SHARED, strict=True)]
    for level in range(max(extra), 0, -1):  # from the inside out
        axes = [0 if rank is None or n >= level else None for n, rank in zip(extra, _SHARED, strict=True)]
        function = jax.vmap(function, (Operands(*axes),))
    return function(operands)


def _lower_for_cuda(context, *args, **params):
    if params["implementation"] == "pallas":
        return _lower(_fused, context, args, params)
    if not launch.worthwhile(context.avals_in[0]):
        return _lower(_plain, context, args, params)
    try:
        return _lower(_fused, context, args, params)
    except Exception:  # whatever a future JAX or an unknown GPU may object to: nobody asked for the kernel by name
        return _lower(_plain, context, args, params)


def _lower_elsewhere(context, *args, **params):
    return _lower(_plain if params["implementation"] is None else _refused, context, args, params)


def _lower(function, context, args, params):
    def of_leaves(*args):
        return function(jax.tree.unflatten(params["structure"], args))

    return mlir.lower_fun(of_leaves, multiple_results=True)(context, *args)


mlir.register_lowering(_value, _lower_elsewhere)
mlir.register_lowering(_value, _lower_for_cuda, platform="cuda")


def _plain(operands: Operands):
    return list(_by_group(lambda operands: plain.forward(*operands), operands))


def _fused(operands: Operands):
    from . import triton  # Pallas for Triton is not in every version of JAX

    num_classes = operands.logits.shape[-1]
    rows = [(-1, num_classes), (-1,), (-1,), (-1, num_classes), (-1,), (-1,)]
    flat: Any = [None if x is None else x.reshape(shape) for x, shape in zip(operands, rows, strict=True)]
    return [x.reshape(operands.labels.shape) for x in triton.forward(*flat)]


def _refused(_):
    raise ValueError(
        'implementation="pallas" is for NVIDIA GPUs, and this program is for another platform: use "xla", or None, '
        "which picks what fits."
    )
