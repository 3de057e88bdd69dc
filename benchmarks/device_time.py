"""Seconds that a GPU is busy with a call, read from a profile."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax


def device_seconds(call: Callable[[], Any], repeats: int = 10) -> float | None:
    """Seconds that the device works on one `call`, on average, launches and waiting left out.

    **Arguments:**

    - `call`: what to run; already compiled and warm.
    - `repeats`: how often, inside one profile.

    **Returns:** seconds, or `None` where the profile shows no GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(call())
        profiles = [jax.profiler.ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
        busy = sum(busy_seconds(profile.planes) for profile in profiles)
    return busy / repeats or None


def busy_seconds(planes: Iterable[Any]) -> float:
    """Seconds in which at least one stream of a GPU works, added up over GPUs.

    **Arguments:**

    - `planes`: planes of a `jax.profiler.ProfileData`. Those called `/device:GPU:…` hold one line for each stream;
        other lines of theirs repeat the same kernels by module or operation and are left out.
    """
    total = 0.0
    for plane in planes:
        if plane.name.startswith("/device:GPU:"):
            streams = [line for line in plane.lines if line.name.startswith("Stream")]
            total += _covered(
                (event.start_ns, event.start_ns + event.duration_ns) for line in streams for event in line.events
            )
    return total / 1e9


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
