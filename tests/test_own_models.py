"""Models and optimisers of one's own: dropout, layers with a state, searches along a line, and NumPy data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqx_dynloss import ensemble, landscape, train
from eqx_dynloss.data import example_keys
from eqx_dynloss.loss import DynamicalLoss, softmax_cross_entropy
from eqx_dynloss.schedule import OscillatingWeights

from .helpers import slow, tree_allclose
from .test_train import LOSS, OPTIMISER, blobs, make_mlp


class Dropping(eqx.Module):
    """As Equinox's models are written: the key is an argument of the call."""

    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key)
        self.first, self.last = eqx.nn.Linear(2, 16, key=keys[0]), eqx.nn.Linear(16, 3, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.4)

    def __call__(self, x, *, key=None):
        return self.last(self.dropout(jax.nn.relu(self.first(x)), key=key))


class Demanding(eqx.Module):
    inner: Dropping

    def __init__(self, key):
        self.inner = Dropping(key)

    def __call__(self, x, key):
        return self.inner(x, key=key)


def sequential(key):
    return eqx.nn.Sequential([eqx.nn.Linear(2, 8, key=key), eqx.nn.Dropout(0.4), eqx.nn.Linear(8, 3, key=key)])


MODELS = {"optional key": Dropping, "key": Demanding, "Sequential": sequential}


@pytest.mark.parametrize("name", ["optional key", slow("key"), "Sequential"])
def test_a_model_with_dropout_trains_with_other_keys_in_every_update_and_for_every_example(name, getkey):
    data, state = blobs(getkey()), train.init(MODELS[name], OPTIMISER, getkey())
    step = eqx.filter_jit(train.train_step)
    seen = []
    for number in range(4):
        keys = example_keys(state.key, state.step, 30)
        seen.append(jr.key_data(keys))
        weights = LOSS.schedule(number)

        def objective(model, weights=weights, keys=keys):
            logits = jax.vmap(lambda x, key: model(x, key=key))(data.inputs, keys)
            return jnp.mean(weights[data.labels] * optax.softmax_cross_entropy_with_integer_labels(logits, data.labels))

        value, grads = eqx.filter_value_and_grad(objective)(state.model)
        updates, _ = OPTIMISER.update(grads, state.opt_state)
        expected = eqx.apply_updates(state.model, updates)
        state, metrics = step(state, LOSS, OPTIMISER, data.inputs, data.labels)
        assert tree_allclose(metrics.loss, value)
        arrays = lambda model: eqx.filter(model, eqx.is_array)
        assert tree_allclose(arrays(state.model), arrays(expected))
    orders = [jr.key_data(jr.fold_in(state.key, epoch)) for epoch in range(1000)]
    assert len({tuple(key) for key in np.concatenate([*seen, orders]).tolist()}) == 4 * 30 + 1000


@pytest.mark.parametrize("size", [1, 5, 30])
def test_microbatches_of_a_model_with_dropout_give_the_same_update(size, getkey):
    data, state = blobs(getkey()), train.init(Dropping, OPTIMISER, getkey())
    step = eqx.filter_jit(train.train_step)
    whole, parts = (step(state, LOSS, OPTIMISER, data.inputs, data.labels, microbatch_size=n) for n in (None, size))
    assert tree_allclose(*(jax.tree.leaves(eqx.filter(result, eqx.is_inexact_array)) for result in (whole, parts)))


