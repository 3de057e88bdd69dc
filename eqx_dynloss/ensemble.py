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
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Key, PyTree

from . import train
from .loss import BaseLoss, DynamicalLoss
from .placement import AXIS, filtered, gather, in_blocks, mesh_of, over_members, place, replicate, scatter
from .train import Dataset, Metrics, TrainState

__all__ = ["default_block_size", "gather", "init", "observe", "peak_memory", "replicate", "scatter", "train_chunk"]


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
    mesh = Mesh(devices[:num_devices], (AXIS,))

    values = {name: jnp.asarray(value) for name, value in (hyperparams or {}).items()}
    for name, value in values.items():
        if value.shape != (num_members,):
            raise ValueError(
                f"hyperparameter {name} must hold one value for each of the {num_members} members, "
                f"got shape {value.shape}."
            )

    return place(_init(make_model, optimiser, keys, values), NamedSharding(mesh, P(AXIS)))


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
    losses = place(losses, NamedSharding(mesh_of(states), P(AXIS)))
    return _observe(states, losses, data, function, mesh_of(states), _block_size(states, block_size))


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
    size = default_block_size(states.model, mesh_of(states).devices.flat[0].platform) if given is None else given
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
        losses = place(losses, NamedSharding(mesh_of(states), P(AXIS)))
        train_member = jax.tree_util.Partial(train.train_chunk, optimiser=optimiser, **options)
        return cls(losses, data, train_member, sets, due, _block_size(states, block_size), mesh_of(states))

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
    return over_members(_Chunk.member, chunk.mesh, chunk.block_size)((shared,), (states, chunk.losses))


@eqx.filter_jit
def _init(make_model, optimiser, keys, values):
    # One after another, so that a member does not depend on how many others there are.
    member = lambda key, value: train.init(make_model, optimiser, key, value)
    return filtered(lambda on_arrays: in_blocks(on_arrays, 1), member)((), (keys, values))


@eqx.filter_jit
def _observe(states, losses, data, function, mesh, block_size):
    member = lambda data, state, loss: train.observation(state, loss, data, function)
    return over_members(member, mesh, block_size)((data,), (states, losses))
