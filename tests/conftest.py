import os

import jax
import jax.random as jr
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes on one GPU must not each reserve most of its memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def optimisations():
    """Has LLVM optimise little, which halves the time that tests take: most of it is compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
