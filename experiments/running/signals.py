"""Ctrl-C, SIGTERM and SIGHUP that lose nothing: the first lets the running work come to an end, a second does not."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

# A scheduler that takes the machine back sends SIGTERM; a terminal that is closed, SIGHUP (which `nohup` ignores).
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):
    _NAMES[signal.SIGHUP] = "SIGHUP"
_USUAL = (signal.default_int_handler, signal.SIG_DFL)
_HANDLERS: dict[Callable[..., None], threading.Event] = {}  # ours that are in place, innermost last, and what they set


@contextlib.contextmanager
def saving_first(tell: Callable[[str], None]) -> Iterator[None]:
    """Lets a signal wait until the end of the block, so that what has been measured is written whatever happens.

    Training inside the block still stops after the running chunk.
    """
    with _handling(lambda name, again: tell(f"{name}: saving what there is first.")) as event:
        yield
    if event.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def first_signal(tell: Callable[[str], None]) -> Iterator[threading.Event]:
    """Makes the first signal set an event, and only the next one raise a KeyboardInterrupt.

    A KeyboardInterrupt that hits Python inside one of JAX's callbacks from the garbage collector is printed and lost.
    """

    def handle(name: str, again: bool):
        if again:
            raise KeyboardInterrupt
        tell(name)

    with _handling(handle) as event:
        yield event


@contextlib.contextmanager
def _handling(handle: Callable[[str, bool], None]) -> Iterator[threading.Event]:
    """Calls `handle` at every signal, with its name and whether there was one before, unless somebody else does."""
    event = threading.Event()
    if _HANDLERS and list(_HANDLERS.values())[-1].is_set():  # asked for between two blocks that are inside another
        event.set()

    def handler(number: int, _frame):
        # A terminal that is closed sends one, and the shell in it another: they are not somebody who loses patience.
        again = event.is_set() and _NAMES[signal.Signals(number)] != "SIGHUP"
        event.set()
        _drop_closed_terminal()
        handle(_NAMES[signal.Signals(number)], again)

    replaced = {}
    if threading.current_thread() is threading.main_thread():
        usual = {number: signal.getsignal(number) for number in _NAMES}
        replaced = {number: old for number, old in usual.items() if old in _USUAL or old in _HANDLERS}
    if replaced:
        _HANDLERS[handler] = event
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield event
    finally:
        for number, old in replaced.items():
            signal.signal(number, old)
        if replaced:
            del _HANDLERS[handler]


def _drop_closed_terminal() -> None:
    """Lets what is printed from now on vanish where the terminal is gone, so that printing does not fail."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
