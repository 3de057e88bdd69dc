r"""The operation: its derivatives, how it is mapped, and which implementation computes its value.

Two layers. The outer one is a `custom_jvp` whose rule is plain JAX: it needs nothing but the value's own by-products,
it can be differentiated again, and its transpose p − q is one fused pass over the logits that XLA writes as well as we
could. The inner one, the value alone, is a primitive. Its batching rule turns mapped axes into further batch axes, so
that a kernel sees one large problem instead of many small ones; and what it lowers to depends on the platform, which
is known only then: the kernel for CUDA, if it is possible and worth it, and plain JAX elsewhere.
"""

import functools as ft
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

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
    args = [logits, labels, class_weights] + ([] if where is None else [where])
    if options.implementation == "xla" or launch.obstacle(logits):
        return tuple(_plain(*args, options=options))
    return tuple(_value.bind(*_vary_alike(args), options=options))


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
        dloss = (1 - epsilon) * plain.at_label(w, labels) * (dlse - _picked(dx, labels, x.dtype != logits.dtype))
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


def _picked(x, labels, widened: bool):
    """The entry of each row that its label names; of a label out of range, any finite one or 0.

    `widened`: whether `x` has a wider dtype than the logits are stored in.
    """

    def compare(x, labels):  # its transpose is fused into the pass that writes the logits' gradient
        is_label = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) == labels[..., None]
        return jnp.sum(jnp.where(is_label, x, 0), -1)

    def gather(x, labels):  # its transpose, a scatter of one entry a row, costs a CPU less than comparing all entries
        return jnp.take_along_axis(x, labels[..., None], -1, mode="clip")[..., 0]

    labels = labels.astype(jnp.int32)
    # A scatter would stand between a gradient and its rounding to narrower logits: one more array of all entries.
    if widened or x.shape[-1] < 64:
        return compare(x, labels)
    return lax.platform_dependent(x, labels, cpu=gather, default=compare)


def _is_zero(tangent) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


# The value: of logits, labels, class weights and, if there is one, the mask. Class weights may have leading axes: they
# are the first batch axes, and the mapped ones.
_value = Primitive("weighted_xent")
_value.multiple_results = True


@_value.def_impl
def _call(*args, options):
    return _compiled(options)(*args)


@ft.cache
def _compiled(options: Options):
    return jax.jit(ft.partial(_value.bind, options=options))


@_value.def_abstract_eval
def _types(logits, labels, *_, options):
    return [labels.update(dtype=jnp.float32, weak_type=False)] * 3


def _fold(args, axes, *, options):
    logits, labels, class_weights, *_ = args
    if axes[0] != 0 and options.implementation is None:
        # Several losses of the same logits: XLA reads them once, the kernel would need a copy for each. And where the
        # mapped axis is not the first, it would need one with the axes exchanged.
        softmax = 0 if axes[0] is not None or any(axis is not None for axis in axes[3:]) else None
        out_axes = [0, softmax, softmax]
        return jax.vmap(ft.partial(_plain, options=options), axes, out_axes)(*args), out_axes
    size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)

    def stack(x, axis):
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)

    shared = axes[2] is None and class_weights.ndim == 1
    args = [x if shared and x is class_weights else stack(x, axis) for x, axis in zip(args, axes, strict=True)]
    return _value.bind(*args, options=options), [0, 0, 0]


batching.primitive_batchers[_value] = _fold


def _jvp(primals, tangents, *, options):
    # For the outer rule's sake: JAX 0.10 takes it off in what jax.checkpoint recomputes.
    active = [i for i, tangent in enumerate(tangents) if i in (0, 2) and not isinstance(tangent, ad.Zero)]

    def function(*values):
        moved = dict(zip(active, values, strict=True))
        logits, labels, class_weights, *where = (moved.get(i, x) for i, x in enumerate(primals))
        f = ft.partial(forward, options)
        for _ in class_weights.shape[:-1]:
            f = jax.vmap(f)
        return list(f(logits, labels, class_weights, where[0] if where else None))

    return jax.jvp(function, [primals[i] for i in active], [tangents[i] for i in active])


ad.primitive_jvps[_value] = _jvp


def _lower_for_cuda(context, *args, options):
    logits = context.avals_in[0]
    if options.implementation == "pallas":
        return _lower(_fused, context, args, options)
    if not launch.worthwhile(logits):
        return _lower(_plain, context, args, options)
    try:
        return _lower(_fused, context, args, options)
    except Exception:  # whatever a future JAX or an unknown GPU may object to: nobody asked for the kernel by name
        return _lower(_plain, context, args, options)


def _lower_elsewhere(context, *args, options):
    return _lower(_plain if options.implementation is None else _refused, context, args, options)


def _lower(function, context, args, options):
    return mlir.lower_fun(function, multiple_results=True)(context, *args, options=options)


mlir.register_lowering(_value, _lower_elsewhere)
mlir.register_lowering(_value, _lower_for_cuda, platform="cuda")


def _plain(logits, labels, class_weights, where=None, *, options):
    function = ft.partial(plain.forward, label_smoothing=options.label_smoothing, z_loss=options.z_loss)
    for _ in class_weights.shape[:-1]:
        function = jax.vmap(function)
    return list(function(logits, labels, class_weights, where))


def _fused(logits, labels, class_weights, where=None, *, options):
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
    return [x.reshape(labels.shape) for x in outputs]


def _refused(*_, options):
    raise ValueError(
        f'implementation="{options.implementation}" is for NVIDIA GPUs, and this program is for another platform: use '
        '"xla", or None, which picks what fits.'
    )


def _vary_alike(args):
    """Inside `shard_map`, marks all arguments as varying over the mesh axes that any of them varies over."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in args]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(args, missing, strict=True)]
