"""One process at a time in the directory of a run: another would overwrite what the first one writes."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from ._run import UsageError

NAME = ".lock"
_HELD: dict[Path, FileLock] = {}  # by this process; the operating system lets go of them when it ends, however it does


def lock(directory: Path) -> None:
    """Takes a directory, which is made if there is none, for this process: once, however often it is asked for.

    Raises a `UsageError` if another process has it. Where it cannot be written to or its file system knows no locks,
    nothing is done: the former will be noticed anyway.
    """
    path = directory.resolve()
    if path in _HELD:
        return
    held = FileLock(path / NAME)
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
