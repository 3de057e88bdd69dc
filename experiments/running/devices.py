"""The devices and hosts that a command trains on, and the packages that it needs."""

import contextlib
import importlib.util
import os
from pathlib import Path

import jax

from .errors import UsageError, brief
from .terminal import console


def use_all_cores() -> None:
    """One device per CPU core, which is how JAX trains an ensemble fastest there. Respects XLA_FLAGS, if set.

    Does nothing where JAX is already running, as in a notebook: the number of devices is then settled.
    """
    if "XLA_FLAGS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores)


def keep_compiled_programs() -> None:
    """Keeps what JAX compiles on disk, so that the second start of a command compiles nothing.

    In `eqx_dynloss` of the user's cache directory, unless JAX was given another (JAX_COMPILATION_CACHE_DIR).
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eqx_dynloss"
    with contextlib.suppress(OSError, RuntimeError):  # no home, or a read-only one: then without
        cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def start_jax(distributed: bool) -> None:
    """Settles the devices, before JAX is used: all cores of this machine, and with `distributed` those of all hosts.

    Which hosts there are is known from the cluster that the process runs in; where JAX does not recognise it, from the
    environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    require_packages()
    use_all_cores()
    keep_compiled_programs()
    if distributed:
        _find_hosts()
    try:
        jax.devices()
    except Exception as error:  # of many kinds: whatever a plugin of JAX raises that finds no device
        platforms = jax.config.jax_platforms or "of any kind"  # type: ignore[attr-defined]
        raise UsageError(
            f"JAX cannot use platform {platforms} ({brief(error)}): set JAX_PLATFORMS=cpu, or install what it needs."
        ) from error


def require_packages() -> None:
    """Looks for what is needed only when there are results, and imported only then: that takes seconds."""
    missing = [name for name in ("h5netcdf", "h5py", "matplotlib", "scipy") if importlib.util.find_spec(name) is None]
    missing += [] if importlib.util.find_spec("orbax") and importlib.util.find_spec("orbax.checkpoint") else ["orbax"]
    if missing:
        raise UsageError(
            f"the results could not be saved or drawn without {', '.join(missing)}: "
            'pip install "eqx-dynloss[experiments]" has all that the commands need.'
        )


def _find_hosts() -> None:
    number, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number), process_id=None if index is None else int(index)
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--distributed found no cluster ({str(error).splitlines()[0]}): run under a scheduler that JAX knows, or "
            "set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    console.quiet = jax.process_index() > 0  # one host speaks for all


def devices() -> str:
    """The devices that members are spread over, in words."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
