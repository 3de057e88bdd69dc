import subprocess
import sys

import equinox as eqx
import jax
import jax.monitoring
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqx_dynloss import ensemble, train
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import MLP, Myrtle
from eqx_dynloss.schedule import OscillatingWeights, StaticWeights

from .helpers import slow, tree_allclose

AMPLITUDES = np.array([1.0, 3.0, 10.0, 30.0, 70.0])
PERIODS = np.array([4.0, 5.0, 6.0, 7.0, 3.0])
RATES = jnp.array([0.1, 0.05, 0.2, 0.01, 0.1])
OPTIMISER = optax.inject_hyperparams(lambda learning_rate: optax.sgd(learning_rate, 0.9, nesterov=True))(0.1)


def losses():
    return DynamicalLoss(OscillatingWeights(3, AMPLITUDES, PERIODS, stop=15))


def make_mlp(key):
    return MLP(2, 16, 3, key=key)


def make_myrtle(key):
    return Myrtle(4, num_classes=3, key=key)


def dataset(make_model, key):
    labels = jnp.arange(24) % 3
    if make_model is make_mlp:
        return train.Dataset(jr.normal(key, (24, 2)) + jnp.stack([labels, -labels], 1).astype(float), labels)
    return train.Dataset(jr.randint(key, (24, 8, 8, 3), 0, 256).astype(jnp.uint8), labels, to_float)


def to_float(images):
    return images.astype(jnp.float32) / 128 - 1


def run(make_model, keys, data, *, block_size=None, chunks=(20,), rates=RATES, loss=None, **kwargs):
    states = ensemble.init(make_model, OPTIMISER, keys, {"learning_rate": rates})
    data = ensemble.replicate(data, states)
    parts = []
    for n in chunks:
        states, metrics, _, _ = ensemble.train_chunk(
            states, loss or losses(), OPTIMISER, data, num_steps=n, block_size=block_size, **kwargs
        )
        parts.append(metrics)
    return states, jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), *parts)


def member(tree, i):
    return jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, tree)


