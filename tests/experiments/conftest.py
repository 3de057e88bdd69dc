import contextlib
import os
import resource
import signal
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments.running import devices


@pytest.fixture
def full_disk():
    """A context manager inside which no file grows beyond 2000 bytes."""

    @contextlib.contextmanager
    def limited():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="module")
def devices_as_they_are():
    """Runs commands with the devices that there are and without a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "use_all_cores", lambda: None)
        patch.setattr(devices, "keep_compiled_programs", lambda: None)
        yield


@pytest.fixture
def sandbox(devices_as_they_are, tmp_path, monkeypatch):
    """Runs a command in a directory of its own, with the devices that there are and without a cache.

    Ctrl-C is as a terminal has it: processes that a shell starts in the background ignore it. Figures are put together
    and their files made, but nothing is drawn in them, which would take longer than the training.
    """
    monkeypatch.chdir(tmp_path)
    draw = Figure.savefig

    def savefig(figure, path, **options):
        Path(path).touch() if isinstance(path, str | os.PathLike) else draw(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