def test_neither_chunks_nor_blocks_nor_a_resumption_change_a_run_with_dropout(getkey):
    chunks = (5, 4, 3)
    data, keys = blobs(getkey()), jr.split(getkey(), 3)
    losses = DynamicalLoss(OscillatingWeights(3, jnp.array([1.0, 5.0, 9.0]), 4.0))

    def run(chunks, block_size, resume=False):
        states = ensemble.init(Dropping, OPTIMISER, keys)
        there = ensemble.replicate(data, states)
        for num_steps in chunks:
            states, *_ = ensemble.train_chunk(
                states, losses, OPTIMISER, there, num_steps=num_steps, batch_size=7, block_size=block_size
            )
            if resume:
                states = ensemble.scatter(ensemble.gather(states), ensemble.init(Dropping, OPTIMISER, keys))
        return jax.tree.leaves(ensemble.gather(states.model))

    expected = run((12,), 1)
    assert all(map(np.array_equal, run(chunks, 1, resume=True), expected))
    assert tree_allclose(run((12,), 3), expected)
    for i, key in enumerate(keys[:1]):
        alone = train.init(Dropping, OPTIMISER, key)
        loss = jax.tree.map(lambda leaf, i=i: leaf[i], losses)
        alone, *_ = eqx.filter_jit(train.train_chunk)(alone, loss, OPTIMISER, data, num_steps=12, batch_size=7)
        assert tree_allclose(jax.tree.leaves(eqx.filter(alone.model, eqx.is_array)), [leaf[i] for leaf in expected])


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_without_dropout(name, getkey):
    data, model = blobs(getkey()), MODELS[name](getkey())
    logits = jax.vmap(lambda x: eqx.nn.inference_mode(model)(x, key=None))(data.inputs)
    metrics = eqx.filter_jit(train.evaluate)(model, data)
    assert tree_allclose(metrics.loss, jnp.mean(softmax_cross_entropy(logits, data.labels)))
    states = ensemble.init(MODELS[name], OPTIMISER, jr.split(getkey(), 2))
    losses, there = DynamicalLoss(OscillatingWeights(3, jnp.ones(2), 4.0)), ensemble.replicate(data, states)
    *_, evaluated = ensemble.train_chunk(
        states, losses, OPTIMISER, there, num_steps=2, evaluations={"train": (there, True)}
    )
    assert np.all(np.isfinite(evaluated["train"].loss))


def test_the_curvature_of_a_model_with_dropout_is_that_of_its_inference(getkey):
    data, states = blobs(getkey()), ensemble.init(Dropping, OPTIMISER, jr.split(getkey(), 2))

    def largest(state, loss, data):
        def objective(model):
            return loss(jax.vmap(eqx.nn.inference_mode(model))(data.inputs), data.labels, state.step)

        return landscape.hessian_spectrum(objective, state.model, order=10, key=jr.key(0)).eigenvalues[-1]

    losses = DynamicalLoss(OscillatingWeights(3, jnp.ones(2), 4.0))
    found = ensemble.observe(states, losses, ensemble.replicate(data, states), largest)
    assert found.shape == (2,) and np.all(np.isfinite(found)) and np.all(found > 0)


def test_models_without_a_key_are_trained_without_one(getkey):
    data, state = blobs(getkey()), train.init(make_mlp, OPTIMISER, getkey())
    arrays, static = eqx.partition(state, eqx.is_array)

    def step(arrays):
        return eqx.filter(train.train_step(eqx.combine(arrays, static), LOSS, OPTIMISER, *batch)[0], eqx.is_array)

    batch = data.inputs, data.labels
    assert "random" not in str(jax.make_jaxpr(step)(arrays)) and "threefry" not in str(jax.make_jaxpr(step)(arrays))


class Normalised(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.linear = eqx.nn.Linear(2, 3, key=key)
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, x, state):
        return self.norm(self.linear(x), state)


@pytest.mark.parametrize("make", [Normalised, lambda key: eqx.nn.make_with_state(Normalised)(key)])
def test_layers_with_a_state_are_refused_before_anything_is_trained(make, getkey):
    sentence = "layers with a state, such as BatchNorm, .* use layers without one, such as eqx.nn.GroupNorm"
    with pytest.raises(ValueError, match=sentence):
        train.init(make, OPTIMISER, getkey())
    with pytest.raises(ValueError, match=sentence):
        ensemble.init(make, OPTIMISER, jr.split(getkey(), 2))


