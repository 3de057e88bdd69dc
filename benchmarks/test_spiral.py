"""Training on the paper's spiral: the ensemble against its members one by one, and the loop of the authors' notebook.

In float64, as in the notebook, and in float32. All make the same updates of the same members and return every loss. The
opponents are plain JAX, without this library. The loop is a re-statement of what the public notebook does in every
update: four jitted calls (the step, the plain loss, the accuracy, the weighted loss), and the class weights, which are
not jitted; the results are kept in lists.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_dynloss import ensemble, train
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import MLP
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset
from experiments.problems.spiral import spiral

from .comparison import Compare, Work
from .contestant import Contestant

pytestmark = pytest.mark.usefixtures("quick_compilation")

AMPLITUDE, PERIOD, WIDTH = 70.0, 5000, 100
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_ensemble_and_its_members(compare: Compare, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        data, keys, steps = problem(compare)
        several = [ours("ours", data, keys, steps, jax.devices())] if jax.device_count() > 1 else []
        one = ours("ours, one device" if several else "ours", data, keys, steps, jax.devices()[:1])
        race(compare, dtype, keys, steps, [*several, one, scans(data, keys, steps)])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_authors_loop(compare: Compare, dtype: str):
    """A call of the loop takes seconds: it has a race of its own, with fewer rounds."""
    if compare.full and jax.default_backend() == "gpu":
        pytest.skip("takes minutes there: a hundred thousand calls of programs that are launches and little else")
    with jax.enable_x64(dtype == "float64"):
        data, keys, steps = problem(compare)
        entrants = [ours("ours", data, keys, steps, jax.devices()), authors_loop(data, keys, steps)]
        race(compare, dtype, keys, steps, entrants)


def problem(compare: Compare) -> tuple[Dataset, jax.Array, int]:
    """The data, a key for every member, and the number of updates."""
    members = 344 if jax.default_backend() == "gpu" else 64  # 344 are a phase diagram
    members, steps = (members, 60) if compare.full else (2, 3)
    return spiral(0), jax.random.split(jax.random.key(0), members), steps


def race(compare: Compare, dtype: str, keys: jax.Array, steps: int, entrants: list[Contestant]) -> None:
    compare(
        f"training on the spiral (2-100-3, 300 points, full batch), on {jax.device_count()} device(s)",
        f"{len(keys)} members x {steps} updates, {dtype}",
        entrants,
        tolerance=TOLERANCE[dtype],
        work=Work(len(keys) * steps, "member-updates", "one update of one member"),
        min_rounds=2,
    )


def make_mlp(key):
    return MLP(2, WIDTH, 3, key=key)


def ours(name: str, data: Dataset, keys: jax.Array, steps: int, devices: Sequence[Any]) -> Contestant:
    """All members in one program."""
    schedule = OscillatingWeights(3, np.full(len(keys), AMPLITUDE), PERIOD, inclusive_period=True)
    losses, optimiser = DynamicalLoss(schedule), optax.sgd(1.0)
    start = ensemble.init(make_mlp, optimiser, keys, devices=devices)
    everywhere = ensemble.replicate(data, start)
    copy = eqx.filter_jit(lambda states: jax.tree.map(lambda leaf: leaf.copy() if eqx.is_array(leaf) else leaf, states))

    def call():
        states = copy(start)  # which a chunk of training destroys
        _, metrics, _, _ = ensemble.train_chunk(states, losses, optimiser, everywhere, num_steps=steps)
        return metrics.loss

    return Contestant(name, call)


def scans(data: Dataset, keys: jax.Array, steps: int) -> Contestant:
    """One compiled `lax.scan` over the updates, called for one member after another on one device."""
    onehot = jax.nn.one_hot(data.labels, 3)

    def update(carry, _):
        t, active, parameters = carry
        loss, gradient = jax.value_and_grad(weighted_loss)(parameters, data.inputs, onehot, class_weights(t, active))
        parameters = jax.tree.map(lambda p, g: p - g, parameters, gradient)
        last = t == PERIOD
        return (jnp.where(last, 0, t + 1), jnp.where(last, (active + 1) % 3, active), parameters), loss

    @jax.jit
    def train_one(parameters):
        return jax.lax.scan(update, (jnp.array(0), jnp.array(0), parameters), length=steps)[1]

    starts = starting_points(keys)
    return Contestant("scan per member", lambda: jnp.stack([train_one(parameters) for parameters in starts]))


def authors_loop(data: Dataset, keys: jax.Array, steps: int) -> Contestant:
    """A Python loop over updates, one member after another on one device."""
    onehot = jax.nn.one_hot(data.labels, 3)

    @jax.jit
    def weighted(parameters, t, active):
        return weighted_loss(parameters, data.inputs, onehot, class_weights(t, active))

    @jax.jit
    def plain(parameters):
        return weighted_loss(parameters, data.inputs, onehot, jnp.ones(3))

    @jax.jit
    def accuracy(parameters):
        return jnp.mean(jnp.argmax(log_probabilities(parameters, data.inputs), 1) == jnp.argmax(onehot, 1))

    @jax.jit
    def step(t, parameters, active):
        gradient = jax.grad(weighted)(parameters, t, active)
        return t + 1, jax.tree.map(lambda p, g: p - g, parameters, gradient)

    def train_one(parameters):
        record = {"weighted": [], "plain": [], "accuracy": [], "weights": []}
        t, active = 0, 0
        for _ in range(steps):
            record["plain"] += [plain(parameters)]
            record["accuracy"] += [accuracy(parameters)]
            record["weighted"] += [weighted(parameters, t, active)]
            record["weights"] += [class_weights(t, active)]
            t, parameters = step(t, parameters, active)
            if t > PERIOD:
                t, active = 0, (active + 1) % 3
        return np.array(record["weighted"])

    starts = starting_points(keys)
    return Contestant("authors' loop", lambda: np.array([train_one(parameters) for parameters in starts]))


def starting_points(keys: jax.Array):
    """Every member's first parameters, as the opponents hold them: a matrix and a bias for each layer."""
    models = [train.init(make_mlp, optax.sgd(1.0), key).model for key in keys]
    return [[(layer.weight.T, layer.bias) for layer in model.layers] for model in models]


def log_probabilities(parameters, inputs):
    (w1, b1), (w2, b2) = parameters
    return jax.nn.log_softmax(jax.nn.relu(inputs @ w1 + b1[None]) @ w2 + b2[None])


def weighted_loss(parameters, inputs, onehot, weights):
    return -3 * jnp.mean(log_probabilities(parameters, inputs) * onehot * weights[None])


def class_weights(t, active):
    slope = 2 * (AMPLITUDE - 1) / PERIOD
    peak = jnp.where(t < PERIOD / 2, 1 + slope * t, 2 * AMPLITUDE - 1 - slope * t)
    raw = jnp.ones(3) + (peak - 1) * jnp.eye(3)[active]
    return 3 * raw / jnp.sum(raw)
