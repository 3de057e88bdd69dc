"""What a wave measures, as a dataset with a dimension `member`; each chunk is appended in time.

| variable | dimensions |
|---|---|
| `minibatch_loss`, `minibatch_accuracy` | member, step |
| `accuracy`, `loss` | member, split, evaluation_step; NaN where not evaluated |
| what is observed | member, observation_step, and what `Plan.observed_dims` has for it |
| `diverged_at` | member; -1 for never |
"""

import io
import math
from collections.abc import Mapping

import equinox as eqx
import jax
import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from eqx_dynloss import ensemble
from eqx_dynloss.train import Metrics, TrainState

from ..results.labelled import SPLITS
from .errors import UsageError
from .task import Plan


class Record:
    """What one wave has measured so far."""

    def __init__(self, plan: Plan, size: int):
        self.plan = plan
        self.size = size  # members, without those that only fill up the devices
        self.steps_done = 0
        self.updates_per_second = math.nan  # of all members; NaN until a second chunk, as the first one compiles
        self._diverged_at = np.full(size, -1)
        nothing = np.zeros((size, len(SPLITS), 0), np.float32)
        evaluations = self._part("evaluation_step", [], {"accuracy": nothing, "loss": nothing})
        self._parts: dict[str, list[xr.Dataset]] = {"evaluation_step": [evaluations]}  # by the dimension that grows
        if plan.keep_steps:
            by_step = {"minibatch_loss": nothing[:, 0], "minibatch_accuracy": nothing[:, 0]}
            self._parts["step"] = [self._part("step", [], by_step)]

    @property
    def chunks_done(self) -> int:
        return math.ceil(self.steps_done / self.plan.chunk)

    @property
    def finished(self) -> bool:
        return self.steps_done == self.plan.num_steps

    def add(
        self,
        done: int,
        states: TrainState,
        metrics: Metrics,
        observed: Mapping[str, ArrayLike] | None,
        evaluated: Mapping[str, Metrics] | None,
    ) -> None:
        """Adds the chunk that ends after `done` updates: all of it, or nothing if a signal comes in between."""
        new = {}
        if self.plan.keep_steps:
            steps = np.arange(self.steps_done, done)
            values = {"minibatch_loss": metrics.loss, "minibatch_accuracy": metrics.accuracy}
            new["step"] = self._part("step", steps, values)
        if observed is not None:
            every = self.plan.observe_every
            steps = np.arange(self.steps_done, done, every) if every else np.array([done])
            new["observation_step"] = self._part("observation_step", steps, observed)
        if evaluated is not None:
            values = {
                name: np.stack([getattr(evaluated[split], name) for split in SPLITS], 1)[..., None]
                for name in ("accuracy", "loss")
            }
            new["evaluation_step"] = self._part("evaluation_step", [done], values)
        diverged, step = ensemble.gather((states.diverged, states.step))
        diverged_at = np.where(diverged, step, -1)[: self.size]
        parts = self._parts | {dim: [*self._parts.get(dim, ()), part] for dim, part in new.items()}
        self._latest, self._parts, self._diverged_at, self.steps_done = metrics, parts, diverged_at, done

    def _part(self, dim: str, steps, values: Mapping[str, ArrayLike]) -> xr.Dataset:
        lead = ("member", "split", dim) if dim == "evaluation_step" else ("member", dim)
        dims = {name: (*lead, *self.plan.observed_dims.get(name, ())) for name in values}
        variables = {name: (dims[name], np.asarray(array)[: self.size]) for name, array in values.items()}
        return xr.Dataset(variables, {dim: np.asarray(steps, int)})

    @property
    def measured(self) -> xr.Dataset:
        """Everything that was added."""
        for dim, parts in self._parts.items():
            if len(parts) > 1:
                # The first one may be empty, and of another precision than what is measured.
                filled = [part for part in parts if part.sizes[dim]]
                self._parts[dim] = [
                    xr.concat(filled, dim, data_vars="minimal", join="exact", coords="minimal", compat="override")
                ]
        parts = [part for (part,) in self._parts.values()]
        own = xr.Dataset({"diverged_at": ("member", self._diverged_at)}, {"split": list(SPLITS)})
        return xr.merge([*parts, own], join="exact", compat="override").assign_attrs(steps_done=self.steps_done)

    def arrays(self, states: TrainState) -> dict[str, np.ndarray]:
        """Everything that it takes to go on, by name: see `restore`."""
        named, _ = jax.tree_util.tree_flatten_with_path(ensemble.gather(states))
        arrays = {_name(path): np.asarray(leaf)[: self.size] for path, leaf in named}
        content = bytes(self.measured.to_netcdf(engine="h5netcdf"))
        return arrays | {"measured": np.frombuffer(content, np.uint8)}

    def restore(self, arrays: Mapping[str, np.ndarray], like: TrainState) -> TrainState:
        """Takes up what was measured, and returns the states, on the devices that there are now."""
        named, structure = jax.tree_util.tree_flatten_with_path(eqx.filter(like, eqx.is_array))
        names = [_name(path) for path, _ in named]
        if {*names, "measured"} != arrays.keys():
            raise UsageError(
                "the checkpoints of this run were written by another version of eqx_dynloss or of what it uses, whose "
                "networks or optimisers are made of other arrays: go on with that version, or start another run."
            )
        with xr.open_dataset(io.BytesIO(arrays["measured"].tobytes()), engine="h5netcdf") as stored:
            measured = stored.load().drop_encoding()
        self.steps_done, self._diverged_at = int(measured.attrs["steps_done"]), measured.diverged_at.values
        for dim in ("step", "evaluation_step", "observation_step"):
            if dim in measured.dims:
                found = [name for name, variable in measured.data_vars.items() if dim in variable.dims]
                self._parts[dim] = [measured[found].drop_attrs().drop_vars("split", errors="ignore")]
        filled = np.arange(len(like.step)).clip(max=self.size - 1)
        return ensemble.scatter(jax.tree.unflatten(structure, [arrays[name][filled] for name in names]), like)

    def describe(self) -> str:
        """Means over the members that are still finite."""
        text = f"loss {_mean(self._latest.loss):.3g}, accuracy {_mean(self._latest.accuracy):.1%}"
        validation = self._parts["evaluation_step"][-1].accuracy.values[:, SPLITS.index("validation")]
        if np.isfinite(validation[:, -1:]).any():
            text += f", validation {_mean(validation[:, -1]):.1%}"
        return text


def _name(path) -> str:
    """The name of an array of the state in a checkpoint, such as `state.model.layers.0.weight`."""
    return "state." + jax.tree_util.keystr(path, simple=True, separator=".")


def _mean(values) -> float:
    finite = np.asarray(values)[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
