import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqx_dynloss import train
from eqx_dynloss.data import minibatches as draw_minibatches
from eqx_dynloss.loss import (
    DynamicalLoss,
    softmax_cross_entropy,
    softmax_cross_entropy_with_soft_labels,
    squared_error,
)
from eqx_dynloss.models import MLP, Myrtle
from eqx_dynloss.schedule import OscillatingWeights, StaticWeights

from .helpers import slow, tree_allclose

init = eqx.filter_jit(train.init)
train_step = eqx.filter_jit(train.train_step)
train_chunk = eqx.filter_jit(train.train_chunk)
minibatches = eqx.filter_jit(draw_minibatches)
evaluate = eqx.filter_jit(train.evaluate)

OPTIMISER = optax.inject_hyperparams(lambda learning_rate: optax.sgd(learning_rate, 0.9, nesterov=True))(0.1)
LOSS = DynamicalLoss(OscillatingWeights(3, 5.0, 4.0))


def make_mlp(key):
    return MLP(2, 16, 3, key=key)


def blobs(key, n=30):
    labels = jnp.arange(n) % 3
    centres = jnp.array([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    return train.Dataset(centres[labels] + 0.3 * jr.normal(key, (n, 2)), labels)


def test_a_step_is_the_optimisers_update_on_the_weighted_mean_loss(getkey):
    data = blobs(getkey())
    state = init(make_mlp, OPTIMISER, getkey())
    optimiser = optax.sgd(0.1, 0.9, nesterov=True)
    model, opt_state = state.model, optimiser.init(eqx.filter(state.model, eqx.is_array))
    for step in range(6):
        weights = LOSS.schedule(step)

        def objective(model, weights=weights):
            logits = jax.vmap(model)(data.inputs)
            return jnp.mean(weights[data.labels] * optax.softmax_cross_entropy_with_integer_labels(logits, data.labels))

        value, grads = eqx.filter_value_and_grad(objective)(model)
        updates, opt_state = optimiser.update(grads, opt_state)
        right = jnp.mean(jnp.argmax(jax.vmap(model)(data.inputs), -1) == data.labels)
        model = eqx.apply_updates(model, updates)
        state, metrics = train_step(state, LOSS, OPTIMISER, data.inputs, data.labels)
        assert tree_allclose(metrics.loss, value) and metrics.accuracy == right
    assert tree_allclose(state.model, model)
    assert state.step == 6 and not state.diverged


@pytest.mark.parametrize("chunks", [slow((20,)), slow((1,) * 20), (7, 7, 6), slow((3, 16, 1))])
@pytest.mark.parametrize("batch_size", [None, slow(4), 13, slow(30)])
def test_how_a_run_is_cut_into_chunks_does_not_matter(chunks, batch_size, getkey):
    data = blobs(getkey())
    start = init(make_mlp, OPTIMISER, getkey())
    whole, metrics, _ = train_chunk(start, LOSS, OPTIMISER, data, num_steps=20, batch_size=batch_size)
    state, parts = start, []
    for n in chunks:
        state, part, _ = train_chunk(state, LOSS, OPTIMISER, data, num_steps=n, batch_size=batch_size)
        parts.append(part)
    assert tree_allclose(
        eqx.filter((whole.model, whole.opt_state), eqx.is_array),
        eqx.filter((state.model, state.opt_state), eqx.is_array),
    )
    assert tree_allclose(metrics, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))
    assert metrics.loss[-1] < metrics.loss[0]


@pytest.mark.parametrize("num_examples, batch_size", [(30, 4), (30, 30), (7, 1), (50, 25)])
def test_every_epoch_is_another_permutation_without_repeats(num_examples, batch_size, getkey):
    per_epoch = num_examples // batch_size
    order = minibatches(getkey(), jnp.array(0), 3 * per_epoch, num_examples, batch_size)
    epochs = np.asarray(order).reshape(3, -1)
    for epoch in epochs:
        assert len(np.unique(epoch)) == len(epoch) == per_epoch * batch_size
        assert epoch.min() >= 0 and epoch.max() < num_examples
    assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("step, num_steps", [(0, 1), (6, 1), (6, 2), (3, 7), (5, 16), (41, 15)])
def test_minibatches_are_the_same_from_wherever_they_are_asked_for(step, num_steps, getkey):
    key = getkey()
    whole = minibatches(key, jnp.array(0), 70, 30, 4)
    part = minibatches(key, jnp.array(step), num_steps, 30, 4)
    assert np.array_equal(part, whole[step : step + num_steps])


@pytest.mark.parametrize("size", [1, 5, 30])
def test_microbatches_give_the_same_update(size, getkey):
    data = blobs(getkey())
    state = init(make_mlp, OPTIMISER, getkey())
    whole, expected = train_step(state, LOSS, OPTIMISER, data.inputs, data.labels)
    parts, metrics = train_step(state, LOSS, OPTIMISER, data.inputs, data.labels, microbatch_size=size)
    assert tree_allclose(parts.model, whole.model)
    assert tree_allclose(metrics, expected)


@pytest.mark.parametrize("size", [7, 0, -5])
def test_microbatches_that_do_not_divide_the_batch_are_an_error(size, getkey):
    data = blobs(getkey())
    state = init(make_mlp, OPTIMISER, getkey())
    with pytest.raises(ValueError, match="microbatch_size must divide the batch of 30, got"):
        train_step(state, LOSS, OPTIMISER, data.inputs, data.labels, microbatch_size=size)


@pytest.mark.parametrize("batch_size", [0, 31, -1])
def test_a_batch_size_out_of_range_is_an_error(batch_size, getkey):
    data = blobs(getkey())
    state = init(make_mlp, OPTIMISER, getkey())
    with pytest.raises(ValueError, match="batch_size must be between 1 and the number of examples, 30"):
        train_chunk(state, LOSS, OPTIMISER, data, num_steps=2, batch_size=batch_size)


def norm_and_step(state, loss, data):
    return {"norm": optax.tree.norm(state.model), "step": state.step, "weight": loss.schedule(state.step)[0]}


@pytest.mark.parametrize("every", [slow(1), 4, slow(20)])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_observations_are_of_the_states_before_every_so_many_updates(every, batch_size, getkey):
    data = blobs(getkey())
    start = init(make_mlp, OPTIMISER, getkey())
    start, _, _ = train_chunk(start, LOSS, OPTIMISER, data, num_steps=3, batch_size=batch_size)
    chunk = ft.partial(train_chunk, batch_size=batch_size)
    end, metrics, seen = chunk(start, LOSS, OPTIMISER, data, num_steps=20, observe=norm_and_step, observe_every=every)
    unobserved, expected, nothing = chunk(start, LOSS, OPTIMISER, data, num_steps=20)
    assert nothing is None
    assert tree_allclose(metrics, expected) and tree_allclose(end.model, unobserved.model)
    state, states = start, []
    for _ in range(20 // every):
        states.append(norm_and_step(state, LOSS, data))
        state, _, _ = chunk(state, LOSS, OPTIMISER, data, num_steps=every)
    assert tree_allclose(seen, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    assert np.array_equal(seen["step"], 3 + np.arange(0, 20, every))


@pytest.mark.parametrize("every", [3, 0, -2])
def test_observations_must_fit_into_the_chunk(every, getkey):
    state = init(make_mlp, OPTIMISER, getkey())
    with pytest.raises(ValueError, match=f"observe_every must divide num_steps, 20, got {every}"):
        train_chunk(state, LOSS, OPTIMISER, blobs(getkey()), num_steps=20, observe=norm_and_step, observe_every=every)


def test_observing_costs_nothing_at_the_other_updates(getkey):
    """Also where members are vmapped: what is observed is computed in the outer loop of the program, not the inner."""
    data, state = blobs(getkey()), init(make_mlp, OPTIMISER, getkey())

    def expensive(state, loss, data):
        return jnp.linalg.matrix_power(jnp.outer(data.inputs[:, 0], data.inputs[:, 1]), 5)

    vmapped = lambda states: jax.vmap(
        lambda s: train.train_chunk(s, LOSS, OPTIMISER, data, num_steps=20, observe=expensive, observe_every=10)
    )(states)
    arrays = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), eqx.filter(state, eqx.is_array))
    static = eqx.filter(state, eqx.is_array, inverse=True)
    jaxpr = jax.make_jaxpr(lambda arrays: eqx.filter(vmapped(eqx.combine(arrays, static)), eqx.is_array))(arrays)
    (outer,) = [e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 2]
    (inner,) = [e for e in outer.params["jaxpr"].eqns if e.primitive.name == "scan" and e.params["length"] == 10]
    assert "30,30" in str(outer.params["jaxpr"]) and "30,30" not in str(inner.params["jaxpr"])


def test_a_run_that_diverges_stops_at_its_last_finite_state_and_says_when(getkey):
    data = blobs(getkey())
    optimiser = optax.sgd(1e30)
    state = init(make_mlp, optimiser, getkey())
    states = [state]
    for _ in range(10):
        state, _ = train_step(state, LOSS, optimiser, data.inputs, data.labels)
        states.append(state)
    assert state.diverged and int(state.step) < 10
    assert tree_allclose(state.model, states[int(state.step)].model, rtol=0, atol=0)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(eqx.filter(state.model, eqx.is_array)))
    _, metrics = train_step(state, LOSS, optimiser, data.inputs, data.labels)
    assert jnp.isnan(metrics.loss) and jnp.isnan(metrics.accuracy)
    _, _, seen = train_chunk(states[0], LOSS, optimiser, data, num_steps=10, observe=norm_and_step)
    assert np.array_equal(np.isnan(seen["norm"]), np.arange(10) > int(state.step))
    assert seen["step"][-1] == state.step


