"""What the commands share: exit codes, devices, directories and chunks."""

import json
import os
import time

import jax
import pytest

from experiments import _run
from experiments._data import DataError
from experiments._run import UsageError

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
    assert _run.chunk_length(num_steps, target) == length


def test_a_chunk_divides_the_steps_or_is_as_long_as_it_should_be():
    for num_steps in range(1, 2000):
        chunk = _run.chunk_length(num_steps, 7)
        assert chunk == min(7, num_steps) or (num_steps % chunk == 0 and 7 / 4 <= chunk <= 28)
    assert _run.chunk_length(100_003, 1000) == 1000  # a prime


def test_very_long_runs_are_cut_at_once():
    started = time.perf_counter()
    assert _run.chunk_length(10**12, 1000) == 1000
    assert time.perf_counter() - started < 5


# Exit codes


def code(command):
    with pytest.raises(SystemExit) as caught:
        _run.run(command)
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
        _run.run(raises(ZeroDivisionError()))


# Devices


def test_all_cores_are_left_alone_once_jax_runs(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    devices = jax.devices()
    _run.use_all_cores()
    assert jax.devices() == devices


def test_xla_flags_of_the_user_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    monkeypatch.setattr(jax.config, "update", raises(AssertionError("JAX was configured all the same")))
    _run.use_all_cores()


# Directories


def test_a_directory_is_made_with_its_configuration(tmp_path):
    path = _run.new_directory(tmp_path / "a" / "b", "cifar", "cifar10", {"width": 2, "out": tmp_path})
    assert path == tmp_path / "a" / "b"
    assert json.loads((path / "config.json").read_text()) == {"width": 2, "out": str(tmp_path)}


def test_the_default_directory_names_the_command_and_the_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = _run.new_directory(None, "cifar-digits", "digits", {})
    assert path.parent.name == "results" and path.name.startswith("cifar-digits-20")
    assert [file.name for file in path.iterdir()] == ["digits_config.json"]


def test_an_empty_directory_is_taken_and_a_full_one_refused(tmp_path):
    _run.new_directory(tmp_path, "cifar", "digits", {})
    _run.new_directory(tmp_path, "cifar", "digits", {})  # the first run never started: there is nothing to lose
    (tmp_path / "digits_results.nc").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is not empty.*--out"):
        _run.new_directory(tmp_path, "cifar", "digits", {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("where", ["a file", "below a file", "/proc/x"])
def test_a_directory_that_cannot_be_made_is_one_sentence(where, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    out = {"a file": file, "below a file": file / "x"}.get(where, tmp_path.__class__(where))
    with pytest.raises(UsageError, match="--out") as caught:
        _run.new_directory(out, "cifar", "digits", {})
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied.*--out"):
        _run.new_directory(tmp_path / "x", "cifar", "digits", {})


def test_paths_are_printed_as_they_are(capsys):
    _run.console.print("results/[red]x[/y] :smile: " + "long/" * 60)
    assert capsys.readouterr().out == "results/[red]x[/y] :smile: " + "long/" * 60 + "\n"
