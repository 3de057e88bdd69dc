"""The public operation and the choice of its implementation."""

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from . import launch
from .operation import Implementation as Implementation
from .operation import Options, forward


def weighted_xent(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    class_weights: Float[Array, " classes"],
    *,
    where: Bool[Array, "*batch"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Weighted softmax cross-entropy of every example, and the logsumexp of its logits.

    Differentiable in the logits and in the class weights, any number of times, in forward and reverse mode.

    **Arguments:**

    - `logits`: unnormalised log-probabilities; float16 and bfloat16 are computed and returned in float32.
    - `labels`: class indices; a label out of range makes its example's loss NaN.
    - `class_weights`: one weight per class.
    - `where`: examples that count; the others have loss and logsumexp 0, and no gradient.
    - `label_smoothing`: the share of the target that is spread evenly over the classes, each with its own weight.
    - `z_loss`: coefficient of the squared logsumexp in the loss.
    - `implementation`: `"xla"` is plain JAX, `"pallas"` the kernel for NVIDIA GPUs, Ampere or later. `None` picks by
        platform, dtype and size. A named one works or raises. To export a program, name `"xla"`.

    **Returns:** `(loss, logsumexp)`, float32, or float64 for float64 logits.

    **Raises:** `ValueError` if the named implementation cannot do it. On another platform than CUDA, `"pallas"` raises
    when the program is compiled.
    """
    if implementation not in (None, *get_args(Implementation)):
        raise ValueError(f'implementation must be None, "xla" or "pallas", got {implementation!r}.')
    logits, labels, class_weights = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(class_weights)
    where = None if where is None else jnp.asarray(where)
    *batch, num_classes = logits.shape
    expected = [(*batch,), (num_classes,), (*batch,)]
    shapes = [labels.shape, class_weights.shape, where.shape if where is not None else (*batch,)]
    if shapes != expected:
        raise ValueError(
            f"logits of shape {logits.shape} need labels, class_weights and where of shapes {expected}, got {shapes}."
        )
    if implementation == "pallas" and 0 not in logits.shape and (reason := launch.obstacle(logits)):
        raise ValueError(f'implementation="pallas" cannot be used here: {reason}. "xla" and None can.')
    options = Options(float(label_smoothing), float(z_loss), implementation)
    loss, total, shift = forward(options, logits, labels, class_weights, where)
    return loss, jnp.log(total) + shift
