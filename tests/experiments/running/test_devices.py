"""What the commands share: exit codes, devices and chunks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments.running import devices
from experiments.running.errors import DataError, UsageError
from experiments.running.task import chunk_length
from experiments.running.terminal import console, execute

ROOT = Path(__file__).parents[3]

# Chunks


@pytest.mark.parametrize(
    "num_steps, target, length",
    [
        (312, 39, 39),
        (312, 6, 6),
        (312, 5.4, 6),  # 6/5.4 is less than 5.4/4
        (100, 14, 10),  # 14/10 = 1.40 is less than 20/14 = 1.43
        (97, 9, 9),  # a prime number
        (97, 12, 12),
        (1, 1000, 1),
        (36, 6, 6),  # a square
        (24, 0.001, 1),
        (24, 1e9, 24),
    ],
)
def test_a_chunk_is_the_divisor_nearest_in_ratio(num_steps, target, length):
    assert chunk_length(num_steps, target) == length


def test_a_chunk_divides_the_steps_or_is_as_long_as_it_should_be():
    for num_steps in range(1, 2000):
        chunk = chunk_length(num_steps, 7)
        assert chunk == min(7, num_steps) or (num_steps % chunk == 0 and 7 / 4 <= chunk <= 28)
    assert chunk_length(100_003, 1000) == 1000  # a prime


def test_very_long_runs_are_cut_at_once():
    started = time.perf_counter()
    assert chunk_length(10**12, 1000) == 1000
    assert time.perf_counter() - started < 5


# Exit codes


def code(command):
    with pytest.raises(SystemExit) as caught:
        execute(command)
    return caught.value.code


def raises(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize("finished, expected", [(True, 0), (False, 130)])
def test_a_command_that_returns_exits_with_0_or_130(finished, expected, capsys):
    assert code(lambda: finished) == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [UsageError("this is wrong."), DataError("this is wrong.")])
def test_wrong_use_is_one_sentence_and_2(error, capsys):
    assert code(raises(error)) == 2
    assert capsys.readouterr() == ("", "error: this is wrong.\n")


def test_an_interruption_is_a_sentence_and_130(capsys):
    assert code(raises(KeyboardInterrupt())) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_defect_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        execute(raises(ZeroDivisionError()))


# Devices


def test_all_cores_are_left_alone_once_jax_runs(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    before = jax.devices()
    devices.use_all_cores()
    assert jax.devices() == before


def test_xla_flags_of_the_user_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    monkeypatch.setattr(jax.config, "update", raises(AssertionError("JAX was configured all the same")))
    devices.use_all_cores()


PROGRAM = """
import jax, jax.numpy as jnp
from experiments.running.devices import start_jax
missed = []
jax.monitoring.register_event_listener(lambda name, **_: missed.append(name) if name.endswith("cache_misses") else None)
start_jax(distributed=False)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(len(missed))
"""


def compiled(cache) -> int:
    """How many programs a new process has to compile; it must be silent."""
    env = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    env |= {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.replace("cuda_plugin_extension is not found.\n", "") == ""  # of the extra aot
    return int(done.stdout)


def test_the_second_start_compiles_nothing(tmp_path):
    assert compiled(tmp_path / "new") > 0 == compiled(tmp_path / "new")


def test_a_cache_that_cannot_be_written_is_left_out():
    assert compiled("/proc/nowhere") == 0  # JAX does not even look for it


def test_commands_start_without_what_only_their_end_needs():
    commands = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/__main__.py"))
    program = (
        "import importlib, sys\n"
        f"for command in {commands}:\n"
        "    importlib.import_module(f'experiments.{command}.__main__')\n"
        "    heavy = {'matplotlib', 'scipy.stats', 'orbax.checkpoint', 'tensorflow_datasets'} & set(sys.modules)\n"
        "    assert not heavy, (command, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert len(commands) == 9 and done.returncode == 0, done.stderr


def test_paths_are_printed_as_they_are(capsys):
    console.print("results/[red]x[/y] :smile: " + "long/" * 60)
    assert capsys.readouterr().out == "results/[red]x[/y] :smile: " + "long/" * 60 + "\n"
