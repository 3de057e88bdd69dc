"""The program of a chunk of training, by the number of members: what it costs to compile, and how much memory it needs.

Members are mapped over in blocks, so that there is one program of one shape, whatever their number.
"""

import time
from typing import Any

import jax
import numpy as np
import optax
import pytest

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights
from experiments.problems.cifar import cpu_microbatch_size

from .report import Row
from .test_cifar import minibatch

pytestmark = pytest.mark.usefixtures("quick_compilation")

SUBJECT = "The program of a chunk of training: Myrtle5-64, minibatch 512, one device; memory beyond the members' states"


def test_one_program_for_any_number_of_members(record):
    width, batch, sizes, rounds = (64, 512, (2, 64), 2) if record.full else (4, 16, (2, 16), 1)
    data, optimiser = minibatch(batch, 32), optax.sgd(0.01, 0.9, nesterov=True)
    make_model = lambda key: Myrtle(width, key=key)

    def arguments(members: int) -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), members)
        losses = DynamicalLoss(OscillatingWeights(10, np.full(members, 10.0), 10))
        states = ensemble.init(make_model, optimiser, keys, devices=jax.devices()[:1])
        return states, losses, optimiser, ensemble.replicate(data, states)

    def compile_for(states, *rest) -> tuple[float, int]:
        """Seconds of tracing and compilation, and bytes at the peak that are not the states of the members."""
        own = sum(leaf.nbytes for leaf in jax.tree.leaves(states) if isinstance(leaf, jax.Array))
        jax.clear_caches()
        start = time.perf_counter()
        options = {"num_steps": 4, "batch_size": batch, "microbatch_size": cpu_microbatch_size(batch, 32 * 32)}
        peak = ensemble.peak_memory(states, *rest, **options)
        return time.perf_counter() - start, peak - own

    def find_out() -> list[Row]:
        problems = [arguments(members) for members in sizes]
        found = [[compile_for(*problem) for problem in problems] for _ in range(rounds)]
        seconds = np.array([[seconds for seconds, _ in row] for row in found])
        low, middle, high = np.quantile(seconds / seconds[:, :1], (0.25, 0.5, 0.75), 0)
        return [
            Row(
                SUBJECT,
                f"{members} members",
                "trace and compile",
                rounds=rounds,
                seconds=float(np.median(seconds[:, i])),
                ratio=(float(low[i]), float(middle[i]), float(high[i])),
                peak_bytes=found[0][i][1],
            )
            for i, members in enumerate(sizes)
        ]

    first, *others = record(find_out)
    assert all(row.peak_bytes <= 1.2 * first.peak_bytes for row in others)
