"""The training loop of the experiments: an ensemble, in waves if it does not fit into memory, chunk by chunk, with
evaluations, a progress bar, and checkpoints from which it goes on."""

import contextlib
import dataclasses
import functools as ft
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.experimental import multihost_utils
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.train import Dataset, Metrics, TrainState
from eqx_dynloss.train import init as init_state

from . import _signals
from ._checkpoint import Checkpoints
from ._results import SPLITS
from ._run import UsageError, console

REPORTS = 20  # lines about the progress, at most, where there is no terminal for a bar
_MEMORY_SHARE = 0.8  # of what is free, for a wave
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


def train(
    members: Members,
    data: Dataset,
    splits: Mapping[str, Dataset],
    plan: Plan,
    *,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = math.inf,
    wave: int | None = None,
) -> History:
    """Trains an ensemble chunk by chunk with a progress bar, and evaluates it on the way.

    On Ctrl-C or SIGTERM the training stops after the running chunk, and on a second one at once; what it measured so
    far is returned. Where `checkpoint` is a directory that an interrupted run of the same arguments has left, it goes
    on from there, and ends with the same numbers.

    **Arguments:**

    - `members`, `plan`: who, and how.
    - `data`: the training set.
    - `splits`: by name, what is evaluated.
    - `checkpoint`, `checkpoint_minutes`: where the checkpoints are, and how often one is written.
    - `wave`: how many members are trained at a time; by default as many as fit into the memory of the devices.

    **Raises:** `KeyboardInterrupt` if it was stopped before there was anything to return.
    """
    wave, plan = _settled(members, data, splits, plan, checkpoint, wave)
    starts = range(0, len(members), wave)
    records: list[_Record] = []
    stopped = False
    with _progress() as progress:
        bar = progress.add_task("compiling", total=plan.num_steps * len(starts))
        stopping = lambda name: progress.update(bar, description=f"{name}: stopping after this chunk (again: at once)")
        with contextlib.suppress(KeyboardInterrupt), _signals.first_signal(stopping) as asked:
            for number, start in enumerate(starts):
                indices = np.arange(start, start + wave).clip(max=len(members) - 1)  # all waves have the same shape
                told = f"wave {number + 1} of {len(starts)}, " if len(starts) > 1 else ""
                report = lambda done, text, before=number * plan.num_steps, told=told: progress.update(
                    bar, completed=before + done, description=told + text
                )
                record = _Record(plan, min(wave, len(members) - start))
                records.append(record)
                directory = None if checkpoint is None else checkpoint / f"wave-{number}"
                _train_wave(members.take(indices), data, splits, record, asked, report, directory, checkpoint_minutes)
                if not record.finished:
                    break
        stopped = asked.is_set()
    if not any(record.steps_done for record in records):
        raise KeyboardInterrupt
    return _joined(records, len(members), splits, stopped)


