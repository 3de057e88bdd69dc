"""Where the members of an ensemble are: on which devices, how they get there and back, how functions map over them.

Arrays with a leading axis of members are spread over a mesh of devices along that axis; what members share is on all of
them. The functions for users are those of `eqx_dynloss.ensemble`.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from .train import TrainState

_T = TypeVar("_T")
AXIS = "members"


def replicate(tree: _T, states: TrainState) -> _T:
    """Copies data to every device that the states are on. Do it once, with each data set, before training."""
    return place(tree, NamedSharding(mesh_of(states), P()))


def gather(tree: PyTree) -> PyTree:
    """Brings arrays with a member axis from all devices, of all hosts, to every host, as NumPy arrays.

    With several hosts all of them have to call it. Random keys become the numbers that they are made of.
    """

    def fetch(leaf):
        leaf = _numbers(leaf)
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
        there = _numbers(leaf)
        if (value.shape, value.dtype) != (there.shape, there.dtype):
            raise ValueError(f"values {value.dtype}{value.shape} do not fit into states {there.dtype}{there.shape}.")
        return jr.wrap_key_data(value, impl=jr.key_impl(leaf)) if _is_key(leaf) else value

    return place(eqx.combine(jax.tree.map(restore, arrays, values), static), NamedSharding(mesh_of(like), P(AXIS)))


def mesh_of(states: TrainState) -> Mesh:
    sharding = states.step.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        raise ValueError("the states must come from eqx_dynloss.ensemble.init, which spreads them over the devices.")
    return sharding.mesh


def over_members(function, mesh: Mesh, block_size: int):
    """Calls `function(*shared, *own)` for every member, where `own` has a leading axis of members, on the device that
    it is on: there is nothing to communicate."""
    specs: Any = {"in_specs": (P(), P(AXIS)), "out_specs": P(AXIS), "check_vma": False}
    return filtered(lambda on_arrays: jax.shard_map(in_blocks(on_arrays, block_size), mesh=mesh, **specs), function)


def in_blocks(on_arrays, block_size: int):
    """Maps a function of arrays over the leading axis of `own`, `block_size` at a time."""

    def mapped(shared, own):
        size = min(block_size, len(jax.tree.leaves(own)[0]))
        return lax.map(lambda one: on_arrays(shared, one), own, batch_size=size if size > 1 else None)

    return mapped


def filtered(transform, function):
    """Applies a transformation of functions of arrays to a function of PyTrees that also hold other things."""

    def transformed(shared, own):
        arrays, static = eqx.partition((shared, own), eqx.is_array)
        rest: Any = None

        def on_arrays(*arrays):
            nonlocal rest
            shared, own = eqx.combine(arrays, static)
            out, rest = eqx.partition(function(*shared, *own), eqx.is_array)
            return out

        return eqx.combine(transform(on_arrays)(*arrays), rest)

    return transformed


def place(tree: _T, sharding: NamedSharding) -> _T:
    def put(leaf):
        if _is_key(leaf):  # JAX does not put keys on the devices of other hosts, but numbers
            return jr.wrap_key_data(jax.device_put(jr.key_data(leaf), sharding), impl=jr.key_impl(leaf))
        return jax.device_put(leaf, sharding)

    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(put, arrays), static)


def _numbers(leaf: Array) -> Array:
    """What a random key is made of; other arrays as they are."""
    return jr.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
