"""One side of a comparison: what it is called, how to call it, and what its compilation cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Contestant:
    """Something to be timed.

    **Fields:**

    - `name`: how the table calls it.
    - `call`: runs it once and returns its result, a PyTree. JAX arrays in the result are waited for; whatever else runs
        asynchronously `call` itself must wait for.
    - `lower_s`: seconds of tracing and lowering. With jaxtyping's checks switched on they are part of it.
    - `compile_s`: seconds of compilation.
    - `temp_bytes`: bytes of temporaries, by the compiler's account.
    - `peak_bytes`: bytes live at the peak, arguments and results included, by the compiler's account.
    - `tolerance`: how far its results may be off, if that is another bound than the comparison's.
    """

    name: str
    call: Callable[[], Any]
    lower_s: float | None = None
    compile_s: float | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Absent:
    """A contestant that cannot take part here, and why; the table says so."""

    name: str
    reason: str


def jitted(
    name: str,
    function: Callable[..., Any],
    *args: Any,
    compiler_options: dict[str, bool | str] | None = None,
) -> Contestant:
    """A contestant that calls the compiled `function(*args)`, which is lowered and compiled here and now."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile(compiler_options=compiler_options)
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    return Contestant(
        name,
        lambda: compiled(*args),
        lower_s=middle - start,
        compile_s=end - middle,
        temp_bytes=getattr(memory, "temp_size_in_bytes", None),
        peak_bytes=getattr(memory, "peak_memory_in_bytes", None),
    )
