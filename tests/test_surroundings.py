"""The losses where JAX is asked to do things differently: without jit, under checkify, on explicitly sharded meshes."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqx_dynloss_kernels import weighted_xent
from jax.experimental import checkify

from eqx_dynloss.loss import (
    DynamicalLoss,
    softmax_cross_entropy,
    softmax_cross_entropy_with_soft_labels,
    squared_error,
)
from eqx_dynloss.schedule import OscillatingWeights

from .helpers import DERIVATIVES, slow, tree_allclose


def soft(x, y, w, **options):
    return softmax_cross_entropy_with_soft_labels(x, jax.nn.one_hot(y, x.shape[-1], dtype=x.dtype), w, **options)


LOSSES = {
    "integer": softmax_cross_entropy,
    "kernel": lambda *args, **options: weighted_xent(*args, **options)[0],
    "plain": lambda *args: softmax_cross_entropy(*args, implementation="xla"),
    "options": lambda *args: softmax_cross_entropy(*args, label_smoothing=0.1, z_loss=0.01),
    "masked": lambda x, y, w: softmax_cross_entropy(x, y, w, where=y > 0),
    "some classes": lambda x, y, w: softmax_cross_entropy(x, y, w, where=x < 2, label_smoothing=0.1),
    "soft": soft,
    "squared": squared_error,
    "dynamical": lambda x, y, w: DynamicalLoss(OscillatingWeights(x.shape[-1], 5.0, 10), z_loss=0.1)(x, y, 7),
}


def problem(num_classes, shape=(6,)):
    rng = np.random.RandomState(0)
    logits, labels = rng.randn(*shape, num_classes), rng.randint(num_classes, size=shape)
    logits[np.arange(6), labels] = 1.0
    tangents = rng.randn(*shape, num_classes), rng.randn(num_classes)
    arrays = logits, rng.uniform(0.1, 2, num_classes), *tangents
    return jnp.asarray(labels), *(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize("num_classes", [slow(3), 100])  # above 64 the gradient takes another way on a CPU
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("derivative", ["jvp of value and grad", "vmap, weights per member"])
def test_without_jit_everything_is_the_same(name, num_classes, derivative):
    y, *args = problem(num_classes)
    total = lambda x, w: jnp.sum(LOSSES[name](x, y, w))
    expected = jax.jit(lambda *args: DERIVATIVES[derivative](total, *args))(*args)
    with jax.disable_jit():
        assert tree_allclose(DERIVATIVES[derivative](total, *args), expected)
        assert tree_allclose(total(*args[:2]), jax.jit(total)(*args[:2]))


CHECKS = {"index": checkify.index_checks, "all": checkify.all_checks | checkify.user_checks}


@pytest.mark.parametrize("num_classes", [slow(3), 100])
@pytest.mark.parametrize("checks", [slow("index"), "all"])
@pytest.mark.parametrize("name", ["integer", "plain", "options", "some classes", "soft"])
def test_checkify_finds_nothing_wrong_and_changes_nothing(name, checks, num_classes):
    y, *args = problem(num_classes)
    total = lambda x, w: jnp.sum(LOSSES[name](x, y, w))

    def everything(*args):
        return [DERIVATIVES[each](total, *args) for each in ("grad", "vmap of jvp of grad")]

    checked = checkify.checkify(everything, errors=CHECKS[checks])
    error, actual = jax.jit(checked)(*args)
    error.throw()
    assert tree_allclose(actual, jax.jit(everything)(*args))


def test_checkify_finds_a_nan_that_there_is():
    y, x, w, *_ = problem(100)
    total = lambda x: jnp.sum(softmax_cross_entropy(x, y, w))
    error, _ = checkify.checkify(jax.grad(total), errors=checkify.nan_checks)(x.at[2].set(jnp.nan))
    with pytest.raises(checkify.JaxRuntimeError, match="nan generated"):
        error.throw()


MAPPED = """
import json, sys
sys.path[:0] = [".", "kernels"]
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from tests.helpers import DERIVATIVES
from tests.test_surroundings import LOSSES, problem

