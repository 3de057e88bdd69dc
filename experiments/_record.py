"""What a training run measures: the record of one wave while it is trained, and the history of all members."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from eqx_dynloss import ensemble
from eqx_dynloss.train import Dataset, Metrics, TrainState

from ._plan import Plan
from ._results import SPLITS


@dataclasses.dataclass
class History:
    """What a run measured: numbers of every update, and of every evaluation."""

    minibatch: Metrics  # [members, steps]; no steps if they were not kept
    evaluation_steps: list[int]  # updates made before each evaluation
    evaluations: dict[str, Metrics]  # by split, [members, evaluations]; NaN where not evaluated
    observations: dict[str, np.ndarray]  # by name, [members, observations]
    end: dict[str, np.ndarray]  # by name, [members]: what was observed after the last update; empty if not finished
    diverged_at: np.ndarray  # [members], -1 for never
    steps_done: int  # by the members that have done most
    progress: float  # updates made by a member in the mean
    finished: bool
    interrupted: bool  # Ctrl-C was pressed or the process told to end, be it in the last chunk
    steps_per_second: float  # of all members of a wave together; NaN if there was but one chunk, which compiles

    def arrays(self) -> dict[str, Any]:
        """As `_results.assemble` takes them."""
        by_step = {"minibatch_loss": self.minibatch.loss, "minibatch_accuracy": self.minibatch.accuracy}
        return {
            "evaluation_steps": self.evaluation_steps,
            "accuracy": np.stack([self.evaluations[split].accuracy for split in SPLITS], 1),
            "loss": np.stack([self.evaluations[split].loss for split in SPLITS], 1),
            "diverged_at": self.diverged_at,
            **(by_step if self.minibatch.loss.shape[1] else {}),
        }


class Record:
    """What one wave has measured so far: lists of arrays by name, `[members, …]`, each with the time last."""

    def __init__(self, plan: Plan, size: int):
        self.plan = plan
        self.size = size  # members, without those that only fill up the devices
        self.steps_done = 0
        self.diverged_at = np.full(size, -1)
        self.steps_per_second = math.nan
        self._parts: dict[str, list[np.ndarray]] = {}

    @property
    def chunks_done(self) -> int:
        return math.ceil(self.steps_done / self.plan.chunk)

    @property
    def finished(self) -> bool:
        return self.steps_done == self.plan.num_steps

    def add(self, done, states, metrics, observed, evaluated, end) -> None:
        """Adds a chunk: all of it, or nothing if a signal comes in between."""
        new = {"minibatch loss": metrics.loss, "minibatch accuracy": metrics.accuracy} if self.plan.keep_steps else {}
        new |= {f"observed {name}": values for name, values in observed.items()}
        for split, found in (evaluated or {}).items():
            new |= {f"loss {split}": found.loss[:, None], f"accuracy {split}": found.accuracy[:, None]}
        new |= {f"end {name}": values for name, values in end.items()}
        new = {name: np.asarray(values)[: self.size] for name, values in new.items()}
        if evaluated is not None:
            new["evaluation steps"] = np.array([done])
        diverged, step = ensemble.gather((states.diverged, states.step))
        diverged_at = np.where(diverged, step, -1)[: self.size]
        parts = self._parts | {name: [*self._parts.get(name, ()), values] for name, values in new.items()}
        self._latest, self._parts, self.diverged_at, self.steps_done = metrics, parts, diverged_at, done

    def get(self, name: str, otherwise=None) -> np.ndarray:
        """Everything that was added under a name."""
        parts = self._parts.get(name)
        if parts is None:
            return np.zeros((self.size, 0), np.float32) if otherwise is None else otherwise
        if len(parts) > 1:
            self._parts[name] = parts = [np.concatenate(parts, -1)]
        return parts[0]

    def names(self, prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in self._parts if name.startswith(prefix)]

    def arrays(self, states: TrainState) -> dict[str, np.ndarray]:
        """Everything that it takes to go on: see `restore`."""
        leaves = jax.tree.leaves(ensemble.gather(states))
        arrays = {f"state {i}": np.asarray(leaf)[: self.size] for i, leaf in enumerate(leaves)}
        arrays |= {f"record {name}": self.get(name) for name in self._parts}
        return arrays | {"steps done": np.array(self.steps_done), "diverged at": self.diverged_at}

    def restore(self, arrays: Mapping[str, np.ndarray], like: TrainState) -> TrainState:
        """Takes up what was measured, and returns the states, on the devices that there are now."""
        self.steps_done, self.diverged_at = int(arrays["steps done"]), arrays["diverged at"]
        saved = {name.removeprefix("record "): a for name, a in arrays.items() if name.startswith("record ")}
        self._parts = {name: [array] for name, array in saved.items()}
        structure = jax.tree.structure(eqx.filter(like, eqx.is_array))
        filled = np.arange(len(like.step)).clip(max=self.size - 1)
        leaves = [arrays[f"state {i}"][filled] for i in range(structure.num_leaves)]
        return ensemble.scatter(jax.tree.unflatten(structure, leaves), like)

    def describe(self) -> str:
        """Means over the members that are still finite."""
        text = f"loss {_mean(self._latest.loss):.3g}, accuracy {_mean(self._latest.accuracy):.1%}"
        validation = self.get("accuracy validation")
        if np.isfinite(validation[:, -1:]).any():
            text += f", validation {_mean(validation[:, -1]):.1%}"
        return text


def joined(records: list[Record], num_members: int, splits: Mapping[str, Dataset], stopped: bool) -> History:
    """The history of all members; what an interrupted run never came to is NaN, or -1 for a whole number."""

    def whole(name: str) -> np.ndarray:
        parts = [record.get(name) for record in records]
        shape = (num_members, *np.max([part.shape[1:] for part in parts], 0))
        dtype = next((part.dtype for part in parts if part.size), parts[0].dtype)
        joined = np.full(shape, np.nan if np.issubdtype(dtype, np.inexact) else -1, dtype)
        start = 0
        for record, part in zip(records, parts, strict=True):
            joined[start : start + record.size, *map(slice, part.shape[1:])] = part
            start += record.size
        return joined

    finished = all(record.finished for record in records) and sum(record.size for record in records) == num_members
    diverged_at = np.concatenate([record.diverged_at for record in records])
    evaluation_steps = max((record.get("evaluation steps", np.zeros(0, int)) for record in records), key=len)
    speeds = [record.steps_per_second * record.size for record in records]
    return History(
        minibatch=Metrics(whole("minibatch loss"), whole("minibatch accuracy")),
        evaluation_steps=evaluation_steps.tolist(),
        evaluations={split: Metrics(whole(f"loss {split}"), whole(f"accuracy {split}")) for split in splits},
        observations={name: whole(f"observed {name}") for name in records[0].names("observed ")},
        end={name: whole(f"end {name}") for name in records[0].names("end ")} if finished else {},
        diverged_at=np.pad(diverged_at, (0, num_members - len(diverged_at)), constant_values=-1),
        steps_done=max(record.steps_done for record in records),
        progress=sum(record.steps_done * record.size for record in records) / num_members,
        finished=finished,
        interrupted=stopped,
        steps_per_second=float(np.nanmean(speeds)) if np.isfinite(speeds).any() else math.nan,
    )


def _mean(values) -> float:
    finite = np.asarray(values)[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
