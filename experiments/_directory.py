"""The directory of a run: made, gone on with, and written to at the end."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
import tyro
import xarray as xr
from jax.experimental import multihost_utils

from . import _lock, _signals
from ._prepare import brief
from ._results import STAND_INS, file_name, provenance, save
from ._run import UsageError, console

_Config = TypeVar("_Config")
_FREE = ("run", "data_dir", "show_seed")  # may differ when a run is resumed


@dataclasses.dataclass(frozen=True)
class Run:
    """Where the results go, and how a long run survives."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: results/NAME-TIME)")] = None
    """A new or empty directory for the results."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: a new run)")] = None
    """The directory of an interrupted run, to go on with. Needs no other flags but --distributed: they are in its
    config.json."""
    checkpoint_every: float = 5.0
    """Minutes from one checkpoint to the next."""
    distributed: bool = False
    """Train on several hosts together, each of which runs this command under a scheduler that JAX knows."""


def parse(config: type[_Config], arguments: list[str], module: str, description: str | None = None) -> _Config:
    """The command line as a config. With `--resume DIR` the config of that run, which no other flag may change."""
    prog, description = f"python -m experiments.{module}", description or config.__doc__
    parsed: Any = tyro.cli(config, args=arguments, prog=prog, description=description)
    run: Run = parsed.run
    if math.isnan(run.checkpoint_every) or run.checkpoint_every < 0:
        raise UsageError(f"--checkpoint-every takes a number of minutes, 0 or more, got {run.checkpoint_every}.")
    if run.resume is None:
        if not run.distributed:  # several hosts find out together: see `directory_of`
            refuse_used(run.out)
        return parsed
    if run.out not in (None, run.resume):
        raise UsageError(f"a run that is resumed goes on in its own directory, {run.resume}: leave --out out.")
    stored = _stored(config, run.resume)
    resumed: Any = tyro.cli(config, args=arguments, prog=prog, description=description, default=stored)
    names = [field.name for field in dataclasses.fields(resumed) if field.name not in _FREE]
    differences = [
        f"--{name.replace('_', '-')} {words(getattr(stored, name))}, not {words(getattr(resumed, name))}"
        for name in names
        if getattr(stored, name) != getattr(resumed, name)
    ]
    if differences:
        raise UsageError(
            f"the run in {run.resume} was started with {'; '.join(differences)}: leave that out to resume it, or "
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
            if name != "run"
        }
        run = Run(resume=directory, checkpoint_every=values["run"]["checkpoint_every"])
        return config(**fields | {"run": run})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{found[0]} is not the configuration of a run of this command ({type(error).__name__}: {error})."
        ) from error


def words(value: Any) -> str:
    """A value of a flag as it is typed."""
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def directory_of(
    run: Run, module: str, arguments: Sequence[str], label: str, dataset: str, config: Mapping[str, Any]
) -> Path:
    """The directory of a run: a new one with its `config.json`, or that of the run that is resumed.

    Raises a `UsageError` if it cannot be written to. With several hosts the first one makes it, for all.
    """
    name, problem = b"", UsageError("the first host has no directory for the results; it says why.")
    if jax.process_index() == 0:
        try:
            config = {**config, "made_by": made_by(module, arguments)}
            if given := run.resume or run.out:
                _lock.lock(given)
            path = _writable(run.resume) if run.resume else new_directory(run.out, label, dataset, config)
            _lock.lock(path)
            name = os.fsencode(path)
        except UsageError as error:
            problem = error
            if run.out:
                _lock.unlock(run.out)
    if jax.process_count() > 1:
        letters = np.frombuffer(name.ljust(4096, b"\0"), np.uint8)
        name = bytes(np.asarray(multihost_utils.broadcast_one_to_all(letters))).rstrip(b"\0")
    if not name:
        raise problem
    return Path(os.fsdecode(name))


def made_by(module: str, arguments: Sequence[str]) -> dict[str, str]:
    """The command, and the versions of what runs it."""
    return {"command": shlex.join(["python", "-m", f"experiments.{module}", *arguments])} | provenance()


def _writable(path: Path) -> Path:
    try:
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write to {path} ({error.strerror}): make it writable, or copy it to where it is."
        ) from error
    return path


def new_directory(out: Path | None, label: str, dataset: str, config: Mapping[str, Any]) -> Path:
    """Makes the directory of a run, `results/LABEL-TIME` if none is given, and writes its `config.json`.

    Raises a `UsageError` if it cannot be written to, or holds a run already.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path = out or Path("results") / f"{label}-{stamp}"
    try:
        if out is None:
            number = 1
            while path.exists():  # runs that were started in the same second
                number += 1
                path = path.with_name(f"{label}-{stamp}-{number}")
        refuse_used(path)
        path.mkdir(parents=True, exist_ok=out is not None)
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
    except (OSError, RuntimeError, ImportError) as error:
        reason = getattr(error, "strerror", None) or brief(error)
        remedy = "mend what cannot be imported" if isinstance(error, ImportError) else "make room"
        raise UsageError(
            f"cannot write the results to {directory} ({reason}): {remedy}, then go on with\n"
            f"  {resume_command(directory, module)}"
        ) from error


def resume_command(directory: Path, module: str) -> str:
    """What to type to go on with an interrupted run."""
    hosts = ["--distributed"] if jax.process_count() > 1 else []
    return shlex.join(["python", "-m", f"experiments.{module}", "--resume", str(directory), *hosts])


def refuse_used(out: Path | None) -> None:
    """Raises a `UsageError` if the directory holds more than the configuration of a run that never started."""
    try:
        own = ("config.json", _lock.NAME)
        used = out is not None and out.is_dir() and any(not p.name.endswith(own) for p in out.iterdir())
    except OSError as error:
        raise UsageError(f"cannot read {out} ({error.strerror}): pass another directory with --out.") from error
    if used:
        raise UsageError(f"{out} is not empty: pass a new directory with --out, so that no results are lost.")


def conclude(
    module: str,
    arguments: Sequence[str],
    directory: Path,
    train: Callable[[], xr.Dataset],
    report: Callable[[xr.Dataset, Path], None],
) -> bool:
    """The work of a command: trains, saves the results and reports on them. Returns whether the training was finished.

    With several hosts the first one writes. A signal stops the training, but not what is written after it.
    """
    finished = False
    try:
        with _signals.saving_first(console.print):
            results = train()
            if jax.process_index() == 0:
                with writing(directory, module):
                    results.attrs |= _origin(directory, results.attrs["dataset"], module, arguments)
                    save(results, directory / file_name(results.attrs["dataset"], "results.nc"))
                    report(results, directory)
            finished = results.attrs["finished"] == "true"
    finally:
        _lock.unlock(directory)
        if not finished and not isinstance(sys.exception(), Exception):
            console.print(f"Interrupted. To go on: {resume_command(directory, module)}")
    return finished


def _origin(directory: Path, dataset: str, module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The command and the versions that started the run; those that resumed it are named where they are others."""
    config = json.loads((directory / file_name(dataset, "config.json")).read_text(encoding="utf-8"))
    now = made_by(module, arguments)
    first = config.get("made_by", now)
    return first | {f"resumed_with_{key}": value for key, value in now.items() if first.get(key) != value}
