"""How many members fit into memory at a time: the size of a wave."""

import functools as ft
import math
import os
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jax.experimental import multihost_utils

from eqx_dynloss import ensemble
from eqx_dynloss.train import Dataset
from eqx_dynloss.train import init as init_state

from ._plan import Members, Plan

_MEMORY_SHARE = 0.8  # of what is free, for a wave


def fitting_wave(members: Members, data: Dataset, splits: Mapping[str, Dataset], plan: Plan) -> int:
    """How many members to train at a time: all, or equal parts that the devices have memory for.

    From what the compiler says that one block of members and two need; the rest is a straight line.
    """
    device_count = jax.device_count()
    most = -(-len(members) // device_count)  # a device
    init = ft.partial(init_state, members.make_model, members.optimiser)
    states = eqx.filter_eval_shape(eqx.filter_vmap(init), jr.split(jr.key(0), 1))
    block = ensemble.default_block_size(states.model, jax.devices()[0].platform)
    free = _free_memory()
    size = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(states) if hasattr(leaf, "shape")
    )
    if block < most and 4 * size * most < free / 10:  # one block after another: only the states add up
        return len(members)
    block = block if block < most else 1
    if most <= 2 * block:
        return len(members)

    def needed(per_device: int) -> int:
        some = members.take(np.arange(per_device * device_count).clip(max=len(members) - 1))
        states = some.init()
        placed, sets = ensemble.replicate((data, dict(splits)), states)
        options = {"num_steps": min(plan.chunk, plan.num_steps)} | plan.options()
        evaluations = {name: (split, True) for name, split in sets.items()}
        return ensemble.peak_memory(states, some.losses, some.optimiser, placed, evaluations=evaluations, **options)

    low, high = needed(block), needed(2 * block)
    per_member = max((high - low) / block, 1)
    fit = max(1, int((free - (low - block * per_member)) / per_member))
    if fit >= most:
        return len(members)
    return min(len(members), -(-most // math.ceil(most / fit)) * device_count)


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
