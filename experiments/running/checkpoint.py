"""Checkpoints of a training run, written and read by orbax: what it takes to go on as if nothing had happened."""

import contextlib
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import brief

_KEPT = 2  # the newest, and the one before in case that turns out to be damaged


class Checkpoints:
    """The checkpoints in one directory, by the number of updates after which each was made.

    A checkpoint is a dictionary of NumPy arrays. Whenever the process is killed, also while one is written, those that
    were complete stay complete. With several hosts, all call the same methods, on a directory that they share.
    """

    def __init__(self, directory: Path, minutes: float, warn: Callable[[str], None]):
        """**Arguments:**

        - `directory`: made if there is none.
        - `minutes`: the least time from one regular checkpoint to the next; infinite for none.
        - `warn`: told, in a sentence, what went wrong with a checkpoint.
        """
        self._directory = directory
        self._warn = warn
        self._seconds = 60 * minutes
        self._last = time.monotonic()
        self._saved: int | None = None
        self._manager: Any = None

    def latest(self) -> tuple[int, dict[str, np.ndarray]] | None:
        """The newest checkpoint that is undamaged, if there is one. Damaged ones are told of, and removed."""
        if not self._directory.exists():
            return None
        for step in sorted(self._open().all_steps(), reverse=True):
            try:
                with _hushed():
                    arrays = self._read(step)
            except Exception as error:  # whatever a damaged file makes orbax raise
                self._warn(
                    f"WARNING: the checkpoint of update {step:,} in {self._directory} is damaged "
                    f"({brief(error)[:200]}): going back to the one before."
                )
                self._open().delete(step)
                continue
            self._saved, self._last = step, time.monotonic()
            return step, arrays
        return None

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return time.monotonic() - self._last >= self._seconds

    def save(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a checkpoint, unless there is one of this update. That it cannot be written stops nobody."""
        if step == self._saved:
            return
        args = _orbax().args
        empty = {name: [array.shape, array.dtype.str] for name, array in arrays.items() if not array.size}
        content = args.Composite(
            arrays=args.StandardSave({name: array for name, array in arrays.items() if array.size}),
            about=args.JsonSave({"digest": _digest(arrays), "empty": empty}),
        )
        self._last = time.monotonic()
        try:
            with _hushed():
                self._open().save(step, args=content)
            self._saved = step
        except Exception as error:  # a full disk is one of many kinds, depending on which library notices it
            self.close()
            kept = "there is none yet" if self._saved is None else f"the last one is of update {self._saved:,}"
            self._warn(
                f"WARNING: no checkpoint could be written at update {step:,} in {self._directory} "
                f"({brief(error)[:200]}): going on without; {kept}."
            )

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> Any:
        if self._manager is None:
            options = _orbax().CheckpointManagerOptions(
                max_to_keep=_KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._manager = _orbax().CheckpointManager(self._directory.resolve(), options=options)
        return self._manager

    def _read(self, step: int) -> dict[str, np.ndarray]:
        args = _orbax().args
        content = args.Composite(arrays=args.StandardRestore(), about=args.JsonRestore())
        found = self._open().restore(step, args=content)
        empty = {name: np.empty(shape, dtype) for name, (shape, dtype) in found.about["empty"].items()}
        arrays = {name: np.asarray(array) for name, array in found.arrays.items()} | empty
        if _digest(arrays) != found.about["digest"]:
            raise ValueError("its contents are not what was written")
        return arrays


def _orbax() -> Any:
    """The library, imported when there is the first checkpoint to read or to write: that takes almost two seconds."""
    from orbax import checkpoint

    return checkpoint


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Where orbax fails, keeps it from telling on stderr of every array that was still on its way."""
    global _usual_hook
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    if sys.unraisablehook is not _without_closed_loops:  # as it is where another thread is in here, too
        _usual_hook = sys.unraisablehook
    sys.unraisablehook = _without_closed_loops
    try:
        yield
    except Exception:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        time.sleep(0.2)
        raise
    finally:
        sys.unraisablehook = _usual_hook
        log.setLevel(level)


_usual_hook: Callable[[Any], object] = sys.unraisablehook


def _without_closed_loops(found: Any) -> None:
    """For `sys.unraisablehook`. Threads of C++ call it, perhaps when another hook has taken its place already: so
    neither of the two goes away. In a lambda that did, a process was once seen to end with a segmentation fault."""
    if "Event loop is closed" not in str(found.exc_value):
        _usual_hook(found)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
