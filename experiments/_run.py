"""What the experiment commands share: exit codes, devices, the run's directory, and the training loop."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.train import Dataset, Metrics, TrainState

from ._data import DataError
from ._results import SPLITS, file_name

_HANDLERS: list[Callable[..., None]] = []  # those of ours for Ctrl-C that are in place
REPORTS = 20  # lines about the progress, at most, where there is no terminal for a bar
console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # paths are printed as they are


class UsageError(Exception):
    """The command cannot do what was asked; the message is one sentence that says why and what to do."""


def run(command: Callable[[], bool]) -> NoReturn:
    """Runs a command and exits: 0 done, 2 wrong use (one sentence, no traceback), 130 interrupted (False)."""
    try:
        code = 0 if command() else 130
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\nInterrupted: nothing more will be written.", file=sys.stderr)
        code = 130
    sys.exit(code)


def use_all_cores() -> None:
    """One device per CPU core, which is how JAX trains an ensemble fastest there. Respects XLA_FLAGS, if set.

    Does nothing where JAX is already running, as in a notebook: the number of devices is then settled.
    """
    if "XLA_FLAGS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores)


def new_directory(out: Path | None, label: str, dataset: str, config: Mapping[str, Any]) -> Path:
    """Makes the directory of a run, `results/LABEL-TIME` if none is given, and writes its `config.json`.

    Raises a `UsageError` if it cannot be written to, or holds a run already.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = out or Path("results") / f"{label}-{stamp}"
    try:
        refuse_used(path)
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(config), indent=2, default=str)
        (path / file_name(dataset, "config.json")).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {path} ({error.strerror}): pass another directory with --out.") from error
    return path


def refuse_used(out: Path | None) -> None:
    """Raises a `UsageError` if the directory holds more than the configuration of a run that never started."""
    try:
        used = out is not None and out.is_dir() and any(not p.name.endswith("config.json") for p in out.iterdir())
    except OSError as error:
        raise UsageError(f"cannot read {out} ({error.strerror}): pass another directory with --out.") from error
    if used:
        raise UsageError(f"{out} is not empty: pass a new directory with --out, so that no results are lost.")


