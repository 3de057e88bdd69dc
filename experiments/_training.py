"""The training loop of the experiments: an ensemble, in waves if it does not fit into memory, chunk by chunk, with
evaluations, a progress bar, and checkpoints from which it goes on."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eqx_dynloss import ensemble
from eqx_dynloss.train import Dataset

from . import _signals
from ._checkpoint import Checkpoints
from ._plan import Members, Plan
from ._prepare import brief
from ._record import History, Record, joined
from ._run import UsageError, console
from ._waves import fitting_wave, refuse_giants

REPORTS = 20  # lines about the progress, at most, where there is no terminal for a bar


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
    try:
        return _train(members, data, splits, plan, checkpoint, checkpoint_minutes, wave)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UsageError(
            f"the memory of the devices does not suffice ({brief(error)}): take a smaller width, a smaller batch, or "
            "fewer members at a time."
        ) from error


def _train(members, data, splits, plan, checkpoint, checkpoint_minutes, wave) -> History:
    wave, plan = _settled(members, data, splits, plan, checkpoint, wave)
    starts = range(0, len(members), wave)
    records: list[Record] = []
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
                record = Record(plan, min(wave, len(members) - start))
                records.append(record)
                directory = None if checkpoint is None else checkpoint / f"wave-{number}"
                _train_wave(members.take(indices), data, splits, record, asked, report, directory, checkpoint_minutes)
                if not record.finished:
                    break
            stopped = _any_host(asked.is_set())
        stopped = stopped or asked.is_set()
    if not any(record.steps_done for record in records):
        raise KeyboardInterrupt
    return joined(records, len(members), splits, stopped)


def _train_wave(members, data, splits, record, asked, report, directory, minutes) -> None:
    """Trains one wave, from its last checkpoint if there is one, and writes into `record` what is measured."""
    plan, device_count = record.plan, jax.device_count()
    if jax.process_count() == 1:
        device_count = min(device_count, len(members))
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
            options = {"num_steps": done - record.steps_done} | plan.options()
            results = ensemble.train_chunk(
                states, members.losses, members.optimiser, data, evaluations=evaluated, **options
            )
            states, (metrics, observed, found) = results[0], ensemble.gather(results[1:])
            if i == first:
                compiled = time.perf_counter()
            else:
                record.steps_per_second = (i - first) * plan.chunk / (time.perf_counter() - compiled)
            end = {}
            if last and plan.observe_end:
                end = ensemble.gather(ensemble.observe(states, members.losses, data, plan.observe_end))
            record.add(done, states, metrics, observed or {}, found if due or last else None, end)
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
    refuse_giants(members)
    size = min(len(members), wave or fitting_wave(members, data, splits, plan))
    if path is not None and jax.process_index() == 0:
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"wave": size, "chunk": plan.chunk}), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise UsageError(
                f"cannot write to {checkpoint} ({error.strerror}): make room, then start again."
            ) from error
    return size, plan


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
