"""What a GPU does in a call, read from a profile: how long it is busy, and with which kernels."""

import collections
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Profile(NamedTuple):
    """**Fields:**

    - `busy_seconds`: time in which at least one stream of a GPU works, launches and waiting left out; of all GPUs.
    - `kernel_seconds`: time of each kernel by its name, the longest first. Those of several streams may overlap.
    """

    busy_seconds: float
    kernel_seconds: dict[str, float]


def profile(call: Callable[[], Any], repeats: int = 10) -> Profile | None:
    """What the device does in one `call`, on average; `None` where the profile shows no GPU.

    **Arguments:**

    - `call`: what to run; already compiled and warm.
    - `repeats`: how often, inside one profile.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call in Python would be traced, at many times what it takes
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(repeats):
                jax.block_until_ready(call())
        profiles = [jax.profiler.ProfileData.from_file(str(path)) for path in Path(folder).rglob("*.xplane.pb")]
        whole = summed(plane for one in profiles for plane in one.planes)
    kernels = {name: seconds / repeats for name, seconds in whole.kernel_seconds.items()}
    return Profile(whole.busy_seconds / repeats, kernels) if kernels else None


def summed(planes: Iterable[Any]) -> Profile:
    """Of all calls in some planes of a `jax.profiler.ProfileData`.

    Those called `/device:GPU:…` hold one line for each stream; other lines of theirs repeat the same kernels by module
    or operation and are left out.
    """
    busy, kernels = 0.0, collections.Counter()
    for plane in planes:
        if plane.name.startswith("/device:GPU:"):
            events = [event for line in plane.lines if line.name.startswith("Stream") for event in line.events]
            busy += _covered((event.start_ns, event.start_ns + event.duration_ns) for event in events)
            for event in events:
                kernels[event.name] += event.duration_ns
    return Profile(busy / 1e9, {name: duration / 1e9 for name, duration in kernels.most_common()})


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