mesh, wrong, cases = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), [], 0
for num_classes, names in [(70, [name for name in LOSSES if name != "dynamical"]), (10, ["options", "squared"])]:
    y, *args = problem(num_classes)
    for name in names:
        parts = jax.shard_map(LOSSES[name], mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data"))
        totals = [lambda x, w, f=f: jnp.sum(jnp.sin(f(x, y, w))) for f in (parts, LOSSES[name])]
        both = [jax.jit(lambda *args, f=f: DERIVATIVES["jvp of value and grad"](f, *args))(*args) for f in totals]
        pairs = zip(*map(jax.tree.leaves, both), strict=True)
        wrong += [(name, num_classes) for a, b in pairs if not np.allclose(a, b, rtol=1e-4, atol=1e-5)]
        cases += 1
print(json.dumps({"wrong": wrong, "cases": cases}))
"""


def test_derivatives_inside_shard_map_are_those_outside():
    """On two devices: on one, a sum over devices that should not be there changes nothing."""
    code = [sys.executable, "-W", "ignore", "-c", MAPPED]
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(code, env=os.environ | quick, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {"wrong": [], "cases": 10}


SHARDED = """
import json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from eqx_dynloss_kernels import weighted_xent
from eqx_dynloss.loss import softmax_cross_entropy, softmax_cross_entropy_with_soft_labels, squared_error

rng = np.random.RandomState(0)
N, C = 32, 88
x, q, w = (a.astype(np.float32) for a in (rng.randn(N, C), rng.dirichlet(np.ones(C), N), rng.uniform(0.1, 2, C)))
y = np.argmax(x, -1)
options = {"label_smoothing": 0.1, "z_loss": 0.1}
soft = softmax_cross_entropy_with_soft_labels
LOSSES = {
    "integer": softmax_cross_entropy,
    "without weights": lambda x, y, w: softmax_cross_entropy(x, y),
    "kernel": lambda x, y, w: weighted_xent(x, y, w)[0],
    "options": lambda x, y, w: softmax_cross_entropy(x, y, w, **options),
    "masked": lambda x, y, w: softmax_cross_entropy(x, y, w, where=y > 3, **options),
    "some classes": lambda x, y, w: softmax_cross_entropy(x, y, w, where=x > 0, **options),
    "soft": lambda x, y, w: soft(x, q_like(x), w),
    "soft, some classes": lambda x, y, w: soft(x, q_like(x), w, where=x > 0, **options),
    "squared": squared_error,
    "squared by unit": lambda x, y, w: squared_error(x, y, w, weighting="unit"),
}
q_like = lambda x: jax.nn.softmax(jnp.sin(x), -1)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
wrong = []
for name, function in LOSSES.items():
    total = lambda x, y, w: jnp.mean(function(x, y, w))
    kinds = {"value": function, "in logits": jax.grad(total), "in weights": jax.grad(total, 2)}
    for kind, derivative in kinds.items():
        expected = np.asarray(jax.jit(derivative)(x, y, w))
        for batch, weights in [(None, "model"), ("data", None)]:
            place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
            args = place(x, batch, "model"), place(y, batch), place(w, weights)
            with jax.set_mesh(mesh):
                compiled = jax.jit(derivative).lower(*args).compile()
                actual = np.asarray(compiled(*args))
            gathered = [l for l in compiled.as_text().splitlines() if re.search(rf"= \\S*,{C}\\]\\S* all-gather", l)]
            if gathered or not np.allclose(actual, expected, atol=1e-6):
                wrong.append([name, kind, batch, weights, gathered[:1], float(np.abs(actual - expected).max())])
print(json.dumps({"wrong": wrong, "cases": len(LOSSES)}))
"""


@pytest.mark.slow
def test_logits_divided_by_class_on_an_explicit_mesh_stay_where_they_are():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    paths = {"PYTHONPATH": os.pathsep.join(["kernels", "."])}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED], env=os.environ | flags | paths, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["cases"] == 10 and result["wrong"] == []
