"""The directory of a run: made or refused, and held by one process, as another would overwrite what it writes."""

import contextlib
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..results.files import file_name
from .errors import UsageError

_LOCK = ".lock"
_HELD: dict[Path, FileLock] = {}  # by this process; the operating system lets go of them when it ends, however it does


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


def refuse_used(out: Path | None, but: tuple[str, ...] = ("config.json", _LOCK)) -> None:
    """Raises a `UsageError` if the directory holds more than the configuration of a run that never started, or is a
    file; `but` are the ends of the names that may be there."""
    if out is None:
        return
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file: pass a directory with --out.")
        used = out.is_dir() and any(not p.name.endswith(but) or _is_foreign(p) for p in out.iterdir())
    except OSError as error:
        raise UsageError(f"cannot read {out} ({error.strerror}): pass another directory with --out.") from error
    if used:
        raise UsageError(f"{out} is not empty: pass a new directory with --out, so that no results are lost.")


def _is_foreign(path: Path) -> bool:
    """Whether it is a `config.json` that no command of ours has written."""
    return path.name.endswith("config.json") and b'"made_by"' not in path.read_bytes()


def require_writable(path: Path) -> None:
    """Raises a `UsageError` if nothing can be written to a directory that there is."""
    try:
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write to {path} ({error.strerror}): make it writable, or copy it to where it is."
        ) from error


def lock(directory: Path) -> None:
    """Takes a directory, which is made if there is none, for this process: once, however often it is asked for.

    Raises a `UsageError` if another process has it. Where it cannot be written to or its file system knows no locks,
    nothing is done: the former will be noticed anyway.
    """
    path = directory.resolve()
    if path in _HELD:
        return
    held = FileLock(path / _LOCK)
    with contextlib.suppress(OSError, NotImplementedError):
        path.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another process is at work in {directory}: wait until it has ended, or pass another directory."
            ) from None
        _HELD[path] = held


def unlock(directory: Path) -> None:
    """Gives a directory up."""
    if held := _HELD.pop(directory.resolve(), None):
        Path(held.lock_file).unlink(missing_ok=True)  # while nobody else can have it
        held.release()
