"""The directory of a run: made, refused, and what is said when it cannot be written."""

import json
import os

import pytest

from experiments.phase import __main__ as phase
from experiments.running import directory
from experiments.running.errors import UsageError
from experiments.running.flags import parse


def test_a_directory_is_made_with_its_configuration(tmp_path):
    path = directory.new_directory(tmp_path / "a" / "b", "cifar", "cifar10", {"width": 2, "out": tmp_path})
    assert path == tmp_path / "a" / "b"
    assert json.loads((path / "config.json").read_text()) == {"width": 2, "out": str(tmp_path)}


def test_the_default_directory_names_the_command_and_the_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = directory.new_directory(None, "cifar-digits", "digits", {})
    assert path.parent.name == "results" and path.name.startswith("cifar-digits-20")
    assert [file.name for file in path.iterdir()] == ["digits_config.json"]


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {directory.new_directory(None, "cifar", "cifar10", {}) for _ in range(4)}
    assert len(paths) == 4


def test_an_empty_directory_is_taken_and_a_full_one_refused(tmp_path):
    directory.new_directory(tmp_path, "cifar", "digits", {"made_by": {}})
    directory.new_directory(tmp_path, "cifar", "digits", {"made_by": {}})  # the first one never started
    (tmp_path / "digits_results.nc").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="is not empty.*--out"):
        directory.new_directory(tmp_path, "cifar", "digits", {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_configuration_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"precious": 1}')
    with pytest.raises(UsageError, match="is not empty.*--out"):
        directory.new_directory(tmp_path, "cifar", "cifar10", {"made_by": {}})
    assert (tmp_path / "config.json").read_text() == '{"precious": 1}'


@pytest.mark.parametrize("where", ["a file", "below a file", "/proc/x"])
def test_a_directory_that_cannot_be_made_is_one_sentence(where, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    out = {"a file": file, "below a file": file / "x"}.get(where, tmp_path.__class__(where))
    with pytest.raises(UsageError, match="--out") as caught:
        directory.new_directory(out, "cifar", "digits", {})
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied.*--out"):
        directory.new_directory(tmp_path / "x", "cifar", "digits", {})


def test_a_run_of_another_command_is_resumed_by_that_one(tmp_path):
    made_by = {"command": "python -m experiments.spiral --seeds 2"}
    directory.new_directory(tmp_path / "run", "spiral", "spiral", {"seeds": 2, "made_by": made_by})
    with pytest.raises(UsageError, match=f"of another command: .*experiments.spiral --resume {tmp_path / 'run'}$"):
        parse(phase.Config, ["--resume", str(tmp_path / "run")], "phase")
