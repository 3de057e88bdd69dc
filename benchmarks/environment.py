"""The machine that a run was made on: versions, devices, and the bandwidth that its memory reaches."""

import importlib.metadata
import os
import time

import jax
import jax.numpy as jnp

PACKAGES = ("eqx-dynloss", "jax", "jaxlib", "equinox", "optax", "numpy", "torch", "jaxtyping", "beartype")


def environment() -> dict[str, str | int | None]:
    """Versions of the packages (`None` if not installed), the devices, and the number of CPU cores."""
    device = jax.devices()[0]
    return {
        **{package: _version(package) for package in PACKAGES},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
    }


def copy_gigabytes_per_second(rounds: int = 30) -> float:
    """GB/s of an elementwise pass over a large float32 array, bytes read plus bytes written; the best of the rounds.

    It writes into a buffer that exists: on a CPU, the first touch of fresh memory would take several times as long as
    the copy. A negation, because XLA:CPU spreads it over the cores; `jnp.copy` is one `memcpy` there.
    """
    size = 2**25 if jax.default_backend() == "cpu" else 2**28  # 128 MiB and 1 GiB
    x, y = jnp.ones(size, jnp.float32), jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x, y: -x, donate_argnums=1, keep_unused=True).lower(x, y).compile()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        y = copy(x, y).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(seconds) / 1e9


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