@pytest.mark.parametrize(
    "make_model, block_size",
    [(make_mlp, 5), (make_myrtle, 2), *(slow(model, n) for model, n in [(make_mlp, 2), (make_myrtle, 5)])]
    + [slow(make_mlp, 1), slow(make_myrtle, 1)],
)
def test_a_member_equals_that_member_trained_alone(make_model, block_size, getkey):
    keys, data = jr.split(getkey(), 5), dataset(make_model, getkey())
    states, metrics = run(make_model, keys, data, block_size=block_size, batch_size=7)
    init, chunk = eqx.filter_jit(train.init), eqx.filter_jit(train.train_chunk)
    for i in range(5):
        loss = DynamicalLoss(OscillatingWeights(3, AMPLITUDES[i], PERIODS[i], stop=15))
        alone = init(make_model, OPTIMISER, keys[i], {"learning_rate": RATES[i]})
        alone, expected, _ = chunk(alone, loss, OPTIMISER, data, num_steps=20, batch_size=7)
        assert tree_allclose(member(metrics, i), expected, rtol=1e-4, atol=1e-5)
        assert tree_allclose(member(states.model, i), alone.model, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_model", [slow(make_mlp), make_myrtle])
def test_with_blocks_of_one_a_member_is_bitwise_that_of_an_ensemble_of_one(make_model, getkey):
    keys, data = jr.split(getkey(), 5), dataset(make_model, getkey())
    states, metrics = run(make_model, keys, data, block_size=1, batch_size=7)
    for i in (0, 3):
        loss = DynamicalLoss(OscillatingWeights(3, AMPLITUDES[i : i + 1], PERIODS[i : i + 1], stop=15))
        one = slice(i, i + 1)
        alone, expected = run(make_model, keys[one], data, block_size=1, batch_size=7, rates=RATES[one], loss=loss)
        assert tree_allclose(member(metrics, one), expected, rtol=0, atol=0)
        assert tree_allclose(member(states.model, one), alone.model, rtol=0, atol=0)


def test_members_differ_in_seed_schedule_and_optimiser(getkey):
    data = dataset(make_mlp, getkey())
    same = jr.wrap_key_data(jnp.tile(jr.key_data(getkey()), (5, 1)))
    states, metrics = run(make_mlp, same, data)
    assert np.ptp(metrics.loss[:, 0]) < 1e-6  # the same parameters at the first step, where all weights are 1
    assert len(np.unique(metrics.loss[:, -1])) == 5
    assert tree_allclose(states.opt_state.hyperparams["learning_rate"], RATES)
    _, others = run(make_mlp, jr.split(getkey(), 5), data)
    assert len(np.unique(others.loss[:, 0])) == 5


def test_only_the_first_chunk_of_a_run_compiles_anything(getkey):
    keys, data = jr.split(getkey(), 5), dataset(make_mlp, getkey())
    states = ensemble.init(make_mlp, OPTIMISER, keys)
    data = ensemble.replicate(data, states)
    durations = []
    try:
        for i in range(4):
            states, metrics, _, evaluated = ensemble.train_chunk(
                states,
                losses(),
                OPTIMISER,
                data,
                num_steps=3,
                batch_size=7,
                evaluations={"train": (data, i % 2 == 1)},
            )
            jax.block_until_ready(metrics)
            if i == 0:  # what is compiled from here on is counted
                jax.monitoring.register_event_duration_secs_listener(
                    lambda event, duration_secs, **_: durations.append(event) if "backend_compile" in event else None
                )
            assert np.isnan(np.asarray(evaluated["train"].loss)).all() == (i % 2 == 0)
        assert not durations
        ensemble.train_chunk(states, losses(), OPTIMISER, data, num_steps=4)
        assert durations  # the counter counts
    finally:
        jax.monitoring.clear_event_listeners()


class Distance(eqx.Module):
    """Observes how far the outputs for some points are from 0, and the class weight of class 0."""

    points: jax.Array

    def __call__(self, state, loss, data):
        return jnp.sum(jax.vmap(state.model)(self.points) ** 2), loss.schedule(state.step)[0], len(data)


@pytest.mark.parametrize("block_size", [slow(1), 2])
def test_observations_are_those_of_every_member(block_size, getkey):
    keys, data, observe = jr.split(getkey(), 5), dataset(make_mlp, getkey()), Distance(jr.normal(getkey(), (4, 2)))
    states = ensemble.init(make_mlp, OPTIMISER, keys)
    first = [observe(member(states, i), member(losses(), i), data)[0] for i in range(5)]
    states, _, (distance, weight, size), _ = ensemble.train_chunk(
        states, losses(), OPTIMISER, data, num_steps=6, observe=observe, observe_every=2, block_size=block_size
    )
    assert distance.shape == weight.shape == (5, 3) and np.all(np.asarray(size) == 24)
    assert tree_allclose(distance[:, 0], jnp.stack(first))
    of_class_0 = lambda loss: jax.vmap(loss.schedule)(jnp.arange(0, 6, 2))[:, 0]
    assert tree_allclose(weight, jax.vmap(of_class_0)(losses()))


@pytest.mark.parametrize("make_model", [make_mlp, slow(make_myrtle)])
def test_evaluations_are_those_of_every_member(make_model, getkey):
    keys, data, other = jr.split(getkey(), 5), dataset(make_model, getkey()), dataset(make_model, getkey())
    states = ensemble.init(make_model, OPTIMISER, keys)
    states, _, _, evaluated = ensemble.train_chunk(
        states, losses(), OPTIMISER, data, num_steps=3, evaluations={"train": (data, True), "other": (other, True)}
    )
    for name, evaluation in (("train", data), ("other", other)):
        for i in range(5):
            expected = train.evaluate(member(states.model, i), evaluation)
            assert tree_allclose(member(evaluated[name], i), expected)


@pytest.mark.parametrize(
    "make_model, example, platform, expected",
    [
        (make_myrtle, (32, 32, 3), "cpu", 2),
        (make_myrtle, (8, 8, 1), "cpu", 128),
        (make_myrtle, (1, 1, 1), "cpu", 256),
        (make_myrtle, (512, 512, 3), "cpu", 1),
        (make_mlp, (3072,), "cpu", 256),  # alone, an example would read every weight for itself
        (make_myrtle, (32, 32, 3), "gpu", 256),
    ],
)
def test_only_large_images_under_convolutions_are_evaluated_few_at_a_time_on_a_cpu(
    make_model, example, platform, expected, getkey
):
    assert ensemble._evaluated_at_once(make_model(getkey()), example, platform) == expected


def test_a_member_that_diverges_is_frozen_flagged_and_disturbs_nobody(getkey):
    keys, data = jr.split(getkey(), 5), dataset(make_mlp, getkey())
    states, metrics = run(make_mlp, keys, data, rates=RATES.at[2].set(1e30), block_size=5)
    assert states.diverged.tolist() == [False, False, True, False, False]
    at = int(states.step[2])
    assert at < 20 and states.step.tolist() == [20, 20, at, 20, 20]
    assert jnp.all(jnp.isnan(metrics.loss[2, at + 1 :])) and jnp.all(jnp.isfinite(metrics.loss[2, :at]))
    leaves = jax.tree.leaves(eqx.filter(states.model, eqx.is_array))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in leaves)
    healthy, expected = run(make_mlp, keys, data, block_size=5)
    others = np.array([0, 1, 3, 4])
    assert tree_allclose(member(metrics, others), member(expected, others), rtol=0, atol=0)


