"""The training loop of the experiments: ensembles, in waves if they do not fit into memory, chunk by chunk, with
evaluations, a progress bar, and checkpoints from which it goes on."""

import contextlib
import dataclasses
import functools as ft
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from rich.progress import Progress

from eqx_dynloss import ensemble

from ..results.files import write_whole
from ..results.labelled import missing_values
from . import signals
from .errors import UsageError, brief
from .memory import fitting_wave, refuse_giants
from .task import Task
from .terminal import console, duration, progress_bar
from .wave import Wave, any_host

LINES = 20  # about the progress, at most, where there is no terminal for a bar


def train(
    tasks: Sequence[Task],
    *,
    checkpoint: Path | None = None,
    checkpoint_minutes: float = math.inf,
    wave: int | None = None,
) -> xr.Dataset:
    """Trains ensembles, one after another, chunk by chunk with a progress bar, and evaluates them on the way.

    On Ctrl-C or SIGTERM the training stops after the running chunk, and on a second one at once; what it measured so
    far is returned. Where `checkpoint` is a directory that an interrupted run of the same arguments has left, it goes
    on from there, and ends with the same numbers.

    **Arguments:**

    - `tasks`: whom to train, and how.
    - `checkpoint`, `checkpoint_minutes`: where the checkpoints are, and how often one is written.
    - `wave`: how many members are trained at a time; by default as many as fit into the memory of the devices.

    **Returns:** what the members have measured, as `record` describes it, with their coordinates; and, as attributes,
    whether all is `finished`, the `steps_done` by a member in the mean, summed over the tasks, and the
    `member_updates_per_second` without compilation (NaN where nothing but the first chunk was trained).

    **Raises:** `KeyboardInterrupt` if it was stopped before there was anything to return.
    """
    with _out_of_memory_in_words(), progress_bar() as bar:
        waves = [one for task in tasks for one in _waves(task, checkpoint, checkpoint_minutes, wave)]
        total = sum(one.plan.num_steps for one in waves)
        bar_id = bar.add_task("compiling", total=total)
        stopping = lambda name: bar.update(bar_id, description=f"{name}: stopping after this chunk (again: at once)")
        with contextlib.suppress(KeyboardInterrupt), signals.first_signal(stopping) as asked:
            for one in waves:
                if any_host(asked.is_set()):
                    break
                with one:
                    resumed = f"resumed at update {done:,}" if (done := one.record.steps_done) else "compiling"
                    bar.update(bar_id, description=_place(waves, one) + resumed)
                    while not one.record.finished and not any_host(asked.is_set()):
                        one.add(
                            ensemble.train_chunk(
                                one.states, one.members.losses, one.members.optimiser, one.data, **one.next_chunk()
                            ),
                            ft.partial(_tell, bar, waves, one),
                        )
                        _show(bar, waves, one)
                if not one.record.finished:
                    break
    if not any(one.record.steps_done for one in waves):
        raise KeyboardInterrupt
    return _joined(waves)


def _waves(task: Task, checkpoint: Path | None, minutes: float, asked: int | None) -> list[Wave]:
    """The waves of a task, in the size and with the length of chunks of the run that is resumed, whatever devices there
    are now: another length would evaluate at other updates, and another size fit no checkpoint."""
    members, plan = task.members, task.plan
    folder = None if checkpoint is None else checkpoint / task.name
    path = None if folder is None else folder / "plan.json"
    if path is not None and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        size, plan = found["wave"], dataclasses.replace(plan, chunk=found["chunk"])
        if asked is not None and min(asked, len(members)) != size:
            raise UsageError(f"this run has waves of {size} members, not {asked}: leave --wave out.")
    else:
        refuse_giants(members)
        size = min(len(members), asked or fitting_wave(task))
        if path is not None and jax.process_index() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps({"wave": size, "chunk": plan.chunk}).encode())
            except OSError as error:
                raise UsageError(
                    f"cannot write to {folder} ({error.strerror}): make room, then start again."
                ) from error
    indices = [np.arange(start, start + size).clip(max=len(members) - 1) for start in range(0, len(members), size)]
    folders = [None if folder is None else folder / f"wave-{number}" for number in range(len(indices))]
    return [Wave(task, plan, own, place, minutes) for own, place in zip(indices, folders, strict=True)]


