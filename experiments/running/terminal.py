"""What a command shows and how it ends: the console, the progress of the training, exit codes, times in words."""

import contextlib
import io
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import UsageError


class _Console(Console):
    """Says nothing more where nobody reads any more (`| head`), and lets the work go on: nothing is lost."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)  # paths are printed as they are


def execute(command: Callable[[], bool]) -> NoReturn:
    """Runs a command and exits: 0 done, 2 wrong use (one sentence, no traceback), 130 interrupted (False)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding does not have is replaced
            stream.reconfigure(errors="replace")
    try:
        code = 0 if command() else 130
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("\nInterrupted: nothing more will be written.", file=sys.stderr)
        code = 130
    sys.exit(code)


def warn(text: str) -> None:
    """Prints what must not be missed."""
    console.print(text, style="bold red")


def tell(text: str) -> None:
    """Prints what takes a while, and warnings so that they are not missed."""
    console.print(text, style="bold red" if text.startswith("WARNING") else None)


def progress_bar() -> Progress:
    """A bar with the time left, where there is a terminal for it."""
    columns = (
        BarColumn(12),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or console.quiet)


def duration(seconds: float) -> str:
    """A time to announce, in words."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else "a few seconds"
