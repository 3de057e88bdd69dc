import os
import shutil
import tempfile

import jax
import jax.random as jr
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes on one GPU must not each reserve most of its memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# What one test has compiled, the others need not compile again: neither in another worker nor in another process.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made = None if _CACHE in os.environ else tempfile.mkdtemp(prefix="eqx_dynloss")
if _made:
    os.environ |= {_CACHE: _made, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    jax.config.update("jax_compilation_cache_dir", _made)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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


def pytest_unconfigure():
    if _made:
        shutil.rmtree(_made, ignore_errors=True)
