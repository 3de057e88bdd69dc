"""The command that joins slices of one experiment, against one run of all of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from experiments.cifar import __main__ as cifar
from experiments.cifar import figures
from experiments.compare.reading import find
from experiments.merge import __main__ as merge
from experiments.phase import __main__ as phase
from experiments.results import files
from experiments.spiral import __main__ as spiral

from ...helpers import slow
from ..synthetic import results, run_command

ROOT = Path(__file__).parents[3]
TINY = "--dataset digits --width 1 --epochs 1 --train-examples 64 --validation-examples 20 --evaluations 2".split()
DIAGRAM = "--experiment cifar --dataset digits --widths 1 --epochs 1 --train-examples 64 --evaluations 1".split()
DIAGRAM += ["--periods", "2,2ep"]
COMMAND = "python -m experiments.cifar"  # without flags, as one that was merged is followed by a ;
SPIRAL = "--updates 20 --width 3 --period 5 --curvature 10 --amplitude 5".split()


def command(*arguments) -> int:
    return run_command(merge.main, *arguments)


def load(path: str) -> xr.Dataset:
    return files.load(find(Path(path)))


def assert_same(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Everything but the order in which values were asked for, and who made it."""
    expected = expected.sortby(["seed", "amplitude", "period"])
    assert found.sizes == expected.sizes and set(found.variables) == set(expected.variables)
    for name, variable in expected.variables.items():
        assert found[name].dims == variable.dims and found[name].dtype == variable.dtype
        assert found[name].attrs == variable.attrs
        np.testing.assert_array_equal(found[name].values, variable.values)
    different = {k for k in {**found.attrs, **expected.attrs} if str(found.attrs.get(k)) != str(expected.attrs.get(k))}
    assert different <= {"command", "merged", "images_per_second", "member_updates_per_second"}


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    "main, flags, flag, parts, whole",
    [
        slow(cifar.main, [*TINY, "--curvature", "10"], "--seeds", ["1:3", "1"], "3"),
        slow(spiral.main, SPIRAL, "--seeds", ["1", "1:3"], "3"),
        slow(phase.main, [*DIAGRAM, "--seeds", "2"], "--amplitudes", ["1,5", "2"], "2,5,1"),
    ],
    ids=["cifar", "spiral", "phase"],
)
def test_slices_become_the_run_that_they_are_parts_of(main, flags, flag, parts, whole):
    for value in (*parts, whole):
        assert run_command(main, *flags, flag, value, "--out", f"run-{value}") == 0
    assert command(*(f"run-{value}" for value in parts), "--out", "deep/out") == 0
    assert_same(load("deep/out"), load(f"run-{whole}"))
    usual = lambda directory: {p.name for p in Path(directory).iterdir()} - {"checkpoint"}
    assert usual("deep/out") == usual(f"run-{whole}")
    summaries = [json.loads(next(Path(d).glob("*summary.json")).read_text()) for d in ("deep/out", f"run-{whole}")]
    conditions = [sorted(s["conditions"], key=lambda c: (c["amplitude"], c["period"] or 0)) for s in summaries]
    assert conditions[0] == conditions[1]


# On results that were made without training anything

WHOLE = results(
    seeds=4,
    amplitudes=(1, 5, 2),
    periods=(20.0, 10.0),
    momentum=0.9,
    jax="1",
    command=COMMAND,
    images_per_second=100.0,
    device="1 x cpu",
)


