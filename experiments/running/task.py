"""What is trained, and how: a task is an ensemble that one compiled program trains."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.train import Dataset, TrainState

from .devices import devices
from .members import Members

Observe = Callable[[TrainState, DynamicalLoss, Dataset], dict[str, jax.Array]]


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
    # The dimensions of what is observed and no single number, by its name.
    observed_dims: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    observe_every: int | None = None  # before every so many updates; None: only after the last one, or
    observe_evaluated: bool = False  # after every evaluation
    keep_steps: bool = True  # the numbers of every update; they need memory: members × updates

    @property
    def num_chunks(self) -> int:
        return math.ceil(self.num_steps / self.chunk)

    def options(self, num_steps: int) -> dict[str, Any]:
        """What `ensemble.train_chunk` takes for a chunk of so many updates."""
        options: dict[str, Any] = {"batch_size": self.batch_size, "microbatch_size": self.microbatch_size}
        if self.observe_every is not None:
            options |= {"observe": self.observe, "observe_every": self.observe_every}
        return {"num_steps": num_steps} | options


@dataclasses.dataclass(frozen=True)
class Task:
    """An ensemble, what it is trained and evaluated on, and the plan of its training."""

    name: str  # of the folder of its checkpoints; "" where there is one task
    members: Members
    data: Dataset
    splits: Mapping[str, Dataset]  # what is evaluated
    plan: Plan


def announcement(tasks: Sequence[Task], work: str) -> str:
    """What is going to happen: the devices, the members, and the work of each."""
    members = [task.members.coordinates for task in tasks]
    count, seeds = sum(len(task.members) for task in tasks), len(set(members[0]["seed"].tolist()))
    pairs = zip(members[0]["amplitude"].tolist(), np.nan_to_num(members[0]["period"]).tolist(), strict=True)
    settings = count // (seeds * (losses := len(set(pairs))))
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return (
        f"{devices()}{hosts} | {count} members = {seeds} seeds x {losses} losses"
        f"{f' x {settings} settings' if settings > 1 else ''} | {work}"
    )


def chunk_length(num_steps: int, target: float) -> int:
    """The divisor of `num_steps` nearest to `target` (in ratio): chunks of equal length are one compilation.

    If it is more than four times off, as for a prime number of steps, the target: a shorter last chunk is another.
    """
    small = [n for n in range(1, math.isqrt(num_steps) + 1) if num_steps % n == 0]
    divisors = [*small, *(num_steps // n for n in small)]
    target = min(max(round(target), 1), num_steps)
    nearest = min(divisors, key=lambda n: abs(np.log(n / target)))
    return nearest if target / 4 <= nearest <= 4 * target else target
