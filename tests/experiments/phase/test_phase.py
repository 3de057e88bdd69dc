"""The phase command, in diagrams of a few cells: what it leaves behind, and what it refuses."""

import functools as ft
import json

import jax
import numpy as np
import pytest

from experiments.phase import __main__ as phase
from experiments.problems import spiral as problem
from experiments.results import files
from experiments.running.errors import UsageError
from experiments.running.training import train

from ..synthetic import run_command

TINY = "--amplitudes 1,5,70 --periods 10,20 --seeds 2 --widths 4 --updates 40 --evaluations 4".split()
FILES = {"results.nc", "summary.md", "summary.json", "config.json", "phase.png", "validation_loss.png", "curvature.png"}


pytestmark = pytest.mark.usefixtures("sandbox")
command = ft.partial(run_command, phase.main)


@pytest.mark.parametrize("text, values", [
    ("1,2,5", (1, 2, 5)), ("70", (70,)), ("log:50:5000:3", (50, 500, 5000)), ("lin:1:2:3", (1, 1.5, 2)),
    ("log:2:2:1", (2,)),
])  # fmt: skip
def test_a_grid_is_a_list_or_a_range(text, values):
    assert phase.parse_grid(text, "amplitudes") == pytest.approx(values)


@pytest.mark.parametrize(
    "text", ["", "1,,2", "log:1:2", "log:0:5:3", "log:5:1:3", "log:1:2:0", "cubic:1:2:3", "1:2:3", "log:1:2:3:4"]
)
def test_another_grid_is_one_sentence(text):
    with pytest.raises(UsageError, match="--periods takes a list such as 1,2,5 or a range"):
        phase.parse_grid(text, "periods")


def test_periods_of_a_range_are_whole_updates():
    assert phase.whole(phase.parse_grid("log:50:5000:7", "periods")) == (50, 108, 232, 500, 1077, 2321, 5000)
    assert phase.whole((2.4, 2.6, 3.4)) == (2, 3)


def test_a_diagram_of_the_spiral(tmp_path, capsys):
    """Every cell, against a run of the spiral command with the same amplitude and period."""
    from experiments.spiral import __main__ as spiral

    assert command(*TINY, "--out", "run") == 0
    out = capsys.readouterr().out
    assert "10 members = 2 seeds x 5 losses | 40 updates" in out.splitlines()[0]
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} == FILES
    results = files.load(tmp_path / "run" / "results.nc")
    sizes = {"amplitude": 3, "period": 2, "seed": 2, "split": 2, "evaluation_step": 4, "observation_step": 1}
    assert {name: results.sizes[name] for name in sizes} == sizes and "step" not in results.sizes
    assert results.attrs["finished"] == "true" and results.observation_step.item() == 40
    with jax.enable_x64(True):
        config = spiral.Config(seeds=2, amplitude=(5.0, 70.0), period=(10.0, 20.0), width=(4,), updates=40, curvature=0)
        tasks = spiral.tasks_of(config)
        expected = problem.results(tasks, train(tasks), config.period, config.loss)
    for name in ("accuracy", "loss"):
        found, wanted = (r[name].sel(split="validation").isel(evaluation_step=-1) for r in (results, expected))
        np.testing.assert_allclose(found.values, wanted.values, rtol=1e-9)
    assert np.isfinite(results.hessian_max).all() and np.isfinite(results.ntk_max).all()


def test_a_diagram_of_images_and_of_several_waves(tmp_path, capsys):
    flags = "--experiment cifar --dataset digits --amplitudes 1,5 --periods 2,1.5ep --widths 1 --seeds 2 --epochs 1"
    arguments = [*flags.split(), *"--train-examples 128 --validation-examples 20 --evaluations 1 --wave 4".split()]
    arguments += ["--batch-size", "64", "--compute-dtype", "bfloat16"]
    assert command(*arguments, "--out", "run") == 0
    assert "digits" in capsys.readouterr().out
    results = files.load(tmp_path / "run" / "digits_results.nc")
    assert results.period.values.tolist() == [2, 3]
    assert np.isfinite(results.hessian_max).all() and results.hessian_max.sizes["seed"] == 2
    assert results.attrs["compute_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "run" / "digits_config.json").read_text())["curvature"] == 100
    plan = json.loads((tmp_path / "run" / "checkpoint" / "plan.json").read_text())
    assert plan["wave"] == 4 and len(list((tmp_path / "run" / "checkpoint").glob("wave-*"))) == 2


def test_another_configuration_is_refused_with_the_difference(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert command(*TINY, "--loss", "squared-unit", "--learning-rates", "0.3", "--out", "run") == 0
    capsys.readouterr()
    assert command("--resume", "run", "--seeds", 3, "--loss", "squared-sample") == 2
    error = capsys.readouterr().err
    assert "--seeds 2, not 3" in error and "--loss squared-unit, not squared-sample" in error and error.count("\n") == 1
    started = files.load(tmp_path / "run" / "results.nc").attrs["command"]
    assert "squared-unit" in started
    assert command("--resume", "run", "--seeds", 2) == 0  # what it was started with is no difference
    attrs = files.load(tmp_path / "run" / "results.nc").attrs
    assert attrs["command"] == started and "--resume run" in attrs["resumed_with_command"]
    text = (tmp_path / "run" / "summary.md").read_text()
    assert "plain squared-unit loss" in text and "nats" not in text and "cross-entropy" not in text
    assert command("--resume", "run", "--out", "other") == 2
    assert command("--resume", "nowhere") == 2
    assert "no run that could be resumed" in capsys.readouterr().err


@pytest.mark.parametrize("flags, part", [
    ("--seeds 0", "--seeds takes a number of seeds"),
    ("--seeds 8:8", "--seeds takes a number of seeds"),
    ("--wave 0", "--wave must be at least 1"),
    ("--amplitudes 0.5,2", "--amplitudes must be at least 1"),
    ("--amplitudes 2,2", "different"),
    ("--periods 1", "--periods must be at least 2 updates"),
    ("--periods many", "--periods takes a list"),
    ("--widths 0", "--widths must be at least 1"),
    ("--learning-rates 0", "--learning-rates must be positive"),
    ("--checkpoint-every nan", "--checkpoint-every takes a number of minutes"),
    ("--experiment cifar --widths 4,8", "one width"),
    ("--experiment cifar --loss squared-unit", "--loss has no meaning for --experiment cifar"),
    ("--experiment cifar --updates 7", "--updates has no meaning for --experiment cifar"),
    ("--compute-dtype bfloat16", "--compute-dtype has no meaning for --experiment spiral"),
    ("--epochs 7", "--epochs has no meaning for --experiment spiral"),
])  # fmt: skip
def test_wrong_use_is_one_sentence_and_2(flags, part, tmp_path, capsys):
    assert command(*TINY, "--out", "run", *flags.split()) == 2
    error = capsys.readouterr().err
    assert part in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
