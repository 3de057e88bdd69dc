"""Commands that are started where something is missing, in the way, or about to go away; as processes of their own."""

import contextlib
import importlib.util
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import pytest

from experiments.compare import __main__ as compare
from experiments.running import devices, directory, memory, signals
from experiments.running.errors import UsageError

from ..helpers import slow
from .running.test_resume import ROOT, SPIRAL, finish, results, start, wait_for

SHORT = [*SPIRAL[:-2], "--checkpoint-every", "9"]
ASCII: dict[str, Any] = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


def refused(arguments, **variables: Any) -> str:
    """The one sentence with which a command ends at once."""
    process = start(arguments, **variables)
    out, error = process.communicate(timeout=120)
    sentences = [line for line in error.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(sentences) == 1, out + error
    return sentences[0]


# Terminals


@pytest.mark.slow
def test_a_terminal_that_cannot_show_a_character_gets_another_one(tmp_path):
    assert "dynamical ? static" in finish(start([*SHORT, "--out", tmp_path / "run"], **ASCII))
    assert (tmp_path / "run" / "summary.md").read_text(encoding="utf-8").count("−") > 1
    assert "?" in finish(start(["compare", tmp_path / "run", "--out", tmp_path / "compared"], **ASCII))


def test_help_and_wrong_flags_on_an_ascii_terminal():
    assert "usage" in finish(start(["spiral", "--help"], **ASCII))
    process = start(["spiral", "--no-such-flag-ä"], **ASCII)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in error


def test_what_nobody_reads_any_more_is_no_reason_to_stop(tmp_path):
    """As of `| head -1`, which closes the pipe."""
    code = f"""if True:
        from experiments.running.terminal import console
        for number in range(10_000):
            console.print(number)
        open({str(tmp_path / "saved")!r}, "w").close()
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.wait(60) == 0 and (tmp_path / "saved").exists()
    assert process.stderr is not None and process.stderr.read() == b""
    process.stderr.close()


# What is not there


@pytest.mark.parametrize(
    "command, platform", [(["spiral"], "cuda"), slow(["cifar", "--dataset", "digits"], "nonsense")]
)
def test_a_platform_that_is_not_there_is_a_sentence(command, platform, tmp_path):
    sentence = refused([*command, "--out", tmp_path / "run"], JAX_PLATFORMS=platform)
    assert f"JAX cannot use platform {platform}" in sentence and "JAX_PLATFORMS=cpu" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["h5netcdf", "h5py", "matplotlib", "scipy", "orbax"])
def test_what_only_the_end_needs_is_looked_for_before_the_start(name, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == name else found(n))
    with pytest.raises(UsageError, match=rf"without {name}: pip install"):
        devices.start_jax(distributed=False)
    with pytest.raises(UsageError, match=rf"without {name}: pip install"):
        compare.main(["."])


@pytest.mark.slow
def test_what_turns_out_to_be_broken_at_the_end_leaves_the_results(tmp_path):
    broken = tmp_path / "broken" / "matplotlib"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libfreetype is gone')")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path / "broken")])
    path = os.pathsep.join([str(tmp_path / "broken"), path])
    sentence = refused([*SHORT, "--out", tmp_path / "run"], PYTHONPATH=path)
    assert "libfreetype is gone" in sentence and "mend what cannot be imported" in sentence
    assert results(tmp_path / "run").attrs["finished"] == "true"
    finish(start(["spiral", "--resume", tmp_path / "run"]))
    assert list((tmp_path / "run").glob("*.png"))


# What does not fit


@pytest.mark.parametrize(
    "command",
    [
        slow(["cifar", "--dataset", "digits", "--seeds", "1"]),
        ["phase", "--amplitudes", "1,2", "--periods", "9"],
    ],
    ids=" ".join,
)
def test_a_network_beyond_all_memory_is_refused_at_once(command, tmp_path):
    flag = "--width" if command[0] == "cifar" else "--widths"
    width = "1000000" if command[0] == "cifar" else "100000000000"
    sentence = refused([*command, flag, width, "--out", tmp_path / "run"])
    assert "GB, and the memory has" in sentence and "take a smaller width" in sentence


def test_what_is_noticed_only_by_the_allocator_is_a_sentence_too(monkeypatch):
    from experiments.running import training

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    monkeypatch.setattr(training, "_waves", exhausted)
    with pytest.raises(UsageError, match="does not suffice .*allocating 123 bytes.*: take a smaller width"):
        training.train([None])  # pyright: ignore


def test_the_memory_of_a_small_gpu_is_what_counts(monkeypatch):
    class Gpu:
        def memory_stats(self):
            return {"bytes_limit": 1e9}

    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    memory._refuse_beyond(0.9e9)
    with pytest.raises(UsageError, match="takes 1.1 GB, and the memory has 1.0 GB"):
        memory._refuse_beyond(1.1e9)


# Two at once


@pytest.mark.slow
def test_two_processes_do_not_work_in_the_same_directory(tmp_path):
    out = tmp_path / "run"
    first = start([*SPIRAL, "--out", out])
    wait_for(first, "members")
    before = sorted(path.name for path in out.iterdir() if path.name.endswith("config.json"))
    assert before
    for arguments in ([*SPIRAL, "--out", out], ["spiral", "--resume", out]):
        sentence = refused(arguments)
        assert "another process is at work in" in sentence or "is not empty" in sentence
    finish(first)
    assert results(out).attrs["finished"] == "true"
    finish(start(["spiral", "--resume", out]))


@pytest.mark.slow
def test_of_two_that_start_at_the_same_moment_one_is_refused(tmp_path):
    both = [start([*SHORT, "--out", tmp_path / "run"]) for _ in range(2)]
    ended = [process.communicate(timeout=240) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], ended
    assert "Traceback" not in ended[0][1] + ended[1][1]
    assert results(tmp_path / "run").attrs["finished"] == "true"


def test_a_process_that_is_killed_holds_nothing(tmp_path):
    held = "import sys, time; from pathlib import Path; from experiments.running.directory import lock"
    program = f"{held}; lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_for(holder, "locked")
    with pytest.raises(UsageError, match="another process is at work"):
        directory.lock(tmp_path)
    holder.kill()
    holder.communicate()
    directory.lock(tmp_path)
    directory.lock(tmp_path)  # one's own
    directory.unlock(tmp_path)
    directory.unlock(tmp_path)


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    def acquire(self, **_):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(directory.FileLock, "acquire", acquire)
    directory.lock(tmp_path)
    directory.unlock(tmp_path)


# The end of a terminal


@pytest.fixture
def hangups():
    """SIGHUP has its usual effect here, and in processes that are started, also where the tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hangups")
def test_a_hangup_saves_first(tmp_path):
    process = start([*SPIRAL, "--out", tmp_path / "run"])
    wait_for(process, "of 400 (")
    process.send_signal(signal.SIGHUP)
    assert "--resume" in finish(process, 130)
    assert 0 < results(tmp_path / "run").attrs["steps_done"] < 400


@pytest.mark.slow
@pytest.mark.usefixtures("hangups")
def test_a_terminal_that_is_closed_loses_nothing(tmp_path):
    """A session of its own on a pseudo-terminal, whose other end goes away: what closing a window does."""
    terminal, end = pty.openpty()
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    env = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TERM": "xterm"}
    own = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-m", f"experiments.{SPIRAL[0]}", *SPIRAL[1:], "--out", str(tmp_path / "run")]
    process = subprocess.Popen(  # not `pty.fork`, about which JAX warns as soon as it has computed something
        [sys.executable, "-c", own, *command],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stdin=end,
        stdout=end,
        stderr=end,
    )
    os.close(end)
    closed = threading.Event()

    def read():  # a terminal that nobody reads from blocks those who write to it
        with contextlib.suppress(OSError):
            while not closed.is_set() and os.read(terminal, 1024):
                pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    checkpoint = tmp_path / "run" / "checkpoint"
    deadline = time.monotonic() + 120
    while not any(checkpoint.rglob("_CHECKPOINT_METADATA")) and time.monotonic() < deadline:
        time.sleep(0.05)
    closed.set()
    reader.join()
    os.close(terminal)
    assert process.wait(timeout=120) == 130
    assert 0 < results(tmp_path / "run").attrs["steps_done"] <= 400
    finish(start(["spiral", "--resume", tmp_path / "run"]))
    assert results(tmp_path / "run").attrs["finished"] == "true"


@pytest.mark.usefixtures("hangups")
def test_a_second_hangup_is_no_impatience():
    told = []
    with pytest.raises(KeyboardInterrupt), signals.first_signal(told.append) as event:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert event.is_set() and told == ["SIGHUP", "SIGHUP"]
        signal.raise_signal(signal.SIGTERM)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.first_signal(lambda name: None) as event:
            signal.raise_signal(signal.SIGHUP)
            assert not event.is_set() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# Without jit


@pytest.mark.slow
@pytest.mark.parametrize("command", ["spiral", "cifar"])
def test_commands_run_without_jit(command, tmp_path):
    arguments = {
        "spiral": "spiral --seeds 1 --width 2 --updates 2 --period 2 --curvature 0",
        "cifar": "cifar --dataset digits --seeds 1 --width 1 --epochs 1 --batch-size 4 --train-examples 4 "
        "--validation-examples 4 --evaluations 1",
    }[command]
    finish(start([*arguments.split(), "--out", tmp_path / "run"], JAX_DISABLE_JIT="1"))
