"""What training owes on a GPU, compared with the CPU beside it: `pytest -m gpu`.

Products of float32 are rounded to TF32 there, unless more is asked for, as JAX does by default: 11 bits of each factor.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from benchmarks.convolution_forms import ours, plain, with_gradients
from benchmarks.precision import gradient_errors
from eqx_dynloss import ensemble, landscape
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import MLP, Myrtle
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset

from .test_ensemble import to_float

ROOT = Path(__file__).parents[1]
OPTIMISER = optax.sgd(0.02, 0.9, nesterov=True)  # one, so that calls share a compilation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="for NVIDIA GPUs: pytest -m gpu, where there is one"),
]


def train(make_model, data, *, steps, amplitudes=(1.0, 10.0, 30.0, 70.0), platform="gpu", **options):
    """Losses `[members, steps]` of four members."""
    device = jax.devices(platform)[0]
    with jax.default_device(device):
        losses = DynamicalLoss(OscillatingWeights(10, np.array(amplitudes), 5))
        states = ensemble.init(make_model, OPTIMISER, jr.split(jr.key(0), len(amplitudes)), devices=[device])
        data = ensemble.replicate(data, states)
        _, metrics, _, _ = ensemble.train_chunk(states, losses, OPTIMISER, data, num_steps=steps, **options)
    assert isinstance(metrics.loss, jax.Array) and metrics.loss.devices() == {device}
    return np.asarray(metrics.loss)


def images(number, size=16):
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (number, size, size, 3)).astype(np.uint8)
    return Dataset(jnp.asarray(pixels), jnp.asarray(np.arange(number) % 10), to_float)


def make_myrtle(key):
    return Myrtle(16, key=key)


def make_mlp(key):
    return MLP(2, 50, 10, key=key)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), (None, 2e-3)])
@pytest.mark.parametrize("members", [None, 3])
@pytest.mark.parametrize("size, channels", [(32, (3, 64)), (8, (64, 64)), (5, (1, 7))])
def test_convolution_and_both_gradients_are_those_of_float64(size, channels, members, precision, tolerance):
    shape = () if members is None else (members,)
    rng = np.random.RandomState(0)
    x, k, dy = (
        rng.randn(*shape, *rest)
        for rest in [(8, size, size, channels[0]), (3, 3, *channels), (8, size, size, channels[1])]
    )

    def all_three(function, *args):
        form = function if members is None else jax.vmap(function)
        return jax.tree.leaves(jax.jit(with_gradients(form))(*args))

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        expected = all_three(plain, *map(jnp.asarray, (x, k, dy)))
    with jax.default_matmul_precision(precision):
        narrow = (jnp.asarray(a, jnp.float32) for a in (x, k, dy))
        actual = all_three(ours, *narrow)
    for found, theirs in zip(actual, map(np.asarray, expected), strict=True):
        assert found.devices() == {jax.devices("gpu")[0]}
        assert np.abs(np.asarray(found) - theirs).sum() <= tolerance * np.abs(theirs).sum()


@pytest.mark.parametrize(
    "compute_dtype, precision, tolerance", [(None, "float32", 1e-4), (None, None, 5e-3), ("bfloat16", None, 2e-2)]
)
@pytest.mark.parametrize("width, size", [(64, 32), (16, 32), (5, 12)])
def test_every_gradient_of_a_network_is_that_of_float64(width, size, compute_dtype, precision, tolerance):
    errors = gradient_errors(width, size, compute_dtype, precision)
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_a_pixel_that_is_not_a_number_ends_in_nan(compute_dtype):
    model = Myrtle(16, compute_dtype=compute_dtype, key=jr.key(0))
    pixels = jnp.ones((8, 32, 32, 3)).at[1, 3, 3, 0].set(jnp.nan)
    gradient = jax.jit(jax.grad(lambda model: jnp.mean(jax.vmap(model)(pixels) ** 2)))(model)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_bfloat16_trains_as_float32():
    losses = lambda make_model: train(make_model, images(64, 32), steps=40, batch_size=32)
    ours = losses(lambda key: Myrtle(16, compute_dtype="bfloat16", key=key))
    theirs = losses(make_myrtle)
    assert np.allclose(ours, theirs, rtol=5e-2) and not np.array_equal(ours, theirs)


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), (None, 2e-2)])
def test_images_train_as_on_a_cpu(precision, tolerance):
    data = images(64)
    with jax.default_matmul_precision(precision):
        ours = train(make_myrtle, data, steps=20, batch_size=32)
    theirs = train(make_myrtle, data, steps=20, batch_size=32, platform="cpu")
    assert np.allclose(ours, theirs, rtol=tolerance)


@pytest.mark.parametrize("options", [{"block_size": 1}, {"block_size": 4}, {"microbatch_size": 8}], ids=str)
def test_blocks_and_microbatches_change_only_the_rounding(options):
    with jax.default_matmul_precision("float32"):
        ours = train(make_myrtle, images(64), steps=20, batch_size=32, **options)
        theirs = train(make_myrtle, images(64), steps=20, batch_size=32)
    assert np.allclose(ours, theirs, rtol=1e-4)


def test_the_spiral_in_float64_trains_as_on_a_cpu(x64):
    data = Dataset(jnp.asarray(np.random.RandomState(0).randn(300, 2)), jnp.arange(300) % 10)
    ours, theirs = (train(make_mlp, data, steps=200, platform=platform) for platform in ("gpu", "cpu"))
    assert np.allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-2)])
def test_the_largest_eigenvalue_of_the_hessian_is_that_of_a_cpu(dtype, tolerance, x64):
    def largest(device):
        with jax.default_device(device):
            model = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), MLP(2, 20, 10, key=jr.key(0)))
            inputs = jnp.asarray(np.random.RandomState(0).randn(100, 2), dtype)
            loss = DynamicalLoss(OscillatingWeights(10, 10.0, 5))
            objective = lambda model: loss(jax.vmap(model)(inputs), jnp.arange(100) % 10, 2)
            start = jr.key(1)
            return landscape.hessian_spectrum(objective, model, order=10, key=start).eigenvalues[-1]

    ours, theirs = (float(largest(jax.devices(platform)[0])) for platform in ("gpu", "cpu"))
    assert np.isclose(ours, theirs, rtol=tolerance)


def test_the_command_trains_on_it(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")  # as its users have it
    flags = "--dataset digits --preset quick --width 4 --epochs 1 --seeds 2".split()
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "experiments.cifar", *flags, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert jax.devices()[0].device_kind in done.stdout
    assert "±" in (tmp_path / "run" / "digits_summary.md").read_text(encoding="utf-8")
