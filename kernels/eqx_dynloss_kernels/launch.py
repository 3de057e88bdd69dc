"""When the Pallas kernel can run, when it is worth it, and in which blocks."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp

_WHOLE_ROW = 8192  # classes that a program holds at once


class Launch(NamedTuple):
    """Rows and columns that a program of the kernel holds at a time, and its warps of 32 threads."""

    block_rows: int
    block_columns: int
    num_warps: int


def launch(num_rows: int, num_classes: int, itemsize: int) -> Launch:
    """Whole rows, about 1024 logits of them, up to 8192 classes; above, one row in blocks of 4096."""
    if num_classes > _WHOLE_ROW:
        return Launch(1, 4096, 8)
    block_columns = _power_of_two(num_classes)
    block_rows = max(1, 1024 // block_columns)
    block_rows = min(block_rows, _power_of_two(num_rows))
    per_warp = 512 if itemsize == 2 and block_rows == 1 else 256  # more would not fit into the registers
    return Launch(block_rows, block_columns, min(16, max(1, block_rows * block_columns // per_warp)))


def obstacle(logits) -> str | None:
    """Why the kernel cannot take these logits, whatever the platform; None if it can."""
    if logits.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 or float16, and these logits are {logits.dtype}"
    if jax.sharding.AxisType.Explicit in jax.typeof(logits).sharding.mesh.axis_types:
        return "it does not know how to run on an explicitly sharded mesh: call it inside jax.shard_map"
    if not all(isinstance(size, int) for size in logits.shape):
        return "it needs to know the shape of the logits, and a dimension of these is symbolic"
    if 0 in logits.shape:
        return "there is nothing to compute"
    if not _has_triton():
        return "this version of JAX comes without the Triton backend of Pallas"
    return None


def worthwhile(logits) -> bool:
    """Whether the kernel is the better choice on a GPU, given the type of the logits.

    By what XLA 0.12 compiles for an H100, not by timing:

    - Kernels launched by a training step of a linear classifier: from 64 classes on never more than with plain JAX, and
      mostly one to four fewer. With 3 or 10 classes as many, or two more (64 × 3: 9 against 7; a step of eight members
      of Myrtle5-64, 512 × 10 logits each: 125 against 123), as XLA fuses so small a loss with its surroundings. With
      65,536 × 10 float32 logits the kernel is ahead again: XLA reads them twice.
    - Outside `jax.shard_map`, with several devices, the compiler may have to divide the program, and would gather all
      logits on every device for a kernel that it cannot look into. The devices are those of the process that compiles.
    - With fewer rows than about half of the multiprocessors, programs of one row each leave most of a GPU idle. XLA
      splits rows of more than 16,384 classes, and reading them twice is the smaller evil.
    """
    if not all(isinstance(size, int) for size in logits.shape) or _before_ampere():
        return False
    num_classes = logits.shape[-1]
    axis_types = logits.sharding.mesh.axis_types
    is_manual = bool(axis_types) and all(kind == jax.sharding.AxisType.Manual for kind in axis_types)
    if jax.device_count() > 1 and not is_manual:
        return False
    if num_classes > 16384 and logits.size // num_classes < 64:
        return False
    return num_classes >= 64 or logits.size >= 2**19


def _before_ampere() -> bool:
    """Whether there is a GPU of a compute capability that Triton does not support."""
    try:
        return any(float(device.compute_capability) < 8 for device in jax.local_devices(backend="gpu"))
    except (RuntimeError, AttributeError):  # there is none, or one of another kind: this is compiled for elsewhere
        return False


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