def test_a_model_with_parts_that_are_not_arrays_trains(getkey):
    data = blobs(getkey())
    state = init(lambda key: eqx.nn.MLP(2, 3, 16, 1, key=key), OPTIMISER, getkey())
    state, metrics, _ = train_chunk(state, LOSS, OPTIMISER, data, num_steps=30)
    assert metrics.loss[-1] < 0.5 * metrics.loss[0]
    assert jax.vmap(state.model)(data.inputs).shape == (30, 3)


def test_images_are_stored_as_bytes_and_transformed_when_drawn(getkey):
    images = jr.randint(getkey(), (12, 8, 8, 3), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(12) % 10
    loss, optimiser = DynamicalLoss(StaticWeights(jnp.ones(10))), optax.sgd(0.01)
    state = init(lambda key: Myrtle(4, key=key), optimiser, getkey())
    to_float = lambda x: x.astype(jnp.float32) / 255
    as_bytes = train.Dataset(images, labels, to_float)
    as_floats = train.Dataset(to_float(images), labels)
    chunk = ft.partial(train_chunk, num_steps=3, batch_size=5)
    one = chunk(state, loss, optimiser, as_bytes)
    other = chunk(state, loss, optimiser, as_floats)
    assert tree_allclose(one[1], other[1])
    assert tree_allclose(evaluate(one[0].model, as_bytes), evaluate(other[0].model, as_floats))


@pytest.mark.parametrize("batch_size", [None, 6])
def test_a_transform_is_of_one_example_in_training_and_in_evaluation(batch_size, getkey):
    """This one would give other numbers for a batch."""
    inputs, labels = jr.normal(getkey(), (12, 2)), jnp.arange(12) % 3
    normalise = lambda x: x / jnp.sqrt(jnp.sum(x**2))
    drawn, before = train.Dataset(inputs, labels, normalise), train.Dataset(jax.vmap(normalise)(inputs), labels)
    state = init(make_mlp, OPTIMISER, getkey())
    one, other = (
        train_chunk(state, LOSS, OPTIMISER, data, num_steps=3, batch_size=batch_size) for data in (drawn, before)
    )
    assert tree_allclose(one[1], other[1])
    assert tree_allclose(evaluate(one[0].model, drawn), evaluate(other[0].model, before))


@pytest.mark.parametrize("batch_size", [None, 3])  # of which 3 is the number of classes
def test_labels_may_be_distributions(batch_size, getkey):
    """One-hot ones are class indices, in the loss as well as in the accuracy."""
    data, state = blobs(getkey()), init(make_mlp, OPTIMISER, getkey())
    soft = train.Dataset(data.inputs, jax.nn.one_hot(data.labels, 3))
    distributions = DynamicalLoss(LOSS.schedule, softmax_cross_entropy_with_soft_labels)
    chunk = ft.partial(train_chunk, num_steps=5, batch_size=batch_size)
    one, other = chunk(state, LOSS, OPTIMISER, data), chunk(state, distributions, OPTIMISER, soft)
    assert tree_allclose(one[1], other[1]) and tree_allclose(one[0].model, other[0].model)
    evaluated = evaluate(one[0].model, soft, base=softmax_cross_entropy_with_soft_labels)
    assert tree_allclose(evaluated, evaluate(one[0].model, data))


@pytest.mark.parametrize("batch_size", [1, 7, 30, 256])
def test_evaluation_is_the_plain_mean_over_all_examples(batch_size, getkey):
    data = blobs(getkey())
    model = make_mlp(getkey())
    logits = jax.vmap(model)(data.inputs)
    metrics = evaluate(model, data, batch_size=batch_size)
    expected = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, data.labels))
    assert tree_allclose(metrics.loss, expected)
    assert metrics.accuracy == jnp.mean(jnp.argmax(logits, -1) == data.labels)


