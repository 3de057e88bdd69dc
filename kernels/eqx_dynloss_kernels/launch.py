"""When the Pallas kernel can run, when it is worth it, and in which blocks."""

import functools as ft
import importlib.util
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Launch(NamedTuple):
    """Rows and columns that a program of the kernel holds at a time, and its warps of 32 threads."""

    block_rows: int
    block_columns: int
    num_warps: int


def launch(num_rows: int, num_classes: int, itemsize: int) -> Launch:
    """Whole rows, about 1024 logits of them, up to 8192 classes; above, one row in blocks of 4096."""
    if num_classes > 8192:
        return Launch(1, 4096, 8)
    block_columns = _power_of_two(num_classes)
    block_rows = max(1, 1024 // block_columns)
    block_rows = min(block_rows, _power_of_two(num_rows))
    per_warp = 256 if itemsize == 4 else 512
    return Launch(block_rows, block_columns, min(16, max(1, block_rows * block_columns // per_warp)))


def obstacle(logits) -> str | None:
    """Why the kernel cannot take these logits; None if it can."""
    if logits.dtype == jnp.float64:
        return "it computes in float32, and these logits are float64"
    if jax.sharding.AxisType.Explicit in jax.typeof(logits).sharding.mesh.axis_types:
        return "it does not know how to run on an explicitly sharded mesh: call it inside jax.shard_map"
    if not _has_triton():
        return "this version of JAX comes without the Triton backend of Pallas"
    return None


def possible(logits) -> bool:
    return obstacle(logits) is None and logits.size > 0


def worthwhile(logits) -> bool:
    """Whether the kernel is expected to beat plain JAX on a GPU."""
    return True


@ft.cache
def _has_triton() -> bool:
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return False
    return hasattr(triton, "CompilerParams")


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not less than n."""
    return 1 << max(0, n - 1).bit_length()