def test_chunks_of_an_ensemble_are_one_run(getkey):
    keys, data = jr.split(getkey(), 5), dataset(make_mlp, getkey())
    one, expected = run(make_mlp, keys, data, batch_size=7)
    cut, metrics = run(make_mlp, keys, data, batch_size=7, chunks=(5, 5, 5, 5))
    assert tree_allclose(metrics, expected)
    assert tree_allclose(cut.model, one.model)


def test_the_old_states_are_donated(getkey):
    keys, data = jr.split(getkey(), 5), dataset(make_mlp, getkey())
    states = ensemble.init(make_mlp, OPTIMISER, keys)
    ensemble.train_chunk(states, losses(), OPTIMISER, data, num_steps=2)
    assert states.model.layers[0].weight.is_deleted()
    assert not data.inputs.is_deleted()


def test_block_size_depends_on_model_and_platform(getkey):
    keys = jr.split(getkey(), 2)
    mlp, myrtle = (ensemble.init(make_model, OPTIMISER, keys).model for make_model in (make_mlp, make_myrtle))
    assert [ensemble.default_block_size(mlp, platform) for platform in ("cpu", "gpu")] == [1, 2**31]
    assert [ensemble.default_block_size(myrtle, platform) for platform in ("cpu", "gpu")] == [1, 1]
    wide = ensemble.init(lambda key: MLP(2, 1000, 3, key=key), OPTIMISER, keys).model
    assert [ensemble.default_block_size(wide, platform) for platform in ("cpu", "gpu")] == [1, 2**31]


def test_losses_without_a_member_axis_are_an_error(getkey):
    states = ensemble.init(make_mlp, OPTIMISER, jr.split(getkey(), 5))
    data = dataset(make_mlp, getkey())
    with pytest.raises(ValueError, match="leading axis of 5 members"):
        ensemble.train_chunk(states, DynamicalLoss(OscillatingWeights(3, 2.0, 5.0)), OPTIMISER, data, num_steps=2)


@pytest.mark.parametrize("value", [jnp.ones(4), jnp.ones(()), jnp.ones((5, 1))])
def test_hyperparameters_without_one_value_per_member_are_an_error(value, getkey):
    with pytest.raises(ValueError, match="learning_rate must hold one value for each of the 5 members"):
        ensemble.init(make_mlp, OPTIMISER, jr.split(getkey(), 5), {"learning_rate": value})


