"""Training one network under a dynamical loss: a state, a step, a chunk of steps, an evaluation. All pure functions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from eqx_dynloss_kernels.operands import accumulation_dtype
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer, Key, PyTree, Shaped

from .data import Dataset, example_keys, minibatches
from .injection import inject
from .loss import BaseLoss, DynamicalLoss, softmax_cross_entropy


class TrainState(eqx.Module):
    """Everything that a training run is at one moment, and all that its continuation depends on."""

    model: PyTree
    opt_state: PyTree
    step: Int[Array, ""]  # updates made so far; stands still once a member has diverged
    key: Key[Array, ""]  # decides the order of the examples; never changes
    diverged: Bool[Array, ""]  # an update was not finite: it was not made, and none will be


class Metrics(eqx.Module):
    """Mean loss and share of correct answers, each with the same leading axes."""

    loss: Float[Array | np.ndarray, "..."]
    accuracy: Float[Array | np.ndarray, "..."]


def init(
    make_model: Callable[[Key[Array, ""]], PyTree],
    optimiser: optax.GradientTransformation,
    key: Key[Array, ""],
    hyperparams: Mapping[str, ArrayLike] | None = None,
) -> TrainState:
    """The state before the first update.

    **Arguments:**

    - `make_model`: a function of a key that gives an Equinox model of one example. One that takes a `key`, such as a
        model with dropout, is trained with a key of its own for every example and update.
    - `optimiser`: any optax optimiser, also one that searches along a line, as `optax.lbfgs` does, but for those that
        want a gradient elsewhere or of something else, as `optax.contrib.sam` and `sophia` do.
    - `key`: decides both the initial parameters and the order of the examples.
    - `hyperparams`: values for hyperparameters of an optimiser made with `optax.inject_hyperparams`, by name.
    """
    model_key, order_key = jr.split(key)
    model = make_model(model_key)
    has_state = lambda leaf: isinstance(leaf, eqx.nn.State | eqx.nn.StateIndex)
    if any(map(has_state, jax.tree.leaves(model, is_leaf=has_state))):
        raise ValueError(
            "the model has layers with a state, such as BatchNorm, which is not kept here: use layers without one, "
            "such as eqx.nn.GroupNorm or eqx.nn.LayerNorm."
        )
    opt_state: Any = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    if hyperparams:
        opt_state = inject(opt_state, hyperparams)
    return TrainState(model, opt_state, jnp.zeros((), int), order_key, jnp.zeros((), bool))


def train_step(
    state: TrainState,
    loss: DynamicalLoss,
    optimiser: optax.GradientTransformation,
    inputs: Shaped[ArrayLike, "batch ..."],
    labels: Integer[ArrayLike, " batch"] | Float[ArrayLike, "batch classes"],
    *,
    microbatch_size: int | None = None,
) -> tuple[TrainState, Metrics]:
    """One update, on one batch.

    An update that is not finite, or from gradients whose norm is not, is not made: the state keeps its last finite
    values, is marked as diverged and does not move again.

    **Arguments:**

    - `microbatch_size`: examples whose gradient is computed at a time, a divisor of the batch; `None` is all. Needs
        less memory, and on a CPU less time for convolutions, whose activations then stay in the cache. The update is
        the same up to rounding, for a loss that is a mean over the examples.

    **Returns:** the new state, and the loss and accuracy on this batch before the update (NaN once diverged).
    """

    def objective(model, inputs, labels, keys=None):
        with_key = lambda x, key: model(x, key=key)
        outputs = jax.vmap(model)(inputs) if keys is None else jax.vmap(with_key)(inputs, keys)
        return loss(outputs, labels, state.step), _accuracy(outputs, labels)

    batch = jnp.asarray(inputs), jnp.asarray(labels)
    if _key_parameter(state.model):
        batch += (example_keys(state.key, state.step, len(batch[0])),)
    value_and_grad = eqx.filter_value_and_grad(objective, has_aux=True)
    if microbatch_size is not None:
        value_and_grad = _mean_over_microbatches(value_and_grad, microbatch_size)
    (value, accuracy), grads = value_and_grad(state.model, *batch)
    parameters, static = eqx.partition(state.model, eqx.is_inexact_array)
    update = optax.with_extra_args_support(optimiser).update
    value_fn = lambda parameters: objective(eqx.combine(parameters, static), *batch)[0]
    updates, opt_state = update(grads, state.opt_state, parameters, value=value, grad=grads, value_fn=value_fn)
    model = eqx.combine(optax.apply_updates(parameters, updates), static)

    # The norm is infinite before the gradients are: their squares would silently overflow in an optimiser's moments.
    gradient = _vector(grads)
    norm = optax.tree.norm(gradient.astype(accumulation_dtype(gradient.dtype)))
    moves = ~state.diverged & jnp.isfinite(value) & jnp.isfinite(norm)
    moves &= jnp.all(jnp.isfinite(_vector(model)))
    model, opt_state, step = _select(
        moves, (model, opt_state, state.step + 1), (state.model, state.opt_state, state.step)
    )
    new = TrainState(model, opt_state, step, state.key, ~moves)
    metrics = Metrics(value, accuracy.astype(value.dtype))
    return new, _nan_where(state.diverged, metrics)


def train_chunk(
    state: TrainState,
    loss: DynamicalLoss,
    optimiser: optax.GradientTransformation,
    data: Dataset,
    *,
    num_steps: int,
    batch_size: int | None = None,
    microbatch_size: int | None = None,
    observe: Callable[[TrainState, DynamicalLoss, Dataset], PyTree] | None = None,
    observe_every: int = 1,
) -> tuple[TrainState, Metrics, PyTree]:
    """`num_steps` updates as one `lax.scan`.

    The data are walked through in a new random order every epoch; an epoch is as many full batches as there are, and
    what is left over sits out. The order depends only on the state's key and step: however a run is cut into chunks, it
    is the same run.

    **Arguments:**

    - `num_steps`: updates in this chunk. The orders of all epochs that it touches are in memory at once.
    - `batch_size`: examples in a batch; `None` trains on all of them in every step, in the order of the data.
    - `microbatch_size`: as for `train_step`.
    - `observe`: a function of the state, the loss and the data that gives a PyTree of arrays, such as curvature
        (`eqx_dynloss.landscape`). It is called before the updates 0, `observe_every`, 2·`observe_every`, … of this
        chunk, and costs nothing at the others.
    - `observe_every`: updates from one observation to the next, a divisor of `num_steps`.

    **Returns:** the new state; the metrics of every update, `[num_steps]`; and what was observed, every array with a
    leading axis of `num_steps / observe_every` (floating-point numbers are NaN once diverged).
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}.")
    if batch_size is not None and not 1 <= batch_size <= len(data):
        raise ValueError(f"batch_size must be between 1 and the number of examples, {len(data)}, got {batch_size}.")
    arrays, static = eqx.partition(state, eqx.is_array)
    everything = None if batch_size else data.batch()
    order = minibatches(state.key, state.step, num_steps, len(data), batch_size) if batch_size else None

    def body(arrays, indices):
        batch = everything or data.batch(indices)
        state, metrics = train_step(
            eqx.combine(arrays, static), loss, optimiser, *batch, microbatch_size=microbatch_size
        )
        return eqx.filter(state, eqx.is_array), metrics

    if observe is None:
        arrays, metrics = lax.scan(body, arrays, order, length=num_steps)
        return eqx.combine(arrays, static), metrics, None
    if observe_every < 1 or num_steps % observe_every:
        raise ValueError(f"observe_every must divide num_steps, {num_steps}, got {observe_every}.")

    def observe_then_train(arrays, order):
        state = eqx.combine(arrays, static)
        observed = observation(state, loss, data, observe)
        arrays, metrics = lax.scan(body, arrays, order, length=observe_every)
        return arrays, (metrics, observed)

    # Two nested scans: a condition inside one would be evaluated at every step of a vmapped member.
    groups = num_steps // observe_every
    order = None if order is None else order.reshape(groups, observe_every, -1)
    arrays, (metrics, observed) = lax.scan(observe_then_train, arrays, order, length=groups)
    return eqx.combine(arrays, static), jax.tree.map(jnp.ravel, metrics), observed