def put(path: str | Path, dataset: xr.Dataset = WHOLE, **config: object) -> None:
    """Leaves a directory as a run does."""
    path = Path(path)
    path.mkdir()
    files.save(dataset.copy(deep=True), path / "results.nc")
    settings = {
        "seeds": dataset.sizes["seed"],
        "width": 1,
        "amplitude": [1.0],
        "run": {"out": path.name},
        "made_by": {},
    }
    (path / "config.json").write_text(json.dumps(settings | config))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with a whole run, with parts of it, and with what is neither."""
    folder = tmp_path_factory.mktemp("runs")
    put(folder / "whole")
    put(folder / "first", WHOLE.isel(seed=[0]))
    rest = WHOLE.isel(seed=[1, 2, 3])
    put(folder / "rest", rest)
    for name, cells in {
        "a": ([1, 5], [20, 10]),
        "b": ([1, 2], [10, 20]),
        "b1": ([1, 2], [10]),
        "b2": ([1, 2], [20]),
        "a1": ([1, 5], [10]),
    }.items():
        put(folder / name, WHOLE.sel(amplitude=cells[0], period=cells[1]), amplitude=cells[0], period=cells[1])
    # What cannot be merged with the first
    put(folder / "half", rest.assign_attrs(finished="false"))
    put(folder / "later", rest.assign_coords(evaluation_step=rest.evaluation_step + 1))
    put(folder / "less", rest.drop_vars("minibatch_loss"))
    put(folder / "diagram", rest.assign_attrs(command="python -m experiments.phase --experiment cifar"))
    put(folder / "bare")
    (folder / "bare" / "config.json").unlink()
    put(folder / "damaged")
    (folder / "damaged" / "results.nc").write_bytes(b"no netCDF")
    return folder


@pytest.fixture
def runs(originals, tmp_path, monkeypatch):
    """Copies of them in the working directory. No figures are drawn: that takes longer than the rest."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("learning_curves", "class_weights"):
        monkeypatch.setattr(figures, name, lambda dataset, path: Path(path).write_bytes(b"a figure"))


@pytest.mark.parametrize(
    "parts",
    [
        ["first", "rest"],
        ["rest", "first"],
        ["whole", "first"],  # an overlap that is the same
        ["a", "b"],
        ["a", "b2", "b1"],
    ],
)
def test_parts_become_the_whole(runs, parts):
    assert command(*parts, "--out", "deep/out") == 0
    assert_same(load("deep/out"), load("whole"))


def test_class_weights_of_a_random_order_are_those_of_the_first_seed(runs):
    """They depend on the seed, and a run has recorded those of its first one."""
    in_random_order = WHOLE.expand_dims(oscillation=["random-order"])
    later = in_random_order.assign(class_weights=in_random_order.class_weights.roll(**{"class": 1}))
    put("early", in_random_order.isel(seed=[0, 1]))
    put("late", later.isel(seed=[2, 3]))
    assert command("late", "early", "--out", "out") == 0
    np.testing.assert_array_equal(
        load("out").class_weights.values, in_random_order.sortby(["amplitude", "period"]).class_weights.values
    )


def test_class_weights_of_the_papers_order_do_not_depend_on_the_seed(runs, capsys):
    put("other", WHOLE.isel(seed=[1, 2]).assign(class_weights=WHOLE.class_weights.roll(**{"class": 1})))
    assert command("first", "other", "--out", "out") == 2
    error = capsys.readouterr().err
    assert "with a different class_weights" in error and error.count("\n") == 1


def test_a_merged_run_says_what_it_is_made_of_and_can_be_merged_again(runs, capsys):
    put("second", WHOLE.isel(seed=[1]).assign_attrs(device="1 x other"))
    put("last", WHOLE.isel(seed=[2, 3]))
    assert command("first", "second", "--out", "two") == 0
    assert "2 runs. Results, summary and figures: two" in capsys.readouterr().out
    config = json.loads(Path("two/config.json").read_text())
    assert config["seeds"] == "0:2" and "run" not in config and "experiments.merge" in config["made_by"]["command"]
    assert command("two", "last", "--out", "four") == 0
    found = load("four")
    assert_same(found.assign_attrs(device=None), load("whole").assign_attrs(device=None))
    assert found.attrs["merged"].count(COMMAND) == 3 and found.attrs["device"] == "1 x cpu; 1 x other"
    assert found.attrs["merged"] in Path("four/summary.md").read_text()
    capsys.readouterr()
    assert run_command(cifar.main, "--resume", "four") == 2  # there is nothing to go on with
    assert "was merged from others: there is nothing to go on with" in capsys.readouterr().err


