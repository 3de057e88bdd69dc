"""One run of a command, from its flags to its last file."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import xarray as xr
from jax.experimental import multihost_utils

from ..results.files import file_name, provenance, save
from . import signals
from .devices import start_jax
from .directory import lock, new_directory, require_writable, unlock
from .errors import UsageError, brief
from .flags import RunFlags, parse
from .terminal import console

_Config = TypeVar("_Config")


class Session(Generic[_Config]):
    """A run: its `config`, once it is opened its `directory`, and after its block whether it is `finished`."""

    config: _Config
    directory: Path

    def __init__(self, config: _Config, command: str, arguments: Sequence[str]):
        self.config = config
        self.finished = self._all_trained = False
        self._flags: RunFlags = config.run  # type: ignore[attr-defined]
        self._command, self._arguments = command, arguments
        self._saving = False
        self._until_end = contextlib.ExitStack()

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, config: type[_Config], command: str, arguments: list[str], description: str | None = None
    ) -> "Iterator[Session[_Config]]":
        """Reads the flags, those of the run that is resumed if it is one, and settles the devices.

        At the end of the block, the directory is given up, and what goes wrong while results are written, such as a
        full disk, becomes a sentence. Where the run is not finished by then, it says how to go on.

        **Arguments:**

        - `config`: a dataclass with a field `run`, of `RunFlags`.
        - `command`, `arguments`: what comes after `python -m experiments.`, and after that.
        - `description`: what `--help` begins with; by default the docstring of `config`.
        """
        session = cls(parse(config, arguments, command, description), command, arguments)
        start_jax(session._flags.distributed)
        try:
            with session._until_end:
                yield session
                session.finished = session._all_trained
        except (OSError, RuntimeError, ImportError) as error:
            if not session._saving:
                raise
            raise UsageError(session._not_written(error)) from error
        finally:
            if hasattr(session, "directory"):
                unlock(session.directory)
                if not session.finished and not isinstance(sys.exception(), Exception):
                    console.print(f"Interrupted. To go on: {session._resume_command()}")

    def open(self, label: str, dataset: str, configuration: Mapping[str, Any]) -> None:
        """Makes the directory of the run, with its `config.json`, or takes that of the run that is resumed.

        From then on, a signal stops the training, but not what is written after it. With several hosts the first one
        makes the directory, for all. Raises a `UsageError` if it cannot be written to.

        **Arguments:**

        - `label`: what its name begins with, where the user gives none.
        - `dataset`: the name of the data set, which is in the names of the files if it is a stand-in.
        - `configuration`: what is kept in `config.json`.
        """
        name, problem = b"", UsageError("the first host has no directory for the results; it says why.")
        if jax.process_index() == 0:
            try:
                name = os.fsencode(self._own_directory(label, dataset, configuration))
            except UsageError as error:
                problem = error
        if jax.process_count() > 1:
            letters = np.frombuffer(name.ljust(4096, b"\0"), np.uint8)
            name = bytes(np.asarray(multihost_utils.broadcast_one_to_all(letters))).rstrip(b"\0")
        if not name:
            raise problem
        self.directory = Path(os.fsdecode(name))
        self._until_end.enter_context(signals.saving_first(console.print))

    @property
    def checkpoints(self) -> dict[str, Any]:
        """Where the checkpoints are, and how often one is written, as `train` takes it."""
        return {
            "checkpoint": self.directory / "checkpoint",
            "checkpoint_minutes": self._flags.checkpoint_every,
        }

    def save(self, results: xr.Dataset) -> bool:
        """Writes `results.nc`, with the command and the versions that made it; of several hosts the first one does.

        Those that resumed the run are named where they are others than those that started it. Returns whether this
        host writes.
        """
        self._saving = True
        writes = jax.process_index() == 0
        if writes:
            name = results.attrs["dataset"]
            config = json.loads((self.directory / file_name(name, "config.json")).read_text(encoding="utf-8"))
            first = config.get("made_by", now := self._made_by())
            results.attrs |= first | {f"resumed_with_{key}": v for key, v in now.items() if first.get(key) != v}
            save(results, self.directory / file_name(name, "results.nc"))
        self._all_trained = results.attrs["finished"] == "true"
        return writes

    def _own_directory(self, label: str, dataset: str, configuration: Mapping[str, Any]) -> Path:
        given = self._flags.resume or self._flags.out
        try:
            if given:
                lock(given)
            if path := self._flags.resume:
                require_writable(path)
            else:
                configuration = {**configuration, "made_by": self._made_by()}
                path = new_directory(self._flags.out, label, dataset, configuration)
            lock(path)
        except UsageError:
            if self._flags.out:
                unlock(self._flags.out)
            raise
        return path

    def _made_by(self) -> dict[str, str]:
        command = shlex.join(["python", "-m", f"experiments.{self._command}", *self._arguments])
        return {"command": command} | provenance()

    def _resume_command(self) -> str:
        hosts = ["--distributed"] if jax.process_count() > 1 else []
        module = f"experiments.{self._command}"
        return shlex.join(["python", "-m", module, "--resume", str(self.directory), *hosts])

    def _not_written(self, error: BaseException) -> str:
        reason = getattr(error, "strerror", None) or brief(error)
        remedy = "mend what cannot be imported" if isinstance(error, ImportError) else "make room"
        return (
            f"cannot write the results to {self.directory} ({reason}): {remedy}, then go on with\n"
            f"  {self._resume_command()}"
        )
