"""How many members fit into memory at a time: the size of a wave."""

import functools as ft
import math
import os

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from eqx_dynloss import ensemble
from eqx_dynloss.train import TrainState
from eqx_dynloss.train import init as init_state

from .errors import UsageError
from .members import Members
from .task import Task

_MEMORY_SHARE = 0.8  # of what is free, for a wave


def fitting_wave(task: Task) -> int:
    """How many members of a task to train at a time: all, or equal parts that the devices have memory for.

    From what the compiler says that one block of members and two need; the rest is a straight line.
    """
    members, plan, device_count = task.members, task.plan, jax.device_count()
    most = -(-len(members) // device_count)  # a device
    states = _shapes(members)
    block = ensemble.default_block_size(states.model, jax.devices()[0].platform)
    free = _free_memory()
    if block < most and 4 * _bytes(states) * most < free / 10:  # one block after another: only the states add up
        return len(members)
    block = block if block < most else 1

    def needed(per_device: int) -> int:
        some = members.take(np.arange(per_device * device_count).clip(max=len(members) - 1))
        states = some.init()
        placed, sets = ensemble.replicate((task.data, dict(task.splits)), states)
        options = plan.options(min(plan.chunk, plan.num_steps))
        evaluations = {name: (split, True) for name, split in sets.items()}
        return ensemble.peak_memory(states, some.losses, some.optimiser, placed, evaluations=evaluations, **options)

    low = needed(block)
    _refuse_beyond(low)
    if most <= 2 * block:
        return len(members)
    high = needed(2 * block)
    per_member = max((high - low) / block, 1)
    fit = max(1, int((free - (low - block * per_member)) / per_member))
    if fit >= most:
        return len(members)
    return min(len(members), -(-most // math.ceil(most / fit)) * device_count)


def refuse_giants(members: Members) -> None:
    """Raises a `UsageError` for a network that no device has the memory to train."""
    states = _shapes(members)
    _refuse_beyond(_bytes(states) + _bytes(states.model))  # its gradient


def _refuse_beyond(needed: float) -> None:
    stats = jax.local_devices()[0].memory_stats() or {}
    there = stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UsageError(
            f"training one network of this size takes {needed / 1e9:,.1f} GB, and the memory has "
            f"{there / 1e9:,.1f} GB: take a smaller width, or a smaller batch."
        )


def _shapes(members: Members) -> TrainState:
    """The state of one member, with shapes in the place of arrays."""
    init = ft.partial(init_state, members.make_model, members.optimiser)
    return eqx.filter_eval_shape(eqx.filter_vmap(init), jr.split(jr.key(0), 1))


def _bytes(tree: PyTree) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape")]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _free_memory() -> float:
    """Bytes that a wave may use on one device: the least of all hosts."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    if jax.process_count() > 1:
        free = float(np.min(multihost_utils.process_allgather(np.float32(free))))
    return _MEMORY_SHARE * free
