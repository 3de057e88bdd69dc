r"""Losses with class weights, and the dynamical loss that lets a schedule move them.

The functions return one loss per example and leave the mean to the caller, because with class weights there are two:

- **divided by the number of examples**, `jnp.mean(loss)`: the paper's, and `DynamicalLoss`'s. The size of a step then
  follows the weights of the classes that happen to be in the batch.
- **divided by the sum of the examples' weights**, `jnp.sum(loss) / jnp.sum(class_weights[labels])`: what PyTorch's
  `cross_entropy` does. An example's influence then depends on the company it is in.

With balanced classes, full batches and weights that sum to the number of classes they are the same number.
"""

from typing import Literal, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from eqx_dynloss_kernels import weighted_xent
from eqx_dynloss_kernels.api import Implementation
from eqx_dynloss_kernels.plain import at_label, in_range, prepared
from jax import lax
from jaxtyping import Array, Bool, Float, Integer, PyTree

from .schedule import AbstractSchedule, Step


def softmax_cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    class_weights: Float[Array, " classes"] | None = None,
    *,
    where: Bool[Array, "*batch"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch"]:
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

    Every first and second derivative exists, in the logits and in the class weights, in forward and reverse mode.

    **Arguments:**

    - `logits`: unnormalised log-probabilities; −inf rules a class out. float16 and bfloat16 are computed in float32. A
        row that rules out every class, or holds +inf or NaN, gives NaN or +inf unless `where` masks it.
    - `labels`: class indices, of any integer dtype. A label out of range gives NaN (and no gradient) unless `where`
        masks it.
    - `class_weights`: one non-negative weight per class; `None` is all ones.
    - `where`: examples that count. The others give exactly 0 and no gradient, whatever their logits and labels hold.
    - `label_smoothing`: share ε of the target that is spread evenly over the classes, in [0, 1]; a class's share keeps
        that class's weight, as in PyTorch.
    - `z_loss`: coefficient z ≥ 0 of the squared logsumexp, which keeps logits from drifting. It is not class-weighted.
    - `implementation`: `None` picks the best one, `"xla"` is plain JAX, `"pallas"` the GPU kernel. A named one works or
        raises.

    **Returns:** float32, or float64 for float64 logits, with the shape of `labels`.

    **Raises:** `ValueError` for shapes that do not fit and options out of range.
    """
    class_weights = _validated(logits, labels.shape, class_weights, where, label_smoothing, z_loss)
    loss, _ = weighted_xent(
        logits,
        labels,
        class_weights,
        where=where,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        implementation=implementation,
    )
    return loss


def softmax_cross_entropy_with_soft_labels(
    logits: Float[Array, "*batch classes"],
    labels: Float[Array, "*batch classes"],
    class_weights: Float[Array, " classes"] | None = None,
    *,
    where: Bool[Array, "*batch"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, "*batch"]:
    r"""The sibling of `softmax_cross_entropy` for targets that are distributions, such as mixed or distilled labels.

    $$\ell = \sum_c w_c\,q_c\,(\mathrm{lse}(x) - x_c) + z\,\mathrm{lse}(x)^2,\qquad q = (1-\epsilon)\,p + \epsilon/C.$$

    **Arguments:** as for `softmax_cross_entropy`, but `labels` holds probabilities $p$ over the classes. A class of
    probability 0 contributes 0, even where its logit is −inf.

    **Returns:** float32, or float64 for float64 logits, one value per example.
    """
    if labels.shape != logits.shape:
        raise ValueError(f"soft labels must have the shape of the logits, {logits.shape}, got {labels.shape}.")
    class_weights = _validated(logits, labels.shape[:-1], class_weights, where, label_smoothing, z_loss)
    dtype = _accumulation_dtype(logits)
    x, q, w = logits.astype(dtype), labels.astype(dtype), class_weights.astype(dtype)
    if where is not None:
        x = jnp.where(where[..., None], x, 0.0)
        q = jnp.where(where[..., None], q, 0.0)
    q = (1 - label_smoothing) * q + label_smoothing / x.shape[-1]
    weighted = jnp.broadcast_to(w, q.shape) * q
    top = lax.stop_gradient(jnp.max(x, -1, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(top), top, 0.0)
    shifted = x - shift[..., None]
    log_total = jax.nn.logsumexp(shifted, -1)
    finite = jnp.where((weighted == 0) & jnp.isneginf(x), 0.0, shifted)
    loss = jnp.sum(weighted, -1) * log_total - jnp.sum(weighted * finite, -1)
    if z_loss:
        loss += z_loss * (log_total + shift) ** 2
    return loss if where is None else jnp.where(where, loss, 0.0)


def squared_error(
    outputs: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    class_weights: Float[Array, " classes"] | None = None,
    *,
    weighting: Literal["sample", "unit"] = "sample",
    where: Bool[Array, "*batch"] | None = None,
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
    - `where`: examples that count. The others give exactly 0 and no gradient, whatever their outputs and labels hold.

    **Returns:** float32, or float64 for float64 outputs, with the shape of `labels`.

    **Raises:** `ValueError` for shapes that do not fit and an unknown weighting.

    ??? cite

        Lavin Pallero and Ruiz-Garcia, 2024, arXiv:2410.10690.
    """
    if weighting not in ("sample", "unit"):
        raise ValueError(f'weighting must be "sample" or "unit", got {weighting!r}.')
    class_weights = _validated(outputs, labels.shape, class_weights, where, name="outputs")
    f, y, w = prepared(jnp.asarray(outputs), jnp.asarray(labels), jnp.asarray(class_weights), where)
    known = in_range(y, f)
    weight = jnp.broadcast_to(w if weighting == "unit" else at_label(w, y)[..., None], f.shape)
    error = jnp.where(known[..., None], f - jax.nn.one_hot(y, f.shape[-1], dtype=f.dtype), 0.0)
    # Before it is squared: the derivative of a square that is silenced afterwards would still be 0 · inf.
    error = jnp.where((weight == 0) & jnp.isinf(error**2), 0.0, error)
    loss = jnp.where(known, jnp.sum(weight * error**2, -1), jnp.nan)
    return loss if where is None else jnp.where(where, loss, 0.0)


@runtime_checkable
class BaseLoss(Protocol):
    """A per-example loss with class weights, such as `softmax_cross_entropy`."""

    def __call__(self, outputs: Array, labels: Array, class_weights: Float[Array, " classes"], /) -> Array: ...


class DynamicalLoss(eqx.Module):
    r"""The scalar that training minimises: a per-example loss under class weights that change with the step.

    $$F(t) = \frac1N\sum_j \ell(f(x_j), y_j;\,\Gamma(t)),$$

    the mean over the N examples (not divided by the sum of the weights). A PyTree: its leaves are the schedule's
    hyperparameters, which can be batched, differentiated and traced.

    ??? cite

        Ruiz-Garcia et al., ICML 2021, arXiv:2102.03793.
    """

    schedule: AbstractSchedule
    base: BaseLoss = eqx.field(static=True, default=softmax_cross_entropy)

    def __call__(self, outputs: PyTree[Array], labels: Array, step: Step) -> Float[Array, ""]:
        """**Arguments:**

        - `outputs`: what the model gives for a batch, in the base loss's form, e.g. `[batch, classes]` logits.
        - `labels`: the batch's labels, e.g. class indices `[batch]`.
        - `step`: the number of the update, 0 for the first.

        **Returns:** the mean loss over the batch.
        """
        return jnp.mean(self.base(outputs, labels, self.schedule(step)))


def _accumulation_dtype(logits):
    # Not promote_types: it refuses bfloat16 with float32 under strict dtype promotion.
    return jnp.float64 if logits.dtype == jnp.float64 else jnp.float32


def _validated(logits, batch_shape, class_weights, where, label_smoothing=0.0, z_loss=0.0, *, name="logits"):
    if logits.ndim == 0 or logits.shape[:-1] != batch_shape:
        raise ValueError(
            f"{name} must have the batch shape of the labels plus one axis of classes, "
            f"got {name} of shape {logits.shape} for labels of batch shape {batch_shape}."
        )
    if where is not None and where.shape != batch_shape:
        raise ValueError(f"where must have the batch shape {batch_shape} of the labels, got {where.shape}.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}.")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}.")
    num_classes = logits.shape[-1]
    if class_weights is None:
        return jnp.ones(num_classes, _accumulation_dtype(logits))
    if class_weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights must hold one weight for each of the {num_classes} classes, "
            f"got shape {class_weights.shape}."
        )
    return class_weights
