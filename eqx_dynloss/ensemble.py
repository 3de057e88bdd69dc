"""Training many networks as one compiled program.

A member is a seed, the leaves of its schedule, and the injected hyperparameters of its optimiser: all may differ, and
the rest is shared. A chunk of training maps over blocks of members, runs the members of a block side by side with
`vmap`, and scans over the steps inside: `shard_map ∘ map ∘ vmap ∘ scan`. Members never exchange anything, so a member's
run is that of `eqx_dynloss.train` alone.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Key, PyTree

from . import train
from .loss import BaseLoss, DynamicalLoss
from .train import Dataset, Metrics, TrainState

_T = TypeVar("_T")
_AXIS = "members"


def init(
    make_model: Callable[[Key[Array, ""]], PyTree],
    optimiser: optax.GradientTransformation,
    keys: Key[Array, " members"],
    hyperparams: Mapping[str, ArrayLike] | None = None,
    *,
    devices: Sequence[Any] | None = None,
) -> TrainState:
    """The states of all members before the first update, spread over the devices.

    **Arguments:**

    - `make_model`, `optimiser`: as for `eqx_dynloss.train.init`.
    - `keys`: one key per member. Members with the same key have the same initial parameters and see the same examples
        in the same order, so that their results can be compared in pairs.
    - `hyperparams`: `[members]` values for hyperparameters injected into the optimiser, by name.
    - `devices`: those to use, all of all hosts by default; of these, as many as divide the number of members are used.

    **Returns:** a `TrainState` whose arrays have a leading member axis.

    **Raises:** `ValueError` if there are several hosts and the number of devices does not divide that of the members:
    every host has to take part.
    """
    devices = list(jax.devices() if devices is None else devices)
    num_members = len(keys)
    num_devices = max(n for n in range(1, len(devices) + 1) if num_members % n == 0)
    if jax.process_count() > 1 and num_devices < len(devices):
        raise ValueError(
            f"on several hosts the number of members must be a multiple of the {len(devices)} devices, "
            f"got {num_members}: repeat some members."
        )
    mesh = Mesh(devices[:num_devices], (_AXIS,))

    values = {name: jnp.asarray(value) for name, value in (hyperparams or {}).items()}
    for name, value in values.items():
        if value.shape != (num_members,):
            raise ValueError(
                f"hyperparameter {name} must hold one value for each of the {num_members} members, "
                f"got shape {value.shape}."
            )

    return _place(_init(make_model, optimiser, keys, values), NamedSharding(mesh, P(_AXIS)))


def replicate(tree: _T, states: TrainState) -> _T:
    """Copies data to every device that the states are on. Do it once, with each data set, before training."""
    return _place(tree, NamedSharding(_mesh(states), P()))


def train_chunk(
    states: TrainState,
    losses: DynamicalLoss,
    optimiser: optax.GradientTransformation,
    data: Dataset,
    *,
    num_steps: int,
    batch_size: int | None = None,
    microbatch_size: int | None = None,
    observe: Callable[[TrainState, DynamicalLoss, Dataset], PyTree] | None = None,
    observe_every: int = 1,
    evaluations: Mapping[str, tuple[Dataset, bool]] | None = None,
    block_size: int | None = None,
) -> tuple[TrainState, Metrics, PyTree, dict[str, Metrics]]:
    """`num_steps` updates of every member, then evaluations. Calls that differ only in arrays share one compilation.

    The memory of `states` is reused: the old value is gone after the call. Functions (the optimiser, a data set's
    transform, a base loss) are compared by identity: make them once, or every call compiles again.

    **Arguments:**

    - `states`: from `init`, or from the last chunk.
    - `losses`: one dynamical loss whose array leaves have a leading member axis, for example
        `DynamicalLoss(OscillatingWeights(10, amplitudes, periods))` with `[members]` arrays.
    - `optimiser`, `data`, `num_steps`, `batch_size`, `microbatch_size`, `observe`, `observe_every`: as for
        `eqx_dynloss.train.train_chunk`; `data` from `replicate`.
    - `evaluations`: by name, a data set and whether to evaluate on it after this chunk. One that is skipped costs
        nothing and gives NaN.
    - `block_size`: how many members run side by side on a device, see `default_block_size`. Changes results by rounding
        at most.

    **Returns:** the new states; the metrics of every update, `[members, num_steps]`; what was observed, every array
    with leading axes `[members, num_steps / observe_every]`; and for every evaluation its metrics, `[members]`.
    """
    options = {"num_steps": num_steps, "batch_size": batch_size, "microbatch_size": microbatch_size}
    options |= {"observe": observe, "observe_every": observe_every}
    return _run_chunk(_Chunk.of(states, losses, optimiser, data, evaluations, block_size, options), states)


def peak_memory(
    states: TrainState,
    losses: DynamicalLoss,
    optimiser: optax.GradientTransformation,
    data: Dataset,
    *,
    evaluations: Mapping[str, tuple[Dataset, bool]] | None = None,
    block_size: int | None = None,
    **options: Any,
) -> int:
    """Bytes that a `train_chunk` with these arguments needs on one device at its peak, by the compiler's account.

    Compiles the program, and does not run it.
    """
    chunk, program = _Chunk.of(states, losses, optimiser, data, evaluations, block_size, options), _run_chunk
    return program.lower(chunk, states).compile().compiled.memory_analysis().peak_memory_in_bytes  # type: ignore


def observe(
    states: TrainState,
    losses: DynamicalLoss,
    data: Dataset,
    function: Callable[[TrainState, DynamicalLoss, Dataset], PyTree],
    *,
    block_size: int | None = None,
) -> PyTree:
    """`function(state, loss, data)` of every member, such as the curvature after the last update.

    Arguments as for `train_chunk`, with `function` in the place of `observe`. **Returns:** a PyTree of arrays with a
    leading member axis; NaN for members that have diverged.
    """
    losses = _place(losses, NamedSharding(_mesh(states), P(_AXIS)))
    return _observe(states, losses, data, function, _mesh(states), _block_size(states, block_size))


def gather(tree: PyTree) -> PyTree:
    """Brings arrays with a member axis from all devices, of all hosts, to every host, as NumPy arrays.

    With several hosts all of them have to call it. Random keys become the numbers that they are made of.
    """

    def fetch(leaf):
        leaf = jr.key_data(leaf) if _is_key(leaf) else leaf
        return leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(fetch, eqx.filter(tree, eqx.is_array)))


def scatter(values: PyTree, like: TrainState) -> TrainState:
    """The inverse of `gather`: puts the members' numbers into states like those that `init` gives, on their devices.

    **Arguments:**

    - `values`: what `gather` gave, for as many members as `like` has.
    - `like`: states from `init` for the same model and optimiser, on any devices. Only their arrays are replaced.
    """
    arrays, static = eqx.partition(like, eqx.is_array)

    def restore(leaf, value):
        value = jnp.asarray(value)
        return jr.wrap_key_data(value, impl=jr.key_impl(leaf)) if _is_key(leaf) else value

    return _place(eqx.combine(jax.tree.map(restore, arrays, values), static), NamedSharding(_mesh(like), P(_AXIS)))


def default_block_size(model: PyTree, platform: str) -> int:
    """How many members a device runs side by side, from the (stacked) model and the platform.

    One on a CPU, so that what it works on stays in the cache, and one for models with convolutions: a batch fills the
    device by itself, and `conv3x3` runs one kernel after another, so that more members would only need more memory. For
    others on an accelerator all. Measured on a CPU, on the spiral at widths 10 to 100, and, for convolutions, on an
    H100: sixteen small Myrtles side by side took 1.14 times as long as one after another. For other networks on an
    accelerator a guess.
    """
    return 1 if _convolutional(model) or platform == "cpu" else 2**31


def _convolutional(model: PyTree) -> bool:
    return any(leaf.ndim > 3 for leaf in jax.tree.leaves(model) if eqx.is_array(leaf))


def _evaluated_at_once(model: PyTree, example: tuple[int, ...], platform: str) -> int:
    """How many examples of a shape, for one member.

    With convolutions on a CPU two images of CIFAR-10's size, which takes Myrtle5 of widths 16 and 64 0.6 and 0.8 times
    as long as 128 at once, whose activations leave the cache; more of what is smaller.
    """
    if platform == "cpu" and _convolutional(model):
        return max(1, min(256, 8192 // math.prod(example)))
    return 256


def _block_size(states: TrainState, given: int | None) -> int:
    size = default_block_size(states.model, _mesh(states).devices.flat[0].platform) if given is None else given
    if size < 1:
        raise ValueError(f"block_size must be at least 1, got {size}.")
    return size


class _Chunk(eqx.Module):
    """A chunk of training: all that it depends on besides the states, and where they are."""

    losses: DynamicalLoss | None  # of the members, who share the rest
    data: Dataset
    train: Callable[..., tuple[TrainState, Metrics, PyTree]]  # of one member
    sets: dict[str, Dataset]  # to evaluate on
    due: Mapping[str, Bool[ArrayLike, ""]]  # whether to
    block_size: int = eqx.field(static=True)
    mesh: Mesh = eqx.field(static=True)

    @classmethod
    def of(cls, states, losses, optimiser, data, evaluations, block_size, options) -> "_Chunk":
        for leaf in jax.tree.leaves(eqx.filter(losses, eqx.is_array)):
            if leaf.ndim == 0 or len(leaf) != len(states.step):
                raise ValueError(
                    f"every array in losses must have a leading axis of {len(states.step)} members, "
                    f"got shape {leaf.shape}."
                )
        sets = {name: evaluated for name, (evaluated, _) in (evaluations or {}).items()}
        due = {name: np.asarray(flag) for name, (_, flag) in (evaluations or {}).items()}
        losses = _place(losses, NamedSharding(_mesh(states), P(_AXIS)))
        train_member = jax.tree_util.Partial(train.train_chunk, optimiser=optimiser, **options)
        return cls(losses, data, train_member, sets, due, _block_size(states, block_size), _mesh(states))

    def member(self, state: TrainState, loss: DynamicalLoss):
        state, metrics, observed = self.train(state, loss, data=self.data)
        evaluated = {name: self._evaluate(name, state.model, loss.base) for name in self.sets}
        return state, metrics, observed, evaluated

    def _evaluate(self, name: str, model: PyTree, base: BaseLoss) -> Metrics:
        data = self.sets[name]
        at_once = _evaluated_at_once(model, data.inputs.shape[1:], self.mesh.devices.flat[0].platform)
        evaluate = ft.partial(train.evaluate, model, data, batch_size=at_once, base=base)
        nothing = jax.tree.map(lambda m: jnp.full(m.shape, jnp.nan, m.dtype), eqx.filter_eval_shape(evaluate))
        return lax.cond(self.due[name], evaluate, lambda: nothing)


@eqx.filter_jit(donate="all-except-first")
def _run_chunk(chunk, states):
    shared = dataclasses.replace(chunk, losses=None)
    return _over_members(_Chunk.member, chunk.mesh, chunk.block_size)((shared,), (states, chunk.losses))


@eqx.filter_jit
def _init(make_model, optimiser, keys, values):
    # One after another, so that a member does not depend on how many others there are.
    member = lambda key, value: train.init(make_model, optimiser, key, value)
    return _on_arrays(lambda on_arrays: _in_blocks(on_arrays, 1), member)((), (keys, values))


@eqx.filter_jit
def _observe(states, losses, data, function, mesh, block_size):
    member = lambda data, state, loss: train.observation(state, loss, data, function)
    return _over_members(member, mesh, block_size)((data,), (states, losses))


def _mesh(states: TrainState) -> Mesh:
    sharding = states.step.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        raise ValueError("the states must come from eqx_dynloss.ensemble.init, which spreads them over the devices.")
    return sharding.mesh


def _over_members(function, mesh: Mesh, block_size: int):
    """Calls `function(*shared, *own)` for every member, where `own` has a leading axis of members, on the device that
    it is on: there is nothing to communicate."""
    specs: Any = {"in_specs": (P(), P(_AXIS)), "out_specs": P(_AXIS), "check_vma": False}
    return _on_arrays(lambda on_arrays: jax.shard_map(_in_blocks(on_arrays, block_size), mesh=mesh, **specs), function)


def _in_blocks(on_arrays, block_size: int):
    """Maps a function of arrays over the leading axis of `own`, `block_size` at a time."""

    def mapped(shared, own):
        size = min(block_size, len(jax.tree.leaves(own)[0]))
        return lax.map(lambda one: on_arrays(shared, one), own, batch_size=size if size > 1 else None)

    return mapped


def _on_arrays(transform, function):
    """Applies a transformation of functions of arrays to a function of PyTrees that also hold other things."""

    def filtered(shared, own):
        arrays, static = eqx.partition((shared, own), eqx.is_array)
        rest: Any = None

        def on_arrays(*arrays):
            nonlocal rest
            shared, own = eqx.combine(arrays, static)
            out, rest = eqx.partition(function(*shared, *own), eqx.is_array)
            return out

        return eqx.combine(transform(on_arrays)(*arrays), rest)

    return filtered


def _place(tree: _T, sharding: NamedSharding) -> _T:
    def put(leaf):
        if _is_key(leaf):  # JAX does not put keys on the devices of other hosts, but numbers
            return jr.wrap_key_data(jax.device_put(jr.key_data(leaf), sharding), impl=jr.key_impl(leaf))
        return jax.device_put(leaf, sharding)

    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(put, arrays), static)


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