@pytest.mark.parametrize("weighting", ["sample", "unit"])
def test_evaluation_by_another_loss_is_its_mean_without_class_weights(weighting, getkey):
    data = blobs(getkey())
    model = make_mlp(getkey())
    outputs = np.asarray(jax.vmap(model)(data.inputs))
    metrics = evaluate(model, data, batch_size=7, base=ft.partial(squared_error, weighting=weighting))
    assert tree_allclose(metrics.loss, np.mean(np.sum((outputs - np.eye(3, dtype="float32")[data.labels]) ** 2, -1)))
    assert metrics.accuracy == np.mean(outputs.argmax(-1) == data.labels)


def test_hyperparameters_are_set_by_name_and_unknown_ones_are_an_error(getkey):
    state = init(make_mlp, OPTIMISER, getkey(), {"learning_rate": jnp.array(0.25)})
    assert state.opt_state.hyperparams["learning_rate"] == 0.25
    with pytest.raises(ValueError, match="no hyperparameter momentum.*are: learning_rate"):
        init(make_mlp, OPTIMISER, getkey(), {"momentum": jnp.array(0.5)})
    with pytest.raises(ValueError, match="no hyperparameter learning_rate.*are: none"):
        init(make_mlp, optax.sgd(0.1), getkey(), {"learning_rate": jnp.array(0.5)})


