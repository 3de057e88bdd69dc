"""Whether contestants compute the same thing: a race between different computations says nothing."""

from typing import Any

import jax
import numpy as np

# Summed |actual − expected| over summed |expected|, by the dtype of the actual leaf. Half a unit in the last place of
# bfloat16 is 2⁻⁸ = 0.0039; the rounding of a float32 result averages far below its bound.
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 4e-3, "float16": 5e-4}


def require_agreement(name: str, actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """Raises `AssertionError` unless two PyTrees of arrays (of NumPy, JAX or torch) have close leaves.

    The error of a leaf is the sum of its absolute errors over the sum of the absolute values expected, so that small
    entries count with their own size and an entry that cancels does not count for more than it is.

    **Arguments:**

    - `name`: whose result it is.
    - `actual`, `expected`: the results; `expected` preferably float64.
    - `tolerance`: largest relative error of a leaf; `None` goes by the leaf's dtype.
    """
    leaves, structure = jax.tree.flatten(actual)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    assert structure == expected_structure, f"{name} returned {structure}, expected {expected_structure}"
    for index, (leaf, wanted) in enumerate(zip(leaves, expected_leaves, strict=True)):
        x, y = _float64(leaf), _float64(wanted)
        assert x.shape == y.shape, f"{name}: leaf {index} has shape {x.shape}, expected {y.shape}"
        limit = TOLERANCE.get(_dtype(leaf), 0.0) if tolerance is None else tolerance
        error, size = float(np.sum(np.abs(x - y))), float(np.sum(np.abs(y)))
        # Written so that NaN fails.
        assert error <= limit * size, f"{name}: leaf {index} is off by {error / (size or 1):.2e}, allowed {limit:.2e}"


def _float64(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "detach"):
        leaf = leaf.detach().double().cpu().numpy()
    return np.asarray(leaf).astype(np.float64)


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype).removeprefix("torch.")