def test_a_block_size_below_one_is_an_error(getkey):
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        run(make_mlp, jr.split(getkey(), 5), dataset(make_mlp, getkey()), block_size=0)


SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, jax.random as jr, numpy as np, optax
from eqx_dynloss import ensemble, train
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights
optimiser = optax.sgd(0.05)
losses = DynamicalLoss(OscillatingWeights(3, np.linspace(1, 9, 6), np.full(6, 5.0)))
data = train.Dataset(jr.normal(jr.key(1), (24, 8, 8, 3)), jnp.arange(24) % 3)
make_model = lambda key: Myrtle(4, num_classes=3, key=key)

options = {"num_steps": 5, "batch_size": 8}

def trained_on(devices):
    states = ensemble.init(make_model, optimiser, jr.split(jr.key(0), 6), devices=devices)
    copies = ensemble.replicate(data, states)
    chunk = ensemble._Chunk.of(states, losses, optimiser, copies, {"train": (copies, True)}, None, options)
    program = ensemble._run_chunk.lower(chunk, states).compile()
    words = ["all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"]
    text = program.compiled.as_text()
    assert "fusion" in text and not [word for word in words if word in text]  # nothing is communicated
    states, metrics, _, evaluated = program(chunk, states)
    return len(states.step.sharding.device_set), metrics.loss, evaluated["train"].loss

one, four = trained_on(jax.devices()[:1]), trained_on(None)
assert (one[0], four[0]) == (1, 3)  # of four devices three divide six members
for single, spread in zip(one[1:], four[1:], strict=True):  # XLA may split a sum over several threads
    np.testing.assert_allclose(spread, single, rtol=1e-5)
print(one[1].shape, one[2].shape)
"""


def test_members_spread_over_devices_equal_those_of_one_device():
    ended = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout == "(6, 5) (6,)\n", ended.stderr


def test_states_survive_the_way_to_the_host_and_back(getkey):
    keys, data = jr.split(getkey(), 5), dataset(make_mlp, getkey())
    states, _ = run(make_mlp, keys, data)
    values = ensemble.gather(states)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(values))
    again = ensemble.scatter(values, ensemble.init(make_mlp, OPTIMISER, jr.split(getkey(), 5)))
    assert tree_allclose(ensemble.gather(again), values, rtol=0, atol=0)
    assert jnp.all(jr.key_data(again.key) == jr.key_data(states.key))


def test_states_of_another_ensemble_are_refused(getkey):
    four, six = (ensemble.init(make_mlp, OPTIMISER, jr.split(getkey(), n)) for n in (4, 6))
    with pytest.raises(ValueError, match="do not fit into states"):
        ensemble.scatter(ensemble.gather(four), six)


def test_weights_that_all_members_share_are_refused_also_as_many_as_there_are_classes(getkey):
    data, shared = dataset(make_mlp, getkey()), DynamicalLoss(StaticWeights(jnp.array([1.0, 2.0, 3.0])))
    states = ensemble.init(make_mlp, OPTIMISER, jr.split(getkey(), 3))
    with pytest.raises(ValueError, match="one row of weights"):
        ensemble.train_chunk(states, shared, OPTIMISER, ensemble.replicate(data, states), num_steps=1)


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_a_function_of_every_member_is_that_of_the_member(block_size, getkey):
    keys, data, observe = jr.split(getkey(), 5), dataset(make_mlp, getkey()), Distance(jr.normal(getkey(), (4, 2)))
    states = ensemble.init(make_mlp, OPTIMISER, keys)
    found = ensemble.observe(states, losses(), data, observe, block_size=block_size)
    for i in range(5):
        assert tree_allclose(member(found[:2], i), observe(member(states, i), member(losses(), i), data)[:2])