def observation(
    state: TrainState,
    loss: DynamicalLoss,
    data: Dataset,
    observe: Callable[[TrainState, DynamicalLoss, Dataset], PyTree],
) -> PyTree:
    """What a function of the state, the loss and the data gives; NaN for a state that has diverged."""
    return _nan_where(state.diverged, observe(state, loss, data))


def evaluate(model: PyTree, data: Dataset, *, batch_size: int = 256, base: BaseLoss = softmax_cross_entropy) -> Metrics:
    """The plain, unweighted loss and the accuracy on a whole data set: comparable between all schedules.

    Dropout and the like are off (`eqx.nn.inference_mode`).

    **Arguments:**

    - `model`: an Equinox model of one example that gives an output per class, such as logits.
    - `batch_size`: examples that are in memory at once. Does not change the result beyond rounding.
    - `base`: the per-example loss whose mean is taken, with a weight of one for every class.
    """
    model = eqx.nn.inference_mode(model)
    key = _key_parameter(model)
    no_key = {"key": None} if key and key.default is inspect.Parameter.empty else {}
    outputs = lax.map(lambda x: model(data.transform(x), **no_key), data.inputs, batch_size=min(batch_size, len(data)))
    loss = jnp.mean(base(outputs, data.labels, jnp.ones(outputs.shape[-1])))
    return Metrics(loss, _accuracy(outputs, data.labels).astype(loss.dtype))


def _mean_over_microbatches(function, size):
    """The mean of the arrays that `function(model, inputs, labels)` gives for consecutive parts of the batch."""

    def mean(model, *batch):
        num_parts, rest = divmod(len(batch[0]), size) if size > 0 else (0, 1)
        if rest:
            raise ValueError(f"microbatch_size must divide the batch of {len(batch[0])}, got {size}.")
        parts = tuple(a.reshape(num_parts, size, *a.shape[1:]) for a in batch)
        like = eqx.filter_eval_shape(function, model, *(a[0] for a in parts))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, accumulation_dtype(a.dtype)), like)

        def add(total, part):
            return jax.tree.map(lambda sum, a: sum + a.astype(sum.dtype), total, function(model, *part)), None

        total, _ = lax.scan(add, zeros, parts)
        return jax.tree.map(lambda sum, a: (sum / num_parts).astype(a.dtype), total, like)

    return mean


def _key_parameter(model) -> inspect.Parameter | None:
    """The parameter `key` of a model that has one."""
    try:
        return inspect.signature(model).parameters.get("key")
    except (TypeError, ValueError):  # a callable that does not tell
        return None


def _accuracy(outputs, labels):
    if labels.ndim == outputs.ndim:  # distributions over the classes
        labels = jnp.argmax(labels, -1)
    return jnp.mean(jnp.argmax(outputs, -1) == labels.astype(int), dtype=float)


def _vector(tree):
    """All inexact numbers of a tree: one thing to look through, where every leaf by itself is a launch on a GPU."""
    return ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def _nan_where(condition, tree):
    return jax.tree.map(lambda x: jnp.where(condition, jnp.nan, x) if eqx.is_inexact_array(x) else x, tree)


def _select(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b) if eqx.is_array(a) else a, yes, no)
