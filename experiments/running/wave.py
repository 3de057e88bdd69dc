"""A wave: members that are trained at the same time, on the devices, with their record and their checkpoints."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from eqx_dynloss import ensemble

from .checkpoint import Checkpoints
from .record import Record
from .task import Plan, Task
from .terminal import warn


class Wave(contextlib.AbstractContextManager["Wave"]):
    """Entered, it is where its last checkpoint left it, or at its beginning; left in peace, it saves where it is."""

    def __init__(self, task: Task, plan: Plan, indices: np.ndarray, folder: Path | None, minutes: float):
        """**Arguments:**

        - `task`, `indices`: which members of which task. The last one may be repeated: all waves have the same shape.
        - `plan`: that of the task, in chunks of the length of the run that is resumed.
        - `folder`, `minutes`: where the checkpoints are, if anywhere, and how often one is written.
        """
        self.task, self.plan = task, plan
        self.own = np.unique(indices)
        self.record = Record(plan, len(self.own))
        self._indices, self._folder, self._minutes = indices, folder, minutes
        self._checkpoints: Checkpoints | None = None

    def __enter__(self) -> "Wave":
        self.members = self.task.members.take(self._indices).padded()
        self.states = self.members.init()
        self.data, self._splits = ensemble.replicate((self.task.data, dict(self.task.splits)), self.states)
        if self._folder is not None:
            self._checkpoints = Checkpoints(self._folder, self._minutes, warn)
            if found := self._checkpoints.latest():
                self.states = self.record.restore(found[1], self.states)
        self._first, self._started = self.record.chunks_done, time.perf_counter()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._checkpoints is not None:
            if kind is None and self.record.steps_done:
                self._save(self._checkpoints)
            self._checkpoints.close()
        del self.states, self.members, self.data, self._splits  # the next wave needs the memory

    def next_chunk(self) -> dict[str, Any]:
        """What `ensemble.train_chunk` takes for the chunk that comes next."""
        number = self.record.chunks_done
        last = number == self.plan.num_chunks - 1
        evaluated = self.falls_to(number, self.plan.num_evaluations)
        due = {name: evaluated if name == "validation" else last for name in self._splits}
        options = self.plan.options(self.plan.num_steps - self.record.steps_done if last else self.plan.chunk)
        return options | {"evaluations": {name: (split, due[name]) for name, split in self._splits.items()}}

    def falls_to(self, chunk: int, times: int) -> bool:
        """Whether something that is done so many times, evenly spread, is done at the end of that chunk."""
        return (chunk + 1) * times // self.plan.num_chunks > chunk * times // self.plan.num_chunks

    def add(self, results: tuple, tell: Callable[[str], None]) -> None:
        """Takes what `ensemble.train_chunk` gave, observes the end, which it tells first, as that can take a while, and
        saves if it is time to."""
        self.states, (metrics, observed, evaluated) = results[0], ensemble.gather(results[1:])
        number, done = self.record.chunks_done, self.record.steps_done + metrics.loss.shape[1]
        self.elapsed = time.perf_counter() - self._started
        if number == self._first:
            self._compiled = self.elapsed
        else:
            steps_per_second = (number - self._first) * self.plan.chunk / (self.elapsed - self._compiled)
            self.record.updates_per_second = self.record.size * steps_per_second
        last = done == self.plan.num_steps
        looked = last or self.falls_to(number, self.plan.num_evaluations)
        due = looked if self.plan.observe_evaluated else last
        if due and self.plan.observe and self.plan.observe_every is None:
            if not self.plan.observe_evaluated:
                tell("trained, now observing every member")
            found = ensemble.observe(self.states, self.members.losses, self.data, self.plan.observe)
            observed = {name: values[:, None] for name, values in ensemble.gather(found).items()}
        self.record.add(done, self.states, metrics, observed, evaluated if looked else None)
        if self._checkpoints is not None and any_host(self._checkpoints.due()):
            self._save(self._checkpoints)

    def describe(self) -> str:
        """Where it is, in words."""
        text, speed = self.record.describe(), self.record.updates_per_second
        if math.isfinite(speed):
            batch = self.plan.batch_size
            text += f", {speed * batch:,.0f} images/s" if batch else f", {speed:,.0f} member-updates/s"
        return text

    def _save(self, checkpoints: Checkpoints) -> None:
        checkpoints.save(self.record.steps_done, self.record.arrays(self.states))


def any_host(flag: bool) -> bool:
    """Whether any of the hosts says so: all have to stop, and to save, after the same chunk."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag
