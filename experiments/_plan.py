"""What the experiments train, and how: the members of an ensemble, and the plan of their training."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.train import Dataset, TrainState

Observe = Callable[[TrainState, DynamicalLoss, Dataset], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Members:
    """The members of an ensemble: what all have in common, and what each has of its own, `[members]`."""

    make_model: Callable[[Any], Any]
    optimiser: optax.GradientTransformation
    losses: DynamicalLoss
    seeds: np.ndarray
    hyperparams: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, indices: np.ndarray) -> "Members":
        """Those members, in that order; one may be taken several times."""
        pick = lambda leaf: leaf[indices] if eqx.is_array(leaf) else leaf
        own = {name: np.asarray(values)[indices] for name, values in self.hyperparams.items()}
        return dataclasses.replace(
            self, losses=jax.tree.map(pick, self.losses), seeds=self.seeds[indices], hyperparams=own
        )

    def init(self) -> TrainState:
        """Their states before the first update. Equal seeds have equal weights and see examples in the same order."""
        keys = jax.vmap(lambda seed: jr.fold_in(jr.key(0), seed))(jnp.asarray(self.seeds))
        values = {name: jnp.asarray(value) for name, value in self.hyperparams.items()}
        return ensemble.init(self.make_model, self.optimiser, keys, values)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an ensemble is trained.

    The split "validation" is evaluated `num_evaluations` times, evenly spread, and every other split once, at the end.
    """

    num_steps: int
    chunk: int  # updates of one call of the compiled program
    num_evaluations: int
    batch_size: int | None = None
    microbatch_size: int | None = None
    observe: Observe | None = None
    observe_every: int = 1
    observe_end: Observe | None = None  # of the state after the last update
    keep_steps: bool = True  # the numbers of every update; they need memory: members × updates

    @property
    def num_chunks(self) -> int:
        return math.ceil(self.num_steps / self.chunk)

    def options(self) -> dict[str, Any]:
        """What `ensemble.train_chunk` takes besides the number of steps."""
        return {
            "batch_size": self.batch_size,
            "microbatch_size": self.microbatch_size,
            "observe": self.observe,
            "observe_every": self.observe_every,
        }
