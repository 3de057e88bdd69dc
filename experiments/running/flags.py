"""The command line: the flags that all commands have, and those of a run that is resumed."""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from ..results.files import STAND_INS, file_name
from .directory import refuse_used
from .errors import UsageError

_Config = TypeVar("_Config")
Seeds = Annotated[int | str, tyro.conf.arg(metavar="N|FIRST:END")]
ShownSeed = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the first one)")]
LEAST = 1e-300  # of a positive number
_FREE = ("run", "data_dir", "show_seed", "shown", "animation")  # may differ when a run is resumed


@dataclasses.dataclass(frozen=True)
class RunFlags:
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


def parse(config: type[_Config], arguments: list[str], command: str, description: str | None = None) -> _Config:
    """The command line as a config. With `--resume DIR` the config of that run, which no other flag may change."""
    prog, description = f"python -m experiments.{command}", description or config.__doc__
    parsed: Any = tyro.cli(config, args=arguments, prog=prog, description=description)
    run: RunFlags = parsed.run
    if math.isnan(run.checkpoint_every) or run.checkpoint_every < 0:
        raise UsageError(f"--checkpoint-every takes a number of minutes, 0 or more, got {run.checkpoint_every}.")
    if run.resume is None:
        if not run.distributed:  # several hosts find out together: see `Session.open`
            refuse_used(run.out)
        return parsed
    if run.out not in (None, run.resume):
        raise UsageError(f"a run that is resumed goes on in its own directory, {run.resume}: leave --out out.")
    stored = _stored(config, run.resume, command)
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


def _stored(config: type[_Config], directory: Path, command: str) -> _Config:
    """The config that a run of a command was started with, from its `config.json`."""
    paths = [directory / file_name(name, "config.json") for name in ("", *STAND_INS)]
    found = [path for path in paths if path.exists()]
    if not found:
        raise UsageError(f"{directory} holds no run that could be resumed: there is no config.json in it.")
    try:
        values = json.loads(found[0].read_text(encoding="utf-8"))
        maker = re.search(r"-m experiments\.(\w+)", str(values.get("made_by")))
        if maker and maker[1] == "merge":
            raise UsageError(f"the run in {directory} was merged from others: there is nothing to go on with.")
        if maker and maker[1] != command:
            resume = shlex.join(["python", "-m", f"experiments.{maker[1]}", "--resume", str(directory)])
            raise UsageError(f"the run in {directory} is of another command: go on with it by {resume}")
        hints = {field.name: str(field.type) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
        # JSON knows neither tuples nor paths.
        fields = {
            name: tuple(value) if isinstance(value, list) else Path(value) if value and "Path" in hint else value
            for name, hint in hints.items()
            for value in [values[name]]
            if name != "run"
        }
        run = RunFlags(resume=directory, checkpoint_every=values["run"]["checkpoint_every"])
        return config(**fields | {"run": run})
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"{found[0]} is not the configuration of a run of this command ({type(error).__name__}: {error})."
        ) from error


def parse_seeds(value: int | str) -> range:
    """The seeds 0 to 7 of `8` or `"8"`, and 8 to 15 of `"8:16"`. Raises a `UsageError` for anything else."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", str(value).strip())
    seeds = range(int(match[1] or 0), int(match[2])) if match else range(0)
    if not seeds or seeds[-1] >= 2**31:
        raise UsageError(
            f"--seeds takes a number of seeds, 8, or a slice of them, 8:16 (which is 8 to 15), got {value}."
        )
    return seeds


def words(value: Any) -> str:
    """A value of a flag as it is typed."""
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def require(config: Any, names: Sequence[str], low: float, below: float, says: str) -> None:
    """Raises a `UsageError` unless the values of some flags are numbers from `low` to less than `below`, if given."""
    for name in names:
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            if not low <= one < below:
                raise UsageError(f"--{name.replace('_', '-')} must be {says}, got {one:g}.")


def require_shown(config: Any) -> None:
    """Raises a `UsageError` unless `--show-seed`, if given, is one of the `--seeds`."""
    seeds = parse_seeds(config.seeds)
    if config.show_seed is not None and config.show_seed not in seeds:
        raise UsageError(f"--show-seed must be one of the seeds {seeds[0]} to {seeds[-1]}, got {config.show_seed}.")


def require_different(config: Any, names: Sequence[str]) -> None:
    """Raises a `UsageError` unless some flags, where given, have one or more values, each once."""
    for name in names:
        values = getattr(config, name)
        if values is not None and (not values or len(set(values)) < len(values)):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} takes one or more different values, got {words(values)}.")
