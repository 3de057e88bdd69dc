"""One process at a time in the directory of a run: another would overwrite what the first one writes."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from ._run import UsageError

NAME = ".lock"
_HELD: dict[Path, FileLock] = {}  # by this process; the operating system lets go of them when it ends, however it does


def lock(directory: Path) -> None:
    """Takes the directory for this process. Raises a `UsageError` if another one has it, an `OSError` if none can."""
    held = _HELD.setdefault(directory.resolve(), FileLock(directory / NAME))
    with contextlib.suppress(NotImplementedError):  # a file system that knows no locks: then without
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"another process is at work in {directory}: wait until it has ended, or pass another directory."
            ) from None


def unlock(directory: Path) -> None:
    """Gives the directory up."""
    if held := _HELD.pop(directory.resolve(), None):
        held.release(force=True)
