import functools as ft

import jax
import pytest
from eqx_dynloss_kernels import operation, primitives
from jax.experimental import pallas as pl


@pytest.fixture(scope="module")
def fully_optimised(optimisations):
    """Compiles as users do, for modules that look at what is compiled, or time it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the Pallas kernel run on a CPU, step by step: right or wrong, and very slow. Keep to some 64 rows."""
    monkeypatch.setattr(pl, "pallas_call", ft.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(operation, "_refused", operation._fused)
    primitives.compiled.cache_clear()
    yield
    primitives.compiled.cache_clear()
