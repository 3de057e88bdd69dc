"""What the experiment commands share: exit codes, devices and hosts, and the directory of a run that can be resumed."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from rich.console import Console

from ._data import DataError
from ._results import STAND_INS, file_name

_Config = TypeVar("_Config")
_FREE = {
    "resume",
    "out",
    "checkpoint_every",
    "data_dir",
    "distributed",
    "show_seed",
}  # may differ when a run is resumed
Resume = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: a new run)")]
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


def start_jax(distributed: bool) -> None:
    """Settles the devices, before JAX is used: all cores of this machine, and with `distributed` those of all hosts.

    Which hosts there are is known from the cluster that the process runs in; where JAX does not recognise it, from the
    environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    use_all_cores()
    if not distributed:
        return
    number, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number), process_id=None if index is None else int(index)
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"--distributed found no cluster ({str(error).splitlines()[0]}): run under a scheduler that JAX knows, or "
            "set JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from error
    console.quiet = jax.process_index() > 0  # one host speaks for all


def parse(config: type[_Config], arguments: list[str], module: str, description: str | None = None) -> _Config:
    """The command line as a config. With `--resume DIR` the config of that run, which no other flag may change."""
    prog, description = f"python -m experiments.{module}", description or config.__doc__
    parsed: Any = tyro.cli(config, args=arguments, prog=prog, description=description)
    if math.isnan(parsed.checkpoint_every) or parsed.checkpoint_every < 0:
        raise UsageError(f"--checkpoint-every takes a number of minutes, 0 or more, got {parsed.checkpoint_every}.")
    if parsed.resume is None:
        return parsed
    if parsed.out is not None and parsed.out != parsed.resume:
        raise UsageError(f"a run that is resumed goes on in its own directory, {parsed.resume}: leave --out out.")
    stored = _stored(config, parsed.resume)
    resumed: Any = tyro.cli(config, args=arguments, prog=prog, description=description, default=stored)
    names = [field.name for field in dataclasses.fields(resumed) if field.name not in _FREE]
    differences = [
        f"--{name.replace('_', '-')} {_words(getattr(stored, name))}, not {_words(getattr(resumed, name))}"
        for name in names
        if getattr(stored, name) != getattr(resumed, name)
    ]
    if differences:
        raise UsageError(
            f"the run in {parsed.resume} was started with {'; '.join(differences)}: leave that out to resume it, or "
            "start another run."
        )
    return resumed


def _stored(config: type[_Config], directory: Path) -> _Config:
    """The config that a run was started with, from its `config.json`."""
    paths = [directory / file_name(name, "config.json") for name in ("", *STAND_INS)]
    found = [path for path in paths if path.exists()]
    if not found:
        raise UsageError(f"{directory} holds no run that could be resumed: there is no config.json in it.")
    try:
        values = json.loads(found[0].read_text(encoding="utf-8"))
        hints = {field.name: str(field.type) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
        # JSON knows neither tuples nor paths.
        fields = {
            name: tuple(value) if isinstance(value, list) else Path(value) if value and "Path" in hint else value
            for name, hint in hints.items()
            for value in [values[name]]
        }
        return config(**fields | {"resume": directory, "out": None, "distributed": False})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{found[0]} is not the configuration of a run of this command ({type(error).__name__}: {error})."
        ) from error


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def directory_of(config: Any, label: str, dataset: str, settings: Mapping[str, Any]) -> Path:
    """The directory of a run: a new one with its `config.json`, or that of the run that is resumed.

    Raises a `UsageError` if it cannot be written to. With several hosts the first one makes it, for all.
    """
    path = config.resume
    if jax.process_index() == 0:
        if path is None:
            path = new_directory(config.out, label, dataset, settings)
        else:
            try:
                probe = path / ".writable"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise UsageError(
                    f"cannot write to {path} ({error.strerror}): make it writable, or copy it to where it is."
                ) from error
    if jax.process_count() > 1:
        name = np.frombuffer(os.fsencode(path or "").ljust(4096, b"\0"), np.uint8)
        path = Path(os.fsdecode(bytes(np.asarray(multihost_utils.broadcast_one_to_all(name))).rstrip(b"\0")))
    return path


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


@contextlib.contextmanager
def writing(directory: Path, module: str) -> Iterator[None]:
    """Turns what goes wrong when results are written, such as a full disk, into a sentence that says how to go on."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise UsageError(
            f"cannot write the results to {directory} ({reason}): make room, then go on with\n"
            f"  {resume_command(directory, module)}"
        ) from error


def resume_command(directory: Path, module: str) -> str:
    """What to type to go on with an interrupted run."""
    return shlex.join(["python", "-m", f"experiments.{module}", "--resume", str(directory)])


def refuse_used(out: Path | None) -> None:
    """Raises a `UsageError` if the directory holds more than the configuration of a run that never started."""
    if jax.process_index():
        return
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


def devices() -> str:
    """The devices that members are spread over, in words."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def announced(cpu_seconds: float) -> str:
    """What to say about the time that a run will take: a measure made on a CPU says nothing about anything else."""
    on_cpu = jax.devices()[0].platform == "cpu"
    return f"about {duration(cpu_seconds)}" if on_cpu else "time: see the ETA after the first chunk"


def duration(seconds: float) -> str:
    """A time to announce, in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else "a few seconds"
