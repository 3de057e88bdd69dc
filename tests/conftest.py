import os
from pathlib import Path

import jax
import jax.random as jr
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes on one GPU must not each reserve most of its memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Tests run on the CPU, also where there is a GPU, which would round products of float32; `-m gpu` on the GPU."""
    if "gpu" not in config.option.markexpr and "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"  # for processes that tests start
        jax.config.update("jax_platforms", "cpu")


@pytest.fixture(autouse=True, scope="session")
def compiled_programs(tmp_path_factory):
    """Lets all processes of pytest-xdist share what they compile: many tests compile the same programs."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True, scope="module")
def optimisations():
    """Has LLVM optimise little, which halves the time that tests take: most of it is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="package")
def processes(tmp_path_factory):
    """Processes that tests start compile as quickly, and keep their programs out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(autouse=True, scope="module")
def memory_maps():
    """Drops a module's programs: each takes a few memory maps, of which a process on Linux usually has 65,530. Without
    any left, LLVM says "Cannot allocate memory", and the process ends in a segmentation fault."""
    yield
    jax.clear_caches()
    maps = Path("/proc/self/maps")
    assert not maps.exists() or len(maps.read_bytes().splitlines()) < 30_000, "programs stay in memory"


@pytest.fixture
def getkey():
    """Returns a function that gives a new PRNG key at every call, the same sequence in every run."""
    keys = iter(jr.split(jr.key(0), 256))
    return lambda: next(keys)


@pytest.fixture
def x64():
    """Runs a test in float64 and leaves the others alone."""
    with jax.enable_x64(True):
        yield