def chunk_length(num_steps: int, target: float) -> int:
    """The divisor of `num_steps` nearest to `target` (in ratio): chunks of equal length are one compilation.

    If it is more than four times off, as for a prime number of steps, the target: a shorter last chunk is another.
    """
    small = [n for n in range(1, math.isqrt(num_steps) + 1) if num_steps % n == 0]
    divisors = [*small, *(num_steps // n for n in small)]
    target = min(max(round(target), 1), num_steps)
    nearest = min(divisors, key=lambda n: abs(np.log(n / target)))
    return nearest if target / 4 <= nearest <= 4 * target else target


def duration(seconds: float) -> str:
    """A time to announce, in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else "a few seconds"


@dataclasses.dataclass
class History:
    """What a run measured: numbers of every update, and of every evaluation."""

    minibatch: Metrics  # [members, steps]
    evaluation_steps: list[int]  # updates made before each evaluation
    evaluations: dict[str, Metrics]  # by split, [members, evaluations]; NaN where not evaluated
    observations: dict[str, np.ndarray]  # by name, [members, observations]
    diverged_at: np.ndarray  # [members], -1 for never
    finished: bool
    interrupted: bool  # Ctrl-C was pressed, be it in the last chunk
    steps_per_second: float  # without the first chunk, which compiles; NaN if there is no other

    def arrays(self) -> dict[str, Any]:
        """As `_results.assemble` takes them."""
        return {
            "evaluation_steps": self.evaluation_steps,
            "accuracy": np.stack([self.evaluations[split].accuracy for split in SPLITS], 1),
            "loss": np.stack([self.evaluations[split].loss for split in SPLITS], 1),
            "minibatch_loss": self.minibatch.loss,
            "minibatch_accuracy": self.minibatch.accuracy,
            "diverged_at": self.diverged_at,
        }


def train(
    states: TrainState,
    losses: DynamicalLoss,
    optimiser: optax.GradientTransformation,
    data: Dataset,
    splits: Mapping[str, Dataset],
    *,
    num_steps: int,
    chunk: int,
    batch_size: int | None,
    microbatch_size: int | None,
    num_evaluations: int,
    observe: Callable[[TrainState, DynamicalLoss, Dataset], dict[str, jax.Array]] | None = None,
    observe_every: int = 1,
) -> tuple[TrainState, History]:
    """Trains an ensemble chunk by chunk with a progress bar, and evaluates it on the way.

    The split "validation" is evaluated `num_evaluations` times, evenly spread, and every other split once, at the end.
    On Ctrl-C the training stops after the running chunk, and on a second one at once; what it measured so far is
    returned.
    """
    num_chunks = math.ceil(num_steps / chunk)
    diverged_at = np.full(len(states.step), -1)
    minibatch: list[Metrics] = []
    observations: list[dict[str, np.ndarray]] = []
    evaluated: list[tuple[int, dict[str, Metrics]]] = []
    started = compiled = time.perf_counter()
    unit, per_step = ("images", len(states.step) * batch_size) if batch_size else ("member-updates", len(states.step))
    with _progress() as progress:
        task = progress.add_task("compiling", total=num_steps)
        stopping = lambda: progress.update(task, description="stopping after this chunk (Ctrl-C again: at once)")
        with contextlib.suppress(KeyboardInterrupt), _first_ctrl_c(stopping) as asked_to_stop:
            for i in range(num_chunks):
                if asked_to_stop.is_set():
                    break
                last = i == num_chunks - 1
                done = num_steps if last else (i + 1) * chunk
                due = (i + 1) * num_evaluations // num_chunks > i * num_evaluations // num_chunks
                states, metrics, observed, results = ensemble.train_chunk(
                    states,
                    losses,
                    optimiser,
                    data,
                    num_steps=done - i * chunk,
                    batch_size=batch_size,
                    microbatch_size=microbatch_size,
                    observe=observe,
                    observe_every=observe_every,
                    evaluations={name: (s, due if name == "validation" else last) for name, s in splits.items()},
                )
                diverged_at = jax.device_get(jnp.where(states.diverged, states.step, -1))
                minibatch.append(jax.device_get(metrics))
                observations.append(jax.device_get(observed or {}))
                if due or last:
                    evaluated.append((done, jax.device_get(results)))
                if i == 0:
                    compiled = time.perf_counter()
                text = _describe(minibatch[-1], evaluated[-1][1].get("validation") if evaluated else None)
                if i:
                    text += f", {per_step * (done - chunk) / (time.perf_counter() - compiled):,.0f} {unit}/s"
                progress.update(task, completed=done, description=text)
                told = (i + 1) * REPORTS // num_chunks > i * REPORTS // num_chunks
                if due and told and not console.is_terminal:
                    elapsed = time.perf_counter() - started
                    console.print(f"update {done:,} of {num_steps:,} ({elapsed:,.0f} s): {text}")
    if not minibatch:
        raise KeyboardInterrupt
    steps_done = sum(metrics.loss.shape[1] for metrics in minibatch)
    empty = Metrics(*(np.zeros((len(diverged_at), 0), np.float32) for _ in range(2)))
    return states, History(
        minibatch=jax.tree.map(lambda *chunks: np.concatenate(chunks, 1), *minibatch),
        evaluation_steps=[step for step, _ in evaluated],
        evaluations={
            name: jax.tree.map(lambda *results: np.stack(results, 1), *(results[name] for _, results in evaluated))
            if evaluated
            else empty
            for name in splits
        },
        observations=jax.tree.map(lambda *chunks: np.concatenate(chunks, 1), *observations),
        diverged_at=diverged_at,
        finished=len(minibatch) == num_chunks,
        interrupted=asked_to_stop.is_set(),
        steps_per_second=(steps_done - chunk) / (time.perf_counter() - compiled) if len(minibatch) > 1 else np.nan,
    )


@contextlib.contextmanager
def saving_first() -> Iterator[None]:
    """Lets a Ctrl-C wait until the end of the block, so that what has been measured is written whatever happens.

    Training inside the block still stops after the running chunk.
    """
    with _handling_ctrl_c(lambda _: console.print("Ctrl-C: saving what there is first.")) as event:
        yield
    if event.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _first_ctrl_c(told: Callable[[], None]) -> Iterator[threading.Event]:
    """Makes the first Ctrl-C set an event, and only the next one raise.

    A KeyboardInterrupt that hits Python inside one of JAX's callbacks from the garbage collector is printed and lost.
    """

    def handle(again: bool):
        if again:
            raise KeyboardInterrupt
        told()

    with _handling_ctrl_c(handle) as event:
        yield event


@contextlib.contextmanager
def _handling_ctrl_c(handle: Callable[[bool], None]) -> Iterator[threading.Event]:
    """Calls `handle` at every Ctrl-C, with whether there was one before, unless somebody else handles them."""
    event = threading.Event()

    def handler(*_):
        again = event.is_set()
        event.set()
        handle(again)

    usual = signal.getsignal(signal.SIGINT)
    ours = usual is signal.default_int_handler or usual in _HANDLERS
    if ours and threading.current_thread() is threading.main_thread():
        _HANDLERS.append(handler)
        signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        if handler in _HANDLERS:
            signal.signal(signal.SIGINT, usual)
            _HANDLERS.remove(handler)


def _progress() -> Progress:
    columns = (
        BarColumn(12),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _describe(metrics: Metrics, validation: Metrics | None) -> str:
    """Means over the members that are still finite."""
    text = f"loss {_mean(metrics.loss):.3f}, accuracy {_mean(metrics.accuracy):.1%}"
    if validation is not None and np.isfinite(validation.accuracy).any():
        text += f", validation {_mean(validation.accuracy):.1%}"
    return text


def _mean(values) -> float:
    finite = np.asarray(values)[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