def test_settings_of_the_whole(runs):
    assert command("a", "b", "--out", "cells") == 0
    config = json.loads(Path("cells/config.json").read_text())
    assert config["amplitude"] == [1, 2, 5] and config["period"] == [10, 20] and config["width"] == 1
    put("late", WHOLE.isel(seed=[1, 3]))
    assert command("first", "late", "--out", "gap") == 0
    assert json.loads(Path("gap/config.json").read_text())["seeds"] == [0, 1, 3]
    assert load("gap").seed.values.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    "attrs, config, named",
    [
        ({}, {"width": 8}, "width 1 and 8"),
        ({}, {"compute_dtype": "bfloat16"}, "compute dtype none and bfloat16"),
        ({}, {"new": [3, 4]}, "new none and 3 4"),
        ({"git_commit": "other"}, {}, "git commit none and other"),
        ({"jax": "2"}, {}, "jax 1 and 2"),
        ({"resumed_with_jax": "2"}, {}, "resumed with jax none and 2"),
        ({"steps_planned": 7}, {}, "steps planned"),
        ({"momentum": 0.5}, {}, "momentum 0.9 and 0.5"),
        ({"dataset": "spiral"}, {}, "dataset cifar10 and spiral"),
    ],
)
def test_whatever_else_differs_is_refused_by_name(runs, capsys, attrs, config, named):
    put("other", WHOLE.isel(seed=[1, 2]).assign_attrs(attrs), **config)
    assert command("first", "other", "--out", "out") == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not Path("out").exists()


def test_overlapping_seeds_that_differ_are_refused(runs, capsys):
    dataset = WHOLE.copy(deep=True)
    dataset.accuracy.loc[{"seed": 0, "amplitude": 5, "period": 10}] += 0.01
    put("other", dataset)
    assert command("first", "other", "--out", "out") == 2
    error = capsys.readouterr().err
    assert "both have seed 0, amplitude 5, period 10, with a different accuracy" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["first"], "at least two RUNs"),
        (["first", "first"], "given twice"),
        (["first", "diagram"], "a run of experiments.cifar, and diagram of experiments.phase"),
        (["a", "b1"], "no run has seed 0, amplitude 2, period 20"),
        (["a1", "b2"], "no run has seed 0, amplitude 2, period 10"),
        (["first", "nowhere"], "does not exist"),
        (["first", "half"], "is not finished: go on with it first"),
        (["first", "bare"], "no readable config.json"),
        (["first", "later"], "the coordinate evaluation_step"),
        (["first", "less"], "what was measured, minibatch_loss"),
        (["first", "damaged"], "is not the results of an experiment"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_sentence(runs, capsys, arguments, says):
    assert command(*arguments, "--out", "out") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not Path("out").exists()


def test_a_directory_with_something_in_it_is_refused(runs, capsys):
    assert command("first", "rest", "--out", "a") == 2
    assert "is not empty" in capsys.readouterr().err
    Path("begun").mkdir()
    Path("begun/config.json").touch()
    assert command("first", "rest", "--out", "begun") == 2
    assert "is not empty" in capsys.readouterr().err
    assert command("first", "rest", "--out", "begun/config.json") == 2
    assert "is a file" in capsys.readouterr().err
    Path("empty").mkdir()
    assert command("first", "rest", "--out", "empty") == 0 and len(list(Path("empty").iterdir())) == 6


def test_a_full_disk_leaves_nothing(runs, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures, "class_weights", full)
    before = set(os.listdir())
    assert command("first", "rest", "--out", "out") == 2
    error = capsys.readouterr().err
    assert "cannot write to out (No space left on device)" in error and error.count("\n") == 1
    assert set(os.listdir()) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGTERM)])
def test_a_merge_that_is_killed_leaves_nothing_or_all(runs, number):
    """Killed while it draws: `--out` is not there, or whole; and the same command works."""
    program = (
        "import sys, time; from experiments.cifar import figures; from experiments.merge.__main__ import main; "
        "draw = figures.class_weights; "
        "figures.class_weights = lambda *a: (print('drawing', flush=True), time.sleep(2), draw(*a)); "
        "main(['first', 'rest', '--out', 'out'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    while "drawing" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert not Path("out").exists()
        assert command("first", "rest", "--out", "out") == 0
    assert len(list(Path("out").iterdir())) == 6
    np.testing.assert_array_equal(load("out").accuracy.values, WHOLE.sortby(["amplitude", "period"]).accuracy.values)