def _train_wave(members, data, splits, record, asked, report, directory, minutes) -> None:
    """Trains one wave, from its last checkpoint if there is one, and writes into `record` what is measured."""
    plan, device_count = record.plan, jax.device_count()
    padded = np.arange(-(-len(members) // device_count) * device_count).clip(max=len(members) - 1)
    members = members.take(padded)
    states = members.init()
    data, splits = ensemble.replicate((data, dict(splits)), states)
    checkpoints = None
    if directory is not None:
        checkpoints = Checkpoints(directory, minutes, _warn)
        if found := checkpoints.latest():
            states = record.restore(found[1], states)
            report(record.steps_done, f"resumed at update {record.steps_done:,}")

    def save():
        if checkpoints is not None:
            checkpoints.save(record.steps_done, record.arrays(states))

    first = record.chunks_done
    started = compiled = time.perf_counter()
    unit, per_step = ("images", record.size * plan.batch_size) if plan.batch_size else ("member-updates", record.size)
    try:
        for i in range(first, plan.num_chunks):
            if _any_host(asked.is_set()):
                break
            last = i == plan.num_chunks - 1
            done = plan.num_steps if last else (i + 1) * plan.chunk
            share = lambda count, i=i: (i + 1) * count // plan.num_chunks > i * count // plan.num_chunks
            due = share(plan.num_evaluations)
            evaluated = {name: (split, due if name == "validation" else last) for name, split in splits.items()}
            options = {"num_steps": done - record.steps_done} | _options(plan)
            results = ensemble.train_chunk(
                states, members.losses, members.optimiser, data, evaluations=evaluated, **options
            )
            states, (metrics, observed, found) = results[0], ensemble.gather(results[1:])
            record.add(done, states, metrics, observed or {}, found if due or last else None)
            if last and plan.observe_end:
                record.end(ensemble.gather(ensemble.observe(states, members.losses, data, plan.observe_end)))
            if i == first:
                compiled = time.perf_counter()
            else:
                record.steps_per_second = (i - first) * plan.chunk / (time.perf_counter() - compiled)
            text = record.describe()
            if not math.isnan(record.steps_per_second):
                text += f", {per_step * record.steps_per_second:,.0f} {unit}/s"
            report(done, text)
            if due and share(REPORTS) and not console.is_terminal:
                elapsed = time.perf_counter() - started
                console.print(f"update {done:,} of {plan.num_steps:,} ({elapsed:,.0f} s): {text}")
            if checkpoints is not None and _any_host(checkpoints.due()):
                save()
        if record.steps_done:
            save()
    finally:
        if checkpoints is not None:
            checkpoints.close()


def _options(plan: Plan) -> dict[str, Any]:
    return {
        "batch_size": plan.batch_size,
        "microbatch_size": plan.microbatch_size,
        "observe": plan.observe,
        "observe_every": plan.observe_every,
    }


class _Record:
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

    def add(self, done, states, metrics, observed, evaluated) -> None:
        """Adds a chunk."""
        self.steps_done = done
        if self.plan.keep_steps:
            self._append("minibatch loss", metrics.loss)
            self._append("minibatch accuracy", metrics.accuracy)
        self._latest = metrics
        for name, values in observed.items():
            self._append(f"observed {name}", values)
        if evaluated is not None:
            self._append("evaluation steps", np.array([done]))
            for split, found in evaluated.items():
                self._append(f"loss {split}", found.loss[:, None])
                self._append(f"accuracy {split}", found.accuracy[:, None])
        diverged, step = ensemble.gather((states.diverged, states.step))
        self.diverged_at = np.where(diverged, step, -1)[: self.size]

    def end(self, observed) -> None:
        for name, values in observed.items():
            self._append(f"end {name}", values)

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
        text = f"loss {_mean(self._latest.loss):.3f}, accuracy {_mean(self._latest.accuracy):.1%}"
        validation = self.get("accuracy validation")
        if np.isfinite(validation[:, -1:]).any():
            text += f", validation {_mean(validation[:, -1]):.1%}"
        return text

    def _append(self, name: str, values) -> None:
        values = np.asarray(values)
        self._parts.setdefault(name, []).append(values if name == "evaluation steps" else values[: self.size])


def _joined(records: list[_Record], num_members: int, splits: Mapping[str, Dataset], stopped: bool) -> History:
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
        finished=finished,
        interrupted=stopped,
        steps_per_second=float(np.nanmean(speeds)) if np.isfinite(speeds).any() else math.nan,
    )


def _settled(members, data, splits, plan, checkpoint, wave) -> tuple[int, Plan]:
    """The size of a wave and the plan: those of the run that is resumed, whatever devices there are now.

    Another length of chunks would evaluate at other updates, and another size of waves fit no checkpoint.
    """
    path = None if checkpoint is None else checkpoint / "plan.json"
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if wave is not None and min(wave, len(members)) != found["wave"]:
            raise UsageError(f"this run has waves of {found['wave']} members, not {wave}: leave --wave out.")
        return found["wave"], dataclasses.replace(plan, chunk=found["chunk"])
    size = min(len(members), wave or _fitting_wave(members, data, splits, plan))
    if path is not None and jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"wave": size, "chunk": plan.chunk}), encoding="utf-8")
    return size, plan


def _fitting_wave(members: Members, data: Dataset, splits: Mapping[str, Dataset], plan: Plan) -> int:
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
        options = {"num_steps": min(plan.chunk, plan.num_steps)} | _options(plan)
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


def _any_host(flag: bool) -> bool:
    """Whether any of the hosts says so: all have to stop, and to save, after the same chunk."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag


def _warn(text: str) -> None:
    console.print(text, style="bold red")


def _progress() -> Progress:
    columns = (
        BarColumn(12),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or console.quiet)


def _mean(values) -> float:
    finite = np.asarray(values)[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
