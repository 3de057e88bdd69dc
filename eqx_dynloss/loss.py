r"""Losses with class weights, and the dynamical loss that lets a schedule move them.

The functions return one loss per example and leave the mean to the caller, because with class weights there are two:

- **divided by the number of examples**, `jnp.mean(loss)`: the paper's, and `DynamicalLoss`'s. The size of a step then
  follows the weights of the classes that happen to be in the batch.
- **divided by the sum of the examples' weights**, `jnp.sum(loss) / jnp.sum(class_weights[labels])`: what PyTorch's
  `cross_entropy` does. An example's influence then depends on the company it is in.

With balanced classes, full batches and weights that sum to the number of classes they are the same number.
"""

from typing import Any, Literal, Protocol, SupportsIndex, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from eqx_dynloss_kernels import label, operands, weighted_xent
from eqx_dynloss_kernels.api import Implementation
from eqx_dynloss_kernels.plain import prepared
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, PyTree, Real, Shaped

from .schedule import AbstractSchedule, Step


def softmax_cross_entropy(
    logits: Real[ArrayLike, "*logits"] | list,
    labels: Integer[ArrayLike, "*batch"] | list,
    class_weights: Real[ArrayLike, " classes"] | list | tuple | int | None = None,
    *,
    axis: SupportsIndex | tuple[SupportsIndex, ...] = -1,
    where: Bool[ArrayLike, "..."] | list | None = None,
    label_smoothing: Real[ArrayLike, ""] = 0.0,
    z_loss: Real[ArrayLike, ""] = 0.0,
    implementation: Implementation | None = None,
) -> Float[Array, "..."]:
    r"""Softmax cross-entropy with integer labels and class weights, one value per example.

    For classification with one class per example. With label $y$, smoothing $\epsilon$, weights $w$ and $C$ classes

    $$\ell = (1-\epsilon)\,w_y\,(\mathrm{lse}(x) - x_y) + \frac{\epsilon}{C}\sum_c w_c\,(\mathrm{lse}(x) - x_c)
      + z\,\mathrm{lse}(x)^2.$$

    ```python
    >>> import jax.numpy as jnp
    >>> from eqx_dynloss.loss import softmax_cross_entropy
    >>> softmax_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]), jnp.array([0.5, 1.5]))
    Array([1.0397208], dtype=float32)

    ```

    Every first and second derivative exists, in the logits, the class weights, ε and z, in forward and reverse mode.

    **Arguments:**

    - `logits`: unnormalised log-probabilities, `[..., classes]`; −inf rules a class out. float16 and bfloat16 are
        computed in float32. A row that rules out every class, or holds +inf or NaN, gives NaN or +inf unless `where`
        masks it.
    - `labels`: class indices `[...]`, of any integer dtype. A label out of range gives NaN (and no gradient) unless
        `where` masks it.
    - `class_weights`: one non-negative weight per class; `None` is all ones.
    - `axis`: where the classes are. Along several axes, a label is the flat index into them, in their order, and so
        are the class weights.
    - `where`: boolean. Of the shape of the labels: examples that count; the others give exactly 0 and no gradient,
        whatever their logits and labels hold. Of the shape of the logits: the classes that each example has, such as
        legal actions or a vocabulary without its padding. The loss is that of an example which never had the others:
        a label among these gives NaN, and without any class it is 0. A mask of classes always takes plain JAX.
    - `label_smoothing`: share ε of the target that is spread evenly over the classes, in [0, 1]; a class's share keeps
        that class's weight, as in PyTorch.
    - `z_loss`: coefficient z ≥ 0 of the squared logsumexp, which keeps logits from drifting. It is not class-weighted.
        Both may be traced, mapped and differentiated; one that is traced and out of range gives NaN.
    - `implementation`: `None` picks the best one, `"xla"` is plain JAX, `"pallas"` the GPU kernel. A named one works or
        raises.

    In the place of the class weights, `axis` is understood as well, as code written for optax has it there.

    **Returns:** float32, or float64 for float64 logits, with the shape of the labels.

    **Raises:** `ValueError` for operands that do not fit and options out of range.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    class_weights, axis = _weights_or_axis(class_weights, axis, logits.ndim - labels.ndim)
    x, mask = operands.classes_last(axis, logits, where)
    loss, _ = weighted_xent(
        x,
        labels,
        class_weights,
        where=mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        implementation=implementation,
    )
    return loss


def softmax_cross_entropy_with_soft_labels(
    logits: Real[ArrayLike, "*logits"] | list,
    labels: Shaped[ArrayLike, "*logits"] | list,
    class_weights: Real[ArrayLike, " classes"] | list | tuple | int | None = None,
    *,
    axis: SupportsIndex | tuple[SupportsIndex, ...] = -1,
    where: Bool[ArrayLike, "..."] | list | None = None,
    label_smoothing: Real[ArrayLike, ""] = 0.0,
    z_loss: Real[ArrayLike, ""] = 0.0,
) -> Float[Array, "..."]:
    r"""The sibling of `softmax_cross_entropy` for targets that are distributions, such as mixed or distilled labels.

    $$\ell = \sum_c w_c\,q_c\,(\mathrm{lse}(x) - x_c) + z\,\mathrm{lse}(x)^2,\qquad q = (1-\epsilon)\,p + \epsilon/C.$$

    **Arguments:** as for `softmax_cross_entropy`, but `labels` holds probabilities $p$ over the classes, in the shape
    of the logits. A class of probability 0 contributes 0, even where its logit is −inf, and so does a class that
    `where` takes out, whatever its probability. In the place of the class weights one integer is understood as the
    axis; a tuple is class weights there, as nothing tells how many axes of classes there are.

    **Returns:** float32, or float64 for float64 logits, one value per example.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    class_weights, axis = _weights_or_axis(class_weights, axis, 1)
    x, q, mask = operands.classes_last(axis, logits, labels, where)
    x = operands.outputs(x)
    q, w, mask = operands.distributions(q, x), operands.weights(class_weights, x), operands.mask(mask, x)
    dtype = operands.accumulation_dtype(x.dtype)
    smoothing = operands.option(label_smoothing, "label_smoothing", dtype, 1.0)
    z = operands.option(z_loss, "z_loss", dtype)
    x, q, even = x.astype(dtype), q.astype(dtype), 1 / x.shape[-1]
    counts = mask
    if mask is not None and mask.ndim == x.ndim:
        even = mask.astype(dtype) / jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1).astype(dtype)
        counts = jnp.any(mask, -1)
        x, q = jnp.where(mask, x, -jnp.inf), jnp.where(mask, q, 0.0)
    if counts is not None:
        x, q = (jnp.where(counts[..., None], a, 0.0) for a in (x, q))
    if smoothing is not None:
        smoothing = operands.or_nan(smoothing, 1.0)
        q = (1 - smoothing) * q + smoothing * even
    weighted = operands.broadcast_like(w.astype(dtype), q) * q
    top = lax.stop_gradient(jnp.max(x, -1, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    shifted = x - shift[..., None]
    log_total = jax.nn.logsumexp(shifted, -1)
    finite = jnp.where((weighted == 0) & jnp.isneginf(x), 0.0, shifted)
    loss = jnp.sum(weighted, -1) * log_total - jnp.sum(weighted * finite, -1)
    if z is not None:
        loss += operands.or_nan(z) * (log_total + shift) ** 2
    return loss if counts is None else jnp.where(counts, loss, 0.0)


def squared_error(
    outputs: Real[ArrayLike, "*batch classes"] | list,
    labels: Integer[ArrayLike, "*batch"] | list,
    class_weights: Real[ArrayLike, " classes"] | list | None = None,
    *,
    weighting: Literal["sample", "unit"] = "sample",
    where: Bool[ArrayLike, "*batch"] | list | None = None,
) -> Float[Array, "*batch"]:
    r"""Squared error against the one-hot target of an integer label, with class weights, one value per example.

    For classification by regression, and for the dynamical mean-squared errors. With outputs $f$, label $y$, its
    one-hot vector $e_y$ and weights $w$, sample-weighted and unit-weighted:

    $$\ell_\mathrm{sample} = w_y \sum_i (f_i - e_{y,i})^2,\qquad \ell_\mathrm{unit} = \sum_i w_i\,(f_i - e_{y,i})^2.$$

    ```python
    >>> import jax.numpy as jnp
    >>> from eqx_dynloss.loss import squared_error
    >>> squared_error(jnp.array([[0.5, 0.5]]), jnp.array([1]), jnp.array([0.5, 1.5]))
    Array([0.75], dtype=float32)
    >>> squared_error(jnp.array([[0.5, 0.5]]), jnp.array([1]), jnp.array([0.5, 1.5]), weighting="unit")
    Array([0.5], dtype=float32)

    ```

    The paper cited below drives mean-squared errors by the same class weights, but its formulas are not known to us:
    the two weightings, their names, the sum over the classes (PyTorch's `mse_loss` takes a mean) and the lack of a
    factor 1/2 are our choice.

    **Arguments:**

    - `outputs`: what the network gives, e.g. without a softmax. float16 and bfloat16 are computed in float32.
    - `labels`: class indices, of any integer dtype. A label out of range gives NaN (and no gradient) unless `where`
        masks it.
    - `class_weights`: one non-negative weight per class; `None` is all ones, with which both weightings are the same. A
        weight of 0 silences an infinite square.
    - `weighting`: `"sample"` weighs an example by its label's weight; `"unit"` weighs every output unit, in every
        example, by the weight of the unit's class.
    - `where`: boolean, examples that count. The others give exactly 0 and no gradient, whatever they hold.

    **Returns:** float32, or float64 for float64 outputs, with the shape of `labels`.

    **Raises:** `ValueError` for shapes that do not fit and an unknown weighting.

    ??? cite

        Lavin Pallero and Ruiz-Garcia, 2024, arXiv:2410.10690.
    """
    if weighting not in ("sample", "unit"):
        raise ValueError(f'weighting must be "sample" or "unit", got {weighting!r}.')
    f = operands.outputs(outputs, "outputs")
    y = operands.class_indices(labels, f, "outputs")
    mask = operands.mask(where, f, of_classes=False)
    f, y, w = prepared(f, y, mask, operands.weights(class_weights, f))
    known = label.in_range(y, f)
    weight = operands.broadcast_like(w if weighting == "unit" else label.weight(w, y)[..., None], f)
    error = jnp.where(known[..., None], f - jax.nn.one_hot(y, f.shape[-1], dtype=f.dtype), 0.0)
    # Before it is squared: the derivative of a square that is silenced afterwards would still be 0 · inf.
    error = jnp.where((weight == 0) & jnp.isinf(error**2), 0.0, error)
    loss = jnp.where(known, jnp.sum(weight * error**2, -1), jnp.nan)
    return loss if mask is None else jnp.where(mask, loss, 0.0)


def _weights_or_axis(class_weights, axis, num_axes) -> tuple[Any, Any]:
    """Class weights, and the axis of the classes, which optax has in their place: an integer, which class weights never
    are; or as many integers as there are axes of classes, where these are several."""
    is_several = isinstance(class_weights, tuple) and len(class_weights) == num_axes > 1
    if not isinstance(class_weights, int) and not (is_several and all(isinstance(a, int) for a in class_weights)):
        return class_weights, axis
    if axis != -1:
        raise ValueError(f"got two axes of classes, {class_weights} in the place of the class weights and axis={axis}.")
    return None, class_weights


@runtime_checkable
class BaseLoss(Protocol):
    """A per-example loss with class weights, such as `softmax_cross_entropy`."""

    def __call__(self, outputs: Array, labels: Array, class_weights: Float[Array, " classes"], /) -> Array: ...


class DynamicalLoss(eqx.Module):
    r"""The scalar that training minimises: a per-example loss whose class weights, and options, change with the step.

    $$F(t) = \frac1N\sum_j \ell(f(x_j), y_j;\,\Gamma(t), \ldots),$$

    the mean over the N examples (not divided by the sum of the weights). Any option of the loss may be a schedule:

    ```python
    >>> import jax.numpy as jnp, optax
    >>> from eqx_dynloss.loss import DynamicalLoss
    >>> from eqx_dynloss.schedule import OscillatingWeights
    >>> smoothing = optax.linear_schedule(0.2, 0.0, 1000)
    >>> loss = DynamicalLoss(OscillatingWeights(2, 70.0, 500), label_smoothing=smoothing, z_loss=1e-4)
    >>> loss(jnp.array([[0.0, 1.0]]), jnp.array([1]), step=250)
    Array(0.20254968, dtype=float32)

    ```

    A PyTree: its leaves are the arrays in the schedule and in the options, which can be batched, differentiated and
    traced, and so may differ between the members of an ensemble. Numbers and functions are static; functions are
    compared by identity: make them once, or every loss compiles again. An evaluation takes `base` without the options;
    what belongs to the loss itself, such as the exponent of a focal loss, goes into `base` (`functools.partial`).

    ??? cite

        Ruiz-Garcia et al., ICML 2021, arXiv:2102.03793.
    """

    schedule: AbstractSchedule
    base: BaseLoss = eqx.field(static=True)
    options: dict[str, Any]
    static_options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, schedule: AbstractSchedule, base: BaseLoss = softmax_cross_entropy, **options: Any):
        """**Arguments:**

        - `schedule`: class weights as a function of the step.
        - `base`: the loss of an example.
        - `options`: keyword arguments of `base`, such as `label_smoothing`: values, or callables of the step that give
            them, such as optax's schedules and Equinox modules.
        """
        options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        dynamic = {k for k, v in options.items() if any(map(eqx.is_array, jax.tree.leaves(v)))}
        self.schedule = schedule
        self.base = base
        self.options = {k: v for k, v in options.items() if k in dynamic}
        self.static_options = tuple((k, v) for k, v in options.items() if k not in dynamic)

    def __call__(self, outputs: PyTree, labels: PyTree, step: Step) -> Float[Array, ""]:
        """**Arguments:**

        - `outputs`: what the model gives for a batch, in the base loss's form, e.g. `[batch, classes]` logits.
        - `labels`: the batch's labels, e.g. class indices `[batch]`.
        - `step`: the number of the update, 0 for the first.

        **Returns:** the mean loss over the batch.
        """
        options = dict(self.static_options) | self.options
        values = {name: option(step) if callable(option) else option for name, option in options.items()}
        base: Any = self.base
        return jnp.mean(base(outputs, labels, self.schedule(step), **values))