def _joined(waves: Sequence[Wave]) -> xr.Dataset:
    """What the members of all tasks that were begun have measured. What an interrupted run never came to is NaN, or -1
    for a whole number, and what is observed after the last update is left out then."""
    begun = [one for one in waves if one.record.steps_done]
    finished = all(one.record.finished for one in waves)
    wholes = []
    for task in {id(one.task): one.task for one in begun}.values():
        parts = [one.record.measured.assign_coords(member=one.own) for one in begun if one.task is task]
        whole = _concat(parts)
        at_the_end = task.plan.observe_every is None and not task.plan.observe_evaluated
        if at_the_end and not finished:
            whole = whole.drop_dims("observation_step", errors="ignore")
        whole = whole.reindex(member=np.arange(len(task.members)), fill_value=missing_values(whole)).drop_vars("member")
        coordinates = {name: ("member", values) for name, values in task.members.coordinates.items()}
        wholes.append(whole.assign_coords(coordinates))
    timed = [one.record for one in begun if math.isfinite(one.record.updates_per_second)]
    updates = [record.steps_done * record.size for record in timed]
    seconds = [n / record.updates_per_second for n, record in zip(updates, timed, strict=True)]
    return _concat(wholes).assign_attrs(
        finished=finished,
        steps_done=sum(one.record.steps_done * len(one.own) / len(one.task.members) for one in begun),
        member_updates_per_second=sum(updates) / sum(seconds) if timed else math.nan,
    )


def _concat(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    by_member: dict[str, Any] = {"data_vars": "minimal", "coords": "minimal", "compat": "override"}
    return xr.concat(
        parts, "member", **by_member, join="outer", combine_attrs="drop", fill_value=missing_values(parts[0])
    )


def _place(waves: Sequence[Wave], one: Wave) -> str:
    """Which of several tasks and waves it is, in words."""
    of_task = [wave for wave in waves if wave.task is one.task]
    task = f"{one.task.name}, " if len(of_task) < len(waves) else ""
    return task + (f"wave {of_task.index(one) + 1} of {len(of_task)}, " if len(of_task) > 1 else "")


def _tell(bar: Progress, waves: Sequence[Wave], one: Wave, text: str) -> None:
    """Shows what takes a while: in the bar, or without a terminal in a line."""
    text = _place(waves, one) + text
    bar.update(bar.task_ids[0], description=text)
    if not console.is_terminal:
        console.print(text)


def _show(bar: Progress, waves: Sequence[Wave], one: Wave) -> None:
    """Shows where the training is: in the bar, or without a terminal now and then in a line."""
    record, chunk, text = one.record, one.record.chunks_done - 1, one.describe()
    done = sum(wave.record.steps_done for wave in waves)
    left = sum(wave.record.size * (wave.plan.num_steps - wave.record.steps_done) for wave in waves)
    bar.update(bar.task_ids[0], completed=done, description=_place(waves, one) + text)
    if not console.is_terminal and all(one.falls_to(chunk, n) for n in (one.plan.num_evaluations, LINES)):
        time = f"{one.elapsed:,.0f} s"
        if left and math.isfinite(record.updates_per_second):
            time += f", {duration(left / record.updates_per_second)} to go"
        progress = f"update {record.steps_done:,} of {one.plan.num_steps:,} ({time})"
        console.print(f"{_place(waves, one)}{progress}: {text}")


@contextlib.contextmanager
def _out_of_memory_in_words() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UsageError(
            f"the memory of the devices does not suffice ({brief(error)}): take a smaller width, a smaller batch, or "
            "fewer members at a time."
        ) from error
