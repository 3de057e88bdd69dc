"""The members of an ensemble, who carry their coordinates: nothing depends on the order that they are in."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import xarray as xr
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Float

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.train import TrainState


@dataclasses.dataclass(frozen=True)
class Members:
    """What all members of an ensemble have in common, and what each has of its own.

    The `coordinates`, `[members]` by name, are those of `results.labelled.combinations`: `seed`, `amplitude`, `period`
    and whatever else is varied. The `hyperparams`, likewise, are handed to the optimiser, which has to inject them.
    """

    make_model: Callable[[Any], Any]
    optimiser: optax.GradientTransformation
    losses: DynamicalLoss  # with a leading axis of members
    coordinates: Mapping[str, np.ndarray]
    hyperparams: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    models: Any = None  # with a leading axis of members: what they start from, where others have trained it before

    def __len__(self) -> int:
        return len(self.coordinates["seed"])

    def take(self, indices: np.ndarray) -> "Members":
        """Those members, in that order; one may be taken several times."""
        pick = lambda leaf: leaf[indices] if eqx.is_array(leaf) else leaf
        arrays = ("losses", "models", "coordinates", "hyperparams")
        return dataclasses.replace(self, **{name: jax.tree.map(pick, getattr(self, name)) for name in arrays})

    def padded(self) -> "Members":
        """These members, and the last one again until they can be spread evenly over the devices."""
        devices = jax.device_count()
        if jax.process_count() == 1:
            devices = min(devices, len(self))
        return self.take(np.arange(-(-len(self) // devices) * devices).clip(max=len(self) - 1))

    def with_parameters(self, flat: Float[ArrayLike, "members parameters"]) -> "Members":
        """The same members, who start from these parameters, in the order of `jax.flatten_util.ravel_pytree`."""
        _, unravel = ravel_pytree(self.make_model(jr.key(0)))
        return dataclasses.replace(self, models=jax.vmap(unravel)(jnp.asarray(flat)))

    def init(self) -> TrainState:
        """Their states before the first update. Equal seeds have equal weights and see examples in the same order."""
        keys = jax.vmap(lambda seed: jr.fold_in(jr.key(0), seed))(jnp.asarray(self.coordinates["seed"]))
        states = ensemble.init(self.make_model, self.optimiser, keys, self.hyperparams)
        if self.models is None:
            return states
        trained = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), self.models, states.model)
        return eqx.tree_at(lambda states: states.model, states, trained)

    def class_weights(self, num_steps: int) -> xr.Dataset:
        """The class weights of every update, which do not depend on the seed: of the members with the first one."""
        seeds = self.coordinates["seed"]
        first = self.take(np.flatnonzero(seeds == seeds[0]))
        weights = jax.vmap(lambda schedule: jax.vmap(schedule)(jnp.arange(num_steps)))(first.losses.schedule)
        return xr.Dataset(
            {"class_weights": (("member", "step", "class"), np.asarray(weights))},
            {name: ("member", values) for name, values in first.coordinates.items() if name != "seed"}
            | {"step": np.arange(num_steps)},
        )