SEARCHES = {
    "lbfgs": lambda: optax.lbfgs(),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(15)),
}


@pytest.fixture
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.lbfgs mixes integers of 32 and 64 bits
        yield


@pytest.mark.parametrize("name", [name if name == "lbfgs" else slow(name) for name in SEARCHES])
@pytest.mark.usefixtures("x64", "usual_promotion")
def test_optimisers_that_search_along_a_line_do_as_in_a_loop_of_their_own(name):
    data, keys, optimiser = blobs(jr.key(0)), jr.split(jr.key(1), 2), SEARCHES[name]()
    amplitudes = jnp.array([1.0, 5.0])
    losses = DynamicalLoss(OscillatingWeights(3, amplitudes, 4.0))
    states = ensemble.init(make_mlp, optimiser, keys)
    states, metrics, *_ = ensemble.train_chunk(
        states, losses, optimiser, ensemble.replicate(data, states), num_steps=4, block_size=2
    )
    models = [train.init(make_mlp, optimiser, key).model for key in keys]
    _, static = eqx.partition(models[0], eqx.is_inexact_array)

    @jax.jit
    def update(parameters, opt_state, weights):
        def value_fn(parameters):
            logits = jax.vmap(eqx.combine(parameters, static))(data.inputs)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
            return jnp.mean(weights[data.labels] * each)

        value, grad = jax.value_and_grad(value_fn)(parameters)
        updates, opt_state = optimiser.update(grad, opt_state, parameters, value=value, grad=grad, value_fn=value_fn)
        return value, optax.apply_updates(parameters, updates), opt_state

    for member, model in enumerate(models):
        parameters = eqx.filter(model, eqx.is_inexact_array)
        opt_state = optimiser.init(parameters)
        for step in range(4):
            weights = OscillatingWeights(3, amplitudes[member], 4.0)(step)
            value, parameters, opt_state = update(parameters, opt_state, weights)
            assert tree_allclose(metrics.loss[member, step], value, rtol=1e-8)
        trained = jax.tree.map(lambda leaf, m=member: leaf[m], eqx.filter(states.model, eqx.is_array))
        assert tree_allclose(jax.tree.leaves(trained), jax.tree.leaves(parameters), rtol=1e-6, atol=1e-8)
    assert not np.any(states.diverged)


def test_numpy_data_and_hyperparameters(getkey):
    data = blobs(getkey())
    arrays = np.asarray(data.inputs), np.asarray(data.labels)
    of_numpy = train.Dataset(*arrays)
    state = train.init(make_mlp, OPTIMISER, getkey(), {"learning_rate": np.float64(0.3)})
    step = eqx.filter_jit(train.train_step)
    assert tree_allclose(*(step(state, LOSS, OPTIMISER, *batch)[1] for batch in (arrays, (data.inputs, data.labels))))
    assert tree_allclose(*(train.evaluate(state.model, d) for d in (of_numpy, data)))
    chunk = eqx.filter_jit(train.train_chunk)
    runs = [chunk(state, LOSS, OPTIMISER, d, num_steps=5, batch_size=7)[1] for d in (of_numpy, data)]
    assert tree_allclose(*runs, rtol=0, atol=0)
    states = ensemble.init(make_mlp, OPTIMISER, jr.split(getkey(), 2), {"learning_rate": np.array([0.1, 0.2])})
    assert tree_allclose(states.opt_state.hyperparams["learning_rate"], jnp.array([0.1, 0.2]))


@pytest.mark.slow
def test_training_without_jit(getkey):
    data, state = blobs(getkey()), train.init(Dropping, OPTIMISER, getkey())
    run = lambda: train.train_chunk(state, LOSS, OPTIMISER, data, num_steps=2, batch_size=7, microbatch_size=7)[1]
    expected = eqx.filter_jit(run)(), eqx.filter_jit(train.evaluate)(state.model, data)
    with jax.disable_jit():
        assert tree_allclose((run(), train.evaluate(state.model, data)), expected)
