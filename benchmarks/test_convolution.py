"""A layer's convolutions of several members, in every form that `eqx_dynloss.convolution` could have: time on a GPU.

What the compiler makes of them for a GPU that is not there: `test_compiled_gpu.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .comparison import Compare, Work
from .contestant import jitted
from .convolution_forms import FORMS, with_gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")

SUBJECT = "3x3 convolutions of several members and their two gradients, float32"
CASES = [(8, 512, 32, 64), (8, 512, 8, 64), (8, 64, 32, 16)]
TF32 = 2e-3  # NVIDIA's matrix units round float32 factors to 11 bits


def test_the_forms_are_the_same_function(compare: Compare):
    if compare.full:
        pytest.skip("timed ones are compared as well")
    race(compare, 2, 3, 8, 4)


@pytest.mark.parametrize("members, batch, size, channels", CASES)
def test_forms(compare: Compare, members: int, batch: int, size: int, channels: int):
    if not compare.full or jax.default_backend() == "cpu":
        pytest.skip("a size for a GPU; on a CPU some forms take a minute, and test_cifar.py compares whole updates")
    race(compare, members, batch, size, channels)


def race(compare: Compare, members: int, batch: int, size: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, members, batch, size, size, channels), np.float32)
    kernels = rng.standard_normal((members, 3, 3, channels, channels), np.float32)
    args = [jnp.asarray(array) for array in (images[0], kernels, images[1])]
    compare(
        SUBJECT,
        f"{members} members, {batch} x {size} x {size} x {channels}",
        [jitted(name, with_gradients(form), *args) for name, form in FORMS.items()],
        view=lambda result: (result[0][:, :2], result[1][0][:, :2], result[1][1]),  # two images of each member
        tolerance=1e-5 if jax.default_backend() == "cpu" else TF32,
        work=Work(6 * 9 * members * batch * size**2 * channels**2 / 1e12, "TFLOP", "products and sums, zeros included"),
        budget_s=2.0,
    )
