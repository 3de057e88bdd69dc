"""When the Pallas kernel can run, when it is worth it, and in which blocks."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .operands import is_explicit

_WHOLE_ROW = 8192  # classes that a program holds at once


class Launch(NamedTuple):
    """Rows and columns that a program of the kernel holds at a time, and its warps of 32 threads."""

    block_rows: int
    block_columns: int
    num_warps: int


def launch(num_rows: int, num_classes: int) -> Launch:
    """Whole rows, about 512 logits of them, up to 8192 classes; above, one row in blocks of 4096.

    One warp, or one for every 1024 columns. Of what was timed on an H100 (10 to 50,257 classes, float32 and bfloat16,
    2²⁸ logits, forward pass), the fastest or within 2 % of it: `benchmarks/records/h100.json`; for another GPU,
    `pytest benchmarks/test_launch.py --benchmark`.
    """
    block_columns = 4096 if num_classes > _WHOLE_ROW else _power_of_two(num_classes)
    block_rows = min(max(1, 512 // block_columns), _power_of_two(num_rows))
    return Launch(block_rows, block_columns, max(1, block_columns // 1024))


def obstacle(logits) -> str | None:
    """Why the kernel cannot take these logits, whatever the platform; None if it can."""
    if logits.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 or float16, and these logits are {logits.dtype}"
    if is_explicit(logits):
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

    By kernel launches, as compiled for an H100, and by times on one (value and gradient, jax 0.11.2):

    - A training step of a linear classifier launches, from 64 classes on, never more kernels than with plain JAX, and
      mostly one to four fewer. With 3 or 10 classes as many, or two more (64 × 3: 9 against 7; a step of eight members
      of Myrtle5-64, 512 × 10 logits each: 125 against 123), as XLA fuses so small a loss with its surroundings. With
      65,536 × 10 float32 logits the kernel is ahead again: XLA reads them twice. Where both take 50 to 80 µs, which is
      what calling them takes, neither is ahead by more than a seventh.
    - Outside `jax.shard_map`, with several devices, the compiler may have to divide the program, and would gather all
      logits on every device for a kernel that it cannot look into. The devices are those of the process that compiles.
    - With fewer rows than multiprocessors, programs of one row each leave some of a GPU idle. XLA splits rows of more
      than 16,384 classes, and reading them twice is the smaller evil: with 262,144 classes the kernel took 1.56 times
      as long for 32 rows, 1.23 for 64, 1.04 for 96, 0.93 for 128; with 131,072 classes 1.09 for 64 and 1.01 for 96.
    """
    if not all(isinstance(size, int) for size in logits.shape) or _before_ampere():
        return False
    num_classes = logits.shape[-1]
    axis_types = logits.sharding.mesh.axis_types
    is_manual = bool(axis_types) and all(kind == jax.sharding.AxisType.Manual for kind in axis_types)
    if jax.device_count() > 1 and not is_manual:
        return False
    if num_classes > 16384 and logits.size // num_classes < 96:
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
