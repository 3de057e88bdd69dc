"""The public operation and the choice of its implementation."""

from typing import Literal

from jaxtyping import Array, Float, Integer

from . import plain

Implementation = Literal["xla", "pallas"]


def weighted_xent(
    logits: Float[Array, "*batch classes"],
    labels: Integer[Array, "*batch"],
    class_weights: Float[Array, " classes"],
    *,
    label_smoothing: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Weighted softmax cross-entropy of every example, and the logsumexp of its logits.

    Differentiable in the logits and in the class weights, any number of times, in forward and reverse mode.

    **Arguments:**

    - `logits`: unnormalised log-probabilities; float16 and bfloat16 are computed and returned in float32.
    - `labels`: class indices; a label out of range makes its example's loss NaN.
    - `class_weights`: one weight per class.
    - `label_smoothing`: the share of the target that is spread evenly over the classes, each with its own weight.
    - `implementation`: `"xla"` is plain JAX. `None` picks the best one that there is. A named one works or raises.

    **Returns:** `(loss, logsumexp)`, float32, or float64 for float64 logits.
    """
    if implementation == "pallas":
        raise NotImplementedError(
            'This version has no Pallas kernel yet: use implementation="xla", or None to pick what there is.'
        )
    if implementation not in (None, "xla"):
        raise ValueError(f'implementation must be None, "xla" or "pallas", got {implementation!r}.')
    return plain.weighted_xent(logits, labels, class_weights, label_smoothing)