@pytest.mark.parametrize("wrap", [
    lambda injected: optax.chain(optax.clip_by_global_norm(1.0), injected),
    lambda injected: optax.MultiSteps(injected, 2).gradient_transformation(),
    lambda injected: optax.chain(injected, injected),  # which sets it in both
])  # fmt: skip
def test_hyperparameters_are_found_wherever_they_are_injected(wrap, getkey):
    data, own = blobs(getkey()), optax.inject_hyperparams(optax.sgd)
    given, built = wrap(own(learning_rate=0.1)), wrap(own(learning_rate=0.3))
    key = getkey()
    states = init(make_mlp, given, key, {"learning_rate": jnp.array(0.3)}), init(make_mlp, built, key)
    with jax.numpy_dtype_promotion("standard"):  # which MultiSteps needs
        one, other = (train_chunk(state, LOSS, given, data, num_steps=4)[0] for state in states)
    assert tree_allclose(one.model, other.model)
    with pytest.raises(ValueError, match="no hyperparameter momentum.*are: learning_rate"):
        init(make_mlp, given, getkey(), {"momentum": jnp.array(0.5)})


def test_inputs_and_labels_of_different_number_are_an_error():
    data = train.Dataset(jnp.zeros((30, 2)), jnp.zeros(30, int))
    fewer = eqx.tree_at(lambda d: d.labels, data, jnp.zeros(29, int))
    with pytest.raises(ValueError, match="got 30 inputs but 29 labels"):
        fewer.__check_init__()


