import signal

import pytest

from experiments import _run


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Runs a command in a directory of its own, with the devices that there are, and Ctrl-C as a terminal has it.

    Processes that a shell starts in the background ignore Ctrl-C.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_run, "use_all_cores", lambda: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