@pytest.mark.parametrize("injected", [1, 1.0])
def test_an_optimiser_that_was_given_an_integer_takes_fractions(injected, getkey):
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=injected)
    state = init(make_mlp, optimiser, getkey(), {"learning_rate": jnp.array(0.5)})
    data = blobs(getkey())
    state, _, _ = train_chunk(state, LOSS, optimiser, data, num_steps=3)
    assert state.opt_state.hyperparams["learning_rate"] == 0.5


def test_a_value_that_a_schedule_would_overwrite_is_an_error(getkey):
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="sets learning_rate by a schedule of its own"):
        init(make_mlp, optimiser, getkey(), {"learning_rate": jnp.array(0.5)})


def test_gradients_too_large_to_square_are_a_divergence(getkey):
    """Adam's moments overflow, and its updates are 0 from then on: finite, and dead."""
    data = blobs(getkey())
    optimiser = optax.adam(0.1)
    state = init(make_mlp, optimiser, getkey())
    huge = DynamicalLoss(LOSS.schedule, lambda *args: 1e25 * softmax_cross_entropy(*args))
    with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
        state, _ = train_step(state, huge, optimiser, data.inputs, data.labels)
    assert state.diverged and state.step == 0


def test_optimisers_that_look_at_the_loss_work(getkey):
    data = blobs(getkey())
    optimiser = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    state = init(make_mlp, optimiser, getkey())
    with jax.numpy_dtype_promotion("standard"):  # which this one needs
        state, metrics, _ = train_chunk(state, LOSS, optimiser, data, num_steps=20)
    assert metrics.loss[-1] < metrics.loss[0]


def test_a_gradient_whose_norm_only_16_bits_do_not_hold_is_no_divergence(getkey):
    data = blobs(getkey())
    half = lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.float16), make_mlp(key))
    state = init(half, optax.sgd(1e-6), getkey())
    large = DynamicalLoss(LOSS.schedule, lambda *args: 1e4 * softmax_cross_entropy(*args))  # its norm squared overflows
    state, _ = train_step(state, large, optax.sgd(1e-6), data.inputs.astype(jnp.float16), data.labels)
    assert not state.diverged and state.step == 1


def test_parameters_keep_their_dtype_whatever_the_optimisers_is(getkey):
    data = blobs(getkey())
    half = lambda key: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_mlp(key))
    optimiser = optax.adam(0.1, mu_dtype=jnp.float32)
    state = init(half, optimiser, getkey())
    with jax.numpy_dtype_promotion("standard"):  # which optax's Adam needs
        data = train.Dataset(data.inputs.astype(jnp.bfloat16), data.labels)
        state, metrics, _ = train_chunk(state, LOSS, optimiser, data, num_steps=20)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(eqx.filter(state.model, eqx.is_array)))
    assert metrics.loss[-1] < metrics.loss[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_microbatches_of_16_bit_gradients_are_summed_in_32(dtype, getkey):
    data = blobs(getkey(), 300)
    model = jax.tree.map(lambda leaf: leaf.astype(dtype), make_mlp(getkey()))
    inputs, optimiser = data.inputs.astype(dtype), optax.sgd(1.0)
    state = init(lambda key: model, optimiser, getkey())
    whole, _ = train_step(state, LOSS, optimiser, inputs, data.labels)
    parts, _ = train_step(state, LOSS, optimiser, inputs, data.labels, microbatch_size=1)
    assert tree_allclose(
        parts.model, whole.model, rtol=2 * float(jnp.finfo(dtype).eps), atol=4 * float(jnp.finfo(dtype).eps)
    )
