"""The CIFAR-10 command, on scikit-learn's digits with tiny networks, and from Ctrl-C to a full directory."""

import dataclasses
import functools as ft
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from PIL import Image

from eqx_dynloss.schedule import OscillatingWeights
from experiments.cifar import __main__ as cifar
from experiments.problems import cifar as problem
from experiments.problems import images, prepare, presets
from experiments.problems.cifar import (
    Standardise,
    datasets,
    flops_per_image,
    parse_period,
)
from experiments.problems.images import ImageData
from experiments.problems.optimiser import nesterov, oscillating_nesterov
from experiments.problems.oscillation import OscillatingRate
from experiments.problems.presets import PRESETS
from experiments.results import files
from experiments.running.errors import UsageError
from experiments.running.terminal import console

from ...helpers import slow
from .. import synthetic
from ..synthetic import class_weights, interrupt_after, run_command

ROOT = Path(__file__).parents[3]
# Seven updates on digits with a network of two channels
TINY = [*"--dataset digits --width 2 --epochs 1 --batch-size 16 --train-examples 112 --validation-examples 30".split()]
FILES = {"results.nc", "summary.md", "summary.json", "config.json", "learning_curves.png", "class_weights.png"}


command = ft.partial(run_command, cifar.main)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch, sandbox):
    """Keeps every test away from the user's directories and from the network."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("XDG_CACHE_HOME", "TFDS_DATA_DIR", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # where urllib keeps the proxies it saw first
    monkeypatch.setattr(prepare, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")  # nothing listens there


@pytest.fixture
def linear(monkeypatch):
    """Trains a linear classifier in place of Myrtle, which compiles in a fraction of the time."""

    class Linear(eqx.Module):
        layer: eqx.nn.Linear

        def __init__(self, width, *, compute_dtype, key):
            self.layer = eqx.nn.Linear(4 * 4 * 3, 10, key=key)

        def __call__(self, x):
            return self.layer(x[::2, ::2].reshape(-1))

    monkeypatch.setattr(problem, "Myrtle", Linear)


# Periods


@pytest.mark.parametrize("text, steps", [
    ("250", 250), ("2.5", 2.5), ("1e3", 1000), (" 7 ", 7), ("0.5ep", 39), ("2 epochs", 156), ("1epoch", 78),
    ("1e1ep", 780), ("+3", 3), ("1e-1ep", 7.8),
])  # fmt: skip
def test_a_period_is_in_steps_or_in_epochs(text, steps):
    assert parse_period(text, 78) == pytest.approx(steps)


@pytest.mark.parametrize(
    "text", ["", "ep", "often", "5 steps", "1e", "--", "0", "0ep", "-5", "-1ep", "nan", "inf", "1e999", "5ep5", "1,5"]
)
def test_another_period_is_one_sentence(text):
    with pytest.raises(UsageError) as caught:
        parse_period(text, 78)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# The optimiser


def rate(count, peak, num_steps):
    """The paper's learning rate, in NumPy."""
    return peak * np.interp(count, [0, 3 / 7 * num_steps, num_steps], [0, 1, 0.1])


def rate_at(optimiser: Any, count: int, **hyperparams) -> float:
    """The learning rate of a momentum-free optimiser at a count, read off an update."""
    state = optimiser.init({"x": jnp.ones(())})
    at = lambda leaf: jnp.full_like(leaf, count) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf
    state = jax.tree.map(at, state)
    state = state._replace(hyperparams=state.hyperparams | hyperparams)
    updates, _ = optimiser.update({"x": jnp.ones(())}, state)
    return -float(updates["x"])


@pytest.mark.parametrize("num_steps", [7, 14, 700])
def test_the_rate_rises_from_0_to_its_peak_and_falls_to_a_tenth(num_steps):
    optimiser = nesterov(0.4, 0.0, num_steps)
    for count in sorted({0, 1, 2 * num_steps // 7, 3 * num_steps // 7, 5 * num_steps // 7, num_steps - 1, num_steps}):
        assert rate_at(optimiser, count) == pytest.approx(rate(count, 0.4, num_steps), rel=1e-5, abs=1e-7)
    assert rate_at(optimiser, 0) == 0
    assert rate_at(optimiser, 3 * num_steps // 7) == pytest.approx(0.4)
    assert rate_at(optimiser, num_steps) == rate_at(optimiser, 10 * num_steps) == pytest.approx(0.04)


def test_the_control_oscillates_with_the_weight_of_the_active_class_and_its_mean():
    """Every member with its own amplitude and period, in NumPy; the static one as without."""
    amplitudes, periods, stop = np.array([1.0, 5.0, 20.0]), np.array([4.0, 4.0, 10.0]), 60
    schedule = OscillatingWeights(10, amplitudes, periods, stop=np.full(3, stop))
    optimiser, own = oscillating_nesterov(0.4, 0.0, 70, OscillatingRate(schedule))
    for member, (amplitude, period) in enumerate(zip(amplitudes, periods, strict=True)):
        peak = 1 + (amplitude - 1) * (1 - abs(2 * np.arange(period) / period - 1))
        factor = 10 * peak / (peak + 9)
        factor /= factor.mean()
        hyperparams = {name: jnp.asarray(values[member]) for name, values in own.items()}
        for count in (1, 7, 22, 33, 59, 60, 69):
            expected = rate(count, 0.4, 70) * (factor[int(count % period)] if count < stop else 1)
            assert rate_at(optimiser, count, **hyperparams) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_the_shortest_runs_have_finite_rates(num_steps):
    rates = [rate_at(nesterov(0.4, 0.0, num_steps), count) for count in range(num_steps)]
    assert np.isfinite(rates).all() and max(rates) <= 0.4 * (1 + 1e-6) and min(rates) >= 0


def test_members_may_differ_in_the_peak():
    assert rate_at(nesterov(0.4, 0.0, 70), 30, learning_rate=jnp.asarray(3.0)) == pytest.approx(3.0)


def test_the_update_is_nesterovs():
    optimiser: Any = nesterov(0.3, 0.9, 14)
    reference: Any = optax.sgd(lambda count: 0.3 * jnp.interp(jnp.asarray(count, float), jnp.array([0.0, 6, 14]),
                                                         jnp.array([0.0, 1, 0.1])), 0.9, nesterov=True)  # fmt: skip
    state, expected_state = optimiser.init(jnp.zeros(3)), reference.init(jnp.zeros(3))
    velocity = np.zeros(3)
    for count, grads in enumerate(np.random.default_rng(0).normal(size=(14, 3)).astype(np.float32)):
        updates, state = optimiser.update(jnp.asarray(grads), state)
        expected, expected_state = reference.update(jnp.asarray(grads), expected_state)
        velocity = 0.9 * velocity + grads
        by_hand = -rate(count, 0.3, 14) * (grads + 0.9 * velocity)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(updates, by_hand, rtol=1e-5, atol=1e-7)


# The protocol


def test_work_is_counted_as_three_forward_passes():
    assert flops_per_image(64) == pytest.approx(0.304e9, rel=0.01)


def made_up(train=60, validation=20, size=4) -> ImageData:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (train + validation, size, size, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, train + validation).astype(np.int32)
    return ImageData("cifar10", "made up", pixels[:train], labels[:train], pixels[train:], labels[train:])


class Stop(Exception):
    """Raised in place of the training."""


def captured(monkeypatch, data: ImageData, *arguments) -> SimpleNamespace:
    """What the command hands to the training loop."""

    def train(tasks, **rest):
        (task,) = tasks
        seen.__dict__.update(states=task.members.init(), losses=task.members.losses, data=task.data, splits=task.splits)
        seen.__dict__.update(dataclasses.asdict(task.plan))
        raise Stop

    seen = SimpleNamespace()
    monkeypatch.setattr(cifar, "train", train)
    monkeypatch.setattr(images, "load", lambda *args, **kwargs: data)
    with pytest.raises(Stop):
        cifar.main([*map(str, arguments)])
    return seen


def test_the_paper_preset_is_the_papers_protocol(monkeypatch, capsys):
    seen = captured(monkeypatch, made_up(50_000, 10_000, size=32), "--preset", "paper", "--seeds", 1)
    model = jax.tree.map(lambda leaf: leaf[0], eqx.filter(seen.states.model, eqx.is_array))
    weights, biases = ([leaf.size for leaf in jax.tree.leaves(model) if (leaf.ndim == 1) == b] for b in (False, True))
    assert (sum(weights), sum(biases)) == (112_960, 266)
    assert seen.batch_size == 512 and len(seen.data) == 50_000 and len(seen.splits["validation"]) == 10_000
    epoch = 97  # full batches
    assert seen.num_steps == 700 * epoch
    assert seen.num_evaluations == 700 and seen.num_steps % seen.chunk == 0 and epoch % seen.chunk == 0
    np.testing.assert_array_equal(seen.losses.schedule.stop, 600 * epoch)
    np.testing.assert_array_equal(seen.losses.schedule.amplitude, [1, 10])
    np.testing.assert_array_equal(seen.losses.schedule.period[1], 100)
    momentum_free = nesterov(PRESETS["paper"].learning_rate, 0.0, seen.num_steps)
    for at, value in {0: 0.0, 150: 0.01, 300: 0.02, 500: 0.011, 700: 0.002}.items():
        assert rate_at(momentum_free, at * epoch) == pytest.approx(value, rel=1e-4)
    hyperparams = seen.states.opt_state.hyperparams
    np.testing.assert_allclose(hyperparams["learning_rate"], 0.02)
    np.testing.assert_allclose(hyperparams["momentum"], 0.9)
    first = capsys.readouterr().out.splitlines()[0]
    assert "67,900 steps of 512 images" in first and "preset paper (as asked)" in first and "CIFAR-10" in first


def test_the_quick_preset_is_the_default_on_a_cpu(monkeypatch, capsys):
    seen = captured(monkeypatch, made_up(600, 100), "--seeds", 2, "--width", 2)
    assert seen.num_steps == 100 * (500 // 32) and len(seen.states.step) == 4
    np.testing.assert_array_equal(seen.losses.schedule.stop, round(6 / 7 * 100 * 15))
    assert "preset quick (no accelerator was found)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, steps",
    [("", 33 * 46), ("--epochs 4", 4 * 46), ("--train-examples 100", 33 * 3), ("--preset paper --epochs 2", 2 * 2)],
)
def test_what_stands_in_is_used_whole_in_as_many_steps_unless_told_otherwise(monkeypatch, flags, steps):
    data = dataclasses.replace(made_up(1500, 100), name="digits")
    assert captured(monkeypatch, data, "--seeds", 1, "--width", 1, *flags.split()).num_steps == steps


def test_the_short_preset_is_the_default_on_an_accelerator(monkeypatch, capsys):
    monkeypatch.setattr(presets, "jax", SimpleNamespace(devices=lambda: [SimpleNamespace(platform="gpu")]))
    seen = captured(monkeypatch, made_up(1024, 100), "--seeds", 2)
    assert seen.num_steps == 100 * 2 and seen.batch_size == 512
    np.testing.assert_array_equal(seen.losses.schedule.amplitude, [1, 1, 20, 20])
    np.testing.assert_array_equal(seen.losses.schedule.period[2:], 2)  # an epoch
    printed = capsys.readouterr().out
    assert "preset short (an accelerator was found)" in printed and "bfloat16" in printed


@pytest.mark.parametrize("evaluations", [1, 2, 8, 39])
def test_there_are_as_many_evaluations_as_asked_for(monkeypatch, evaluations):
    data = made_up(5000, 100)
    seen = captured(monkeypatch, data, "--seeds", 1, "--width", 1, "--evaluations", evaluations)
    assert seen.num_steps // seen.chunk >= evaluations


def test_the_conditions_share_their_seeds(monkeypatch):
    arguments = "--seeds 3 --width 1 --epochs 1 --batch-size 20 --amplitude 5 1 9 --period 3 2ep --stop-epoch 0.5"
    seen = captured(monkeypatch, made_up(), *arguments.split())
    schedule = seen.losses.schedule
    np.testing.assert_array_equal(schedule.amplitude, np.repeat([1, 5, 5, 9, 9], 3))
    np.testing.assert_array_equal(schedule.period[3:], np.repeat([3, 6, 3, 6], 3))
    np.testing.assert_array_equal(schedule.stop, 2)  # round(1.5)
    for leaf in [*jax.tree.leaves(eqx.filter(seen.states.model, eqx.is_array)), jax.random.key_data(seen.states.key)]:
        for condition in range(1, 5):
            np.testing.assert_array_equal(leaf[:3], leaf[3 * condition : 3 * condition + 3])
        assert leaf.ndim == 2 and not leaf.any() or not np.array_equal(leaf[0], leaf[1])  # biases start at 0


# Data


def test_images_are_standardised_with_the_training_sets_statistics():
    data = made_up()
    train, validation = datasets(data, dataclasses.replace(PRESETS["quick"], train_examples=40, validation_examples=7))
    assert (len(train), len(validation)) == (40, 7)
    assert train.inputs.dtype == validation.inputs.dtype == jnp.uint8
    np.testing.assert_array_equal(train.inputs, data.train_images[:40])
    np.testing.assert_array_equal(validation.labels, data.validation_labels[:7])
    pixels = data.train_images[:40].astype(np.float64)
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    out = np.asarray(train.transform(train.inputs))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, rtol=1e-5)
    expected = (data.validation_images[:7] - mean) / std
    np.testing.assert_allclose(validation.transform(validation.inputs), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(validation.transform(validation.inputs[3]), expected[3], rtol=1e-5, atol=1e-5)


def test_all_examples_are_used_unless_told_otherwise():
    preset = dataclasses.replace(PRESETS["paper"], train_examples=None, validation_examples=None)
    assert [len(part) for part in datasets(made_up(), preset)] == [60, 20]


def test_standardising_keeps_the_precision_of_the_statistics(x64):
    standardise = Standardise(jnp.zeros(3), jnp.ones(3))
    assert standardise(jnp.zeros((2, 4, 4, 3), jnp.uint8)).dtype == jnp.float64


# A whole run


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory, devices_as_they_are):
    """A finished run of 2 seeds, 2 amplitudes and 2 periods; its directory, its first line and its arguments."""
    directory = tmp_path_factory.mktemp("run") / "out"
    flags = f"--seeds 2 --amplitude 5 20 --period 2 0.5ep --evaluations 3 --out {directory}"
    arguments = [*TINY, *flags.split()]
    with console.capture() as capture:
        assert command(*arguments) == 0
    return SimpleNamespace(path=directory, output=capture.get(), arguments=arguments)


@pytest.fixture(scope="module")
def results(run_directory) -> xr.Dataset:
    return files.load(run_directory.path / "digits_results.nc")


def test_every_file_is_there_and_says_digits(run_directory):
    written = {path.name for path in run_directory.path.iterdir() if path.is_file()}
    assert written == {f"digits_{name}" for name in FILES}
    for name in ("learning_curves", "class_weights"):
        with Image.open(run_directory.path / f"digits_{name}.png") as figure:
            assert figure.format == "PNG" and min(figure.size) > 300
            assert "digits" in figure.info["Title"]
            assert len(figure.convert("L").getcolors() or range(9)) > 2
    assert "NOT CIFAR-10" in (run_directory.path / "digits_summary.md").read_text()


@pytest.mark.parametrize("dataset, preset, gain, pointed", [
    ("cifar10", "quick", 0.0, True), ("cifar10", "quick", 0.1, False), ("cifar10", "short", 0.0, False),
    ("digits", "quick", 0.0, False)])  # fmt: skip
def test_a_quick_run_that_does_not_establish_a_gain_points_to_one_that_does(
    dataset, preset, gain, pointed, tmp_path, capsys
):
    run = synthetic.results(seeds=8, dataset=dataset, preset=preset, images_per_second=1.0)
    run.accuracy.loc[{"amplitude": 10}] += gain
    run.accuracy.loc[{"amplitude": 10, "seed": 0}] -= 0.2 * (gain == 0)
    cifar.write_outputs(run, tmp_path)
    assert ("python -m experiments.cifar --preset quick --train-examples 1000" in capsys.readouterr().out) == pointed


@pytest.mark.parametrize(
    "learned, gain, said", [(0.66, -0.01, True), (0.66, 0.01, False), (0.97, -0.01, False), (np.nan, -0.01, False)]
)
def test_a_loss_that_was_not_overfitted_is_called_so_where_nothing_was_gained(learned, gain, said, tmp_path, capsys):
    run = synthetic.results(seeds=8, preset="paper", images_per_second=1.0)
    run.accuracy.loc[{"split": "train", "amplitude": 1}] = learned
    run.accuracy.loc[{"split": "validation", "amplitude": 10}] = (
        run.accuracy.sel(split="validation", amplitude=1) + gain
    )
    cifar.write_outputs(run, tmp_path)
    assert ("static loss has only 66% of its training set" in " ".join(capsys.readouterr().out.split())) == said


def test_the_first_line_says_what_is_going_to_happen(run_directory):
    first, *rest = run_directory.output.splitlines()
    for part in (" x cpu", "10 members = 2 seeds x 5 losses", "7 steps of 16 images", "digits (stand-in, not CIFAR-10)",
                 "112 + 30 images", "preset quick (no accelerator was found)"):  # fmt: skip
        assert part in first
    progress = [line for line in rest if line.startswith("update ")]
    assert [line.split(" (")[0] for line in progress] == ["update 3 of 7", "update 5 of 7", "update 7 of 7"]
    assert [" to go)" in line for line in progress] == [True, True, False]
    assert str(run_directory.path) in rest[-1] and "nan" not in run_directory.output


def test_the_results_have_named_dimensions(results):
    sizes = {"amplitude": 3, "period": 2, "seed": 2, "split": 2, "evaluation_step": 3, "step": 7, "class": 10}
    assert dict(results.sizes) == sizes
    assert results.amplitude.values.tolist() == [1, 5, 20] and results.period.values.tolist() == [2, 3.5]
    assert results.seed.values.tolist() == [0, 1] and results.split.values.tolist() == ["train", "validation"]
    assert results.evaluation_step.values.tolist() == [3, 5, 7]
    assert results["class"].values.tolist() == [str(digit) for digit in range(10)]
    assert (results.diverged_at == -1).all()


def test_accuracies_are_fractions_and_losses_positive(results):
    validation, training = (results.accuracy.sel(split=split) for split in ("validation", "train"))
    assert np.isfinite(validation).all() and (validation >= 0).all() and (validation <= 1).all()
    assert np.isnan(training[..., :-1]).all() and np.isfinite(training[..., -1]).all()
    np.testing.assert_allclose(validation * 30, np.round(validation * 30), atol=1e-4)
    np.testing.assert_allclose(results.minibatch_accuracy * 16, np.round(results.minibatch_accuracy * 16), atol=1e-5)
    assert (results.minibatch_loss > 0).all() and (results.loss.sel(split="validation") > 0).all()


def test_the_static_loss_is_repeated_along_the_period(results):
    static = results.isel(amplitude=0).drop_vars("period")
    xr.testing.assert_identical(static.isel(period=0), static.isel(period=1))


def test_class_weights_are_those_of_the_schedule(results):
    for amplitude in (1, 5, 20):
        for period in (2, 3.5):
            expected = class_weights(amplitude, None if amplitude == 1 else period, 7)
            actual = results.class_weights.sel(amplitude=amplitude, period=period)
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(results.class_weights.isel(step=[0, 6]), 1, rtol=1e-6)  # begins plain, ends plain


def test_seeds_are_paired(results):
    """At step 0 all weights are 1: the same network on the same examples has the same loss, whatever A and T are."""
    first = results.minibatch_loss.isel(step=0)
    static = first.isel(amplitude=0, period=0)
    np.testing.assert_allclose(first, static.broadcast_like(first), rtol=1e-6)
    assert static[0] != static[1]
    later = results.minibatch_loss.isel(step=5)
    assert (later.isel(amplitude=1) != later.isel(amplitude=0)).any()


def test_the_results_say_how_they_were_made(results, run_directory):
    attrs = results.attrs
    assert attrs["command"] == shlex.join(["python", "-m", "experiments.cifar", *run_directory.arguments])
    assert attrs["finished"] == "true" and attrs["dataset"] == "digits" and "scikit-learn" in attrs["source"]
    assert (attrs["steps_done"], attrs["steps_planned"], attrs["steps_per_epoch"]) == (7, 7, 7)
    assert attrs["jax"] == jax.__version__ and {"equinox", "optax", "numpy", "python", "platform"} <= set(attrs)
    assert attrs["device"].endswith("x cpu") and attrs["images_per_second"] > 0
    config = json.loads((run_directory.path / "digits_config.json").read_text())
    given = {"seeds": 2, "amplitude": [5, 20], "period": ["2", "0.5ep"], "width": 2, "dataset": "digits"}
    assert given.items() <= config.items()
    assert config["learning_rate"] == PRESETS["quick"].learning_rate and config["preset"] == "quick"


def test_the_summary_agrees_with_the_results(results, run_directory):
    summary = json.loads((run_directory.path / "digits_summary.json").read_text())
    assert summary["finished"] and len(summary["conditions"]) == 5
    last = summary["conditions"][-1]
    chosen = results.accuracy.sel(amplitude=20, period=3.5, split="validation").isel(evaluation_step=-1)
    estimate = last["outcomes"]["validation"]["accuracy"]
    assert estimate["mean"] == pytest.approx(float(chosen.mean()))
    static = results.accuracy.sel(amplitude=1, period=2, split="validation").isel(evaluation_step=-1)
    difference = last["differences"]["validation"]["accuracy"]
    assert difference["mean"] == pytest.approx(float((chosen - static).mean()), abs=1e-7)


@pytest.mark.slow
def test_the_same_command_gives_the_same_arrays(results, run_directory, tmp_path):
    arguments = [str(tmp_path / "again") if a == str(run_directory.path) else a for a in run_directory.arguments]
    assert command(*arguments) == 0
    again = files.load(tmp_path / "again" / "digits_results.nc")
    for name in results.variables:
        assert again[name].dtype == results[name].dtype
        np.testing.assert_array_equal(again[name], results[name])


# Other ways for a run to go


@pytest.mark.slow
def test_every_network_learns_the_digits_that_stand_in(tmp_path):
    """With the preset as it is; enlarged to 32×32, half of them never left chance."""
    flags = "--dataset digits --seeds 2 --amplitude 1 --evaluations 1"
    assert command(*flags.split(), "--out", tmp_path / "run") == 0
    accuracy = files.load(tmp_path / "run" / "digits_results.nc").accuracy.isel(evaluation_step=-1)
    assert accuracy.min() > 0.9


def test_a_slice_of_the_seeds_is_the_same_members(results, run_directory, tmp_path):
    flags = [str(tmp_path / "slice") if a == str(run_directory.path) else a for a in run_directory.arguments]
    flags[flags.index("--seeds") + 1] = "1:3"
    assert command(*flags) == 0
    part = files.load(tmp_path / "slice" / "digits_results.nc")
    assert part.seed.values.tolist() == [1, 2]
    for name in ("minibatch_loss", "accuracy"):
        np.testing.assert_array_equal(part[name].sel(seed=1), results[name].sel(seed=1))
        assert (part[name].sel(seed=2) != results[name].sel(seed=1)).any()


@pytest.mark.parametrize("oscillation", ["learning-rate", slow("random-order")])
def test_what_oscillates_may_be_another(oscillation, results, run_directory, tmp_path):
    """The static members stay what they are; the others do not, and titles say so."""
    flags = [str(tmp_path / "run") if a == str(run_directory.path) else a for a in run_directory.arguments]
    flags.remove("0.5ep")  # half an update too much for a learning rate
    assert command(*flags, "--oscillation", oscillation) == 0
    other, paper = files.load(tmp_path / "run" / "digits_results.nc"), results.sel(period=[2])
    assert other.oscillation.item() == oscillation and "oscillation" not in paper.coords
    np.testing.assert_array_equal(other.loss.isel(amplitude=0), paper.loss.isel(amplitude=0))
    assert not np.array_equal(other.minibatch_loss.isel(amplitude=1), paper.minibatch_loss.isel(amplitude=1))
    if oscillation == "learning-rate":
        assert (other.class_weights == 1).all() and not (tmp_path / "run" / "digits_class_weights.png").exists()
    else:
        np.testing.assert_array_equal(np.sort(other.class_weights, -1), np.sort(paper.class_weights, -1))
    words = {"learning-rate": "oscillating learning rate", "random-order": "random order"}[oscillation]
    assert f"({words})" in (tmp_path / "run" / "digits_summary.md").read_text().splitlines()[0]


def test_the_network_may_compute_in_bfloat16(results, run_directory, tmp_path, capsys):
    out = tmp_path / "rounded"
    arguments = [str(out) if a == str(run_directory.path) else a for a in run_directory.arguments]
    assert command(*arguments, "--compute-dtype", "bfloat16") == 0
    assert "bfloat16 (no faster than float32 on a CPU)" in capsys.readouterr().out.splitlines()[0]
    rounded = files.load(out / "digits_results.nc")
    assert (results.attrs["compute_dtype"], rounded.attrs["compute_dtype"]) == ("float32", "bfloat16")
    assert "- compute dtype: `bfloat16`" in (out / "digits_summary.md").read_text()
    assert json.loads((out / "digits_config.json").read_text())["compute_dtype"] == "bfloat16"
    np.testing.assert_allclose(rounded.minibatch_loss, results.minibatch_loss, rtol=0.02)
    assert (rounded.minibatch_loss != results.minibatch_loss).any()
    assert command("--resume", out, "--compute-dtype", "float32") == 2
    assert "--compute-dtype bfloat16, not float32" in capsys.readouterr().err


def test_auto_falls_back_to_digits_and_says_so_everywhere(linear, tmp_path, capsys):
    flags = [*TINY[2:], "--seeds", "2", "--amplitude", "1", "--out", tmp_path / "out"]
    assert command(*flags) == 0
    out = capsys.readouterr().out
    warning, header = out.splitlines()[:2]
    assert warning.startswith("WARNING") and "digits instead of CIFAR-10" in warning
    assert "digits" in header and "NOT CIFAR-10" in out
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        f"digits_{name}" for name in FILES
    }
    for name in ("summary.md", "summary.json", "config.json"):
        assert "digits" in (tmp_path / "out" / f"digits_{name}").read_text()
    assert files.load(tmp_path / "out" / "digits_results.nc").attrs["dataset"] == "digits"


def test_amplitude_1_trains_the_static_loss_alone_and_out_may_be_left_out(linear, capsys):
    assert command(*TINY, "--seeds", 1, "--amplitude", 1) == 0
    assert "1 members = 1 seeds x 1 losses" in capsys.readouterr().out
    (directory,) = Path("results").iterdir()
    assert directory.name.startswith("cifar-digits-20")
    assert {path.name for path in directory.iterdir() if path.is_file()} == {f"digits_{name}" for name in FILES}
    results = files.load(directory / "digits_results.nc")
    assert results.amplitude.values.tolist() == [1] and (results.class_weights == 1).all()


def test_members_that_diverge_are_reported(tmp_path, capsys):
    assert command(*TINY, "--seeds", 2, "--learning-rate", 1e30, "--out", tmp_path / "out") == 0
    assert "DIVERGED" in capsys.readouterr().out
    assert "DIVERGED" in (tmp_path / "out" / "digits_summary.md").read_text()
    summary = json.loads((tmp_path / "out" / "digits_summary.json").read_text())
    results = files.load(tmp_path / "out" / "digits_results.nc").squeeze("period")
    assert results.attrs["finished"] == "true"
    for i, condition in enumerate(summary["conditions"]):  # a network whose units all died may survive
        member = results.isel(amplitude=i)
        lost = [int(seed) for seed in member.seed if member.diverged_at.sel(seed=seed) >= 0]
        assert condition["diverged"] == lost != []
        for seed in lost:
            at = int(member.diverged_at.sel(seed=seed))
            assert 0 < at < 7 and np.isnan(member.minibatch_loss.sel(seed=seed)[at + 1 :]).all()
            assert np.isfinite(member.minibatch_loss.sel(seed=seed)[:at]).all()


def test_a_run_interrupted_before_any_evaluation_leaves_what_it_has(linear, tmp_path, capsys, monkeypatch, chunks=1):
    interrupt_after(chunks, monkeypatch)
    flags = ["--seeds", 2, "--evaluations", 3, "--out", tmp_path / "out"]
    assert command(*TINY, *flags) == 130
    out = capsys.readouterr().out
    assert f"INTERRUPTED after {chunks} of 7 updates" in out and "nan" not in out
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        f"digits_{name}" for name in FILES
    }
    results = files.load(tmp_path / "out" / "digits_results.nc")
    assert results.attrs["finished"] == "false" and results.attrs["steps_done"] == chunks == results.sizes["step"]
    assert results.class_weights.sizes["step"] == chunks


def test_the_curvature_is_observed_at_every_evaluation(linear, tmp_path, monkeypatch):
    flags = [*TINY, "--seeds", 2, "--evaluations", 3, "--curvature", 20]
    assert command(*flags, "--out", tmp_path / "whole") == 0
    whole = files.load(tmp_path / "whole" / "digits_results.nc")
    np.testing.assert_array_equal(whole.observation_step, whole.evaluation_step)
    peak, static = whole.peak_hessian_max, whole.static_hessian_max
    assert np.isfinite(peak).all() and np.isfinite(whole.static_hessian_max_error).all() and (static > 0).all()
    np.testing.assert_allclose(peak.sel(amplitude=1), static.sel(amplitude=1), rtol=1e-5)
    rate = nesterov(PRESETS["quick"].learning_rate, 0.0, 7)
    expected = [rate_at(rate, step) for step in whole.observation_step.values]
    np.testing.assert_allclose(whole.step_size, expected, rtol=1e-5)

    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert command(*flags, "--out", tmp_path / "half") == 130
    half = files.load(tmp_path / "half" / "digits_results.nc")
    assert 0 < half.sizes["observation_step"] < 3 and np.isfinite(half.peak_hessian_max).all()
    assert command("--resume", tmp_path / "half") == 0
    resumed = files.load(tmp_path / "half" / "digits_results.nc")
    for name in ("peak_hessian_max", "static_hessian_max", "step_size", "accuracy"):
        np.testing.assert_array_equal(resumed[name].values, whole[name].values)


def test_it_can_be_switched_off(linear, tmp_path):
    assert command(*TINY, "--seeds", 1, "--curvature", 0, "--out", tmp_path / "out") == 0
    assert "observation_step" not in files.load(tmp_path / "out" / "digits_results.nc").dims


# Wrong use


def wrong(capsys, tmp_path, *arguments, out=None) -> str:
    """The one sentence on stderr of a command that exits with 2 and leaves nothing behind."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert command(*TINY, "--out", out or tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith(".\n") and error.count("\n") == 1
    assert "Traceback" not in error
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {path: time for path, time in left.items() if path.name != "home"} == before
    return error


@pytest.mark.parametrize("flags, part", [
    ("--amplitude -3", "--amplitude must be at least 1"),
    ("--amplitude 0.5", "got 0.5"),
    ("--amplitude 5 nan", "got nan"),
    ("--amplitude inf", "got inf"),
    ("--amplitude", "--amplitude takes one or more different values, got none"),
    ("--period", "--period takes one or more different values, got none"),
    ("--amplitude 3 3", "--amplitude takes one or more different values, got 3.0 3.0"),
    ("--period 0", "positive"),
    ("--period 3 -1", "positive"),
    ("--period sometimes", "'sometimes' is not a period"),
    ("--period 3.5 0.5ep", "distinct"),
    ("--period 1", "a period must be at least 2 steps, shorter ones have no peak, got 1"),
    ("--period 8 0.25ep", "a period must be at least 2 steps, shorter ones have no peak, got 1.75"),
    ("--seeds 0", "--seeds takes a number of seeds, 8, or a slice of them, 8:16 (which is 8 to 15), got 0"),
    ("--seeds -1", "--seeds takes a number of seeds"),
    ("--seeds many", "got many"),
    ("--seeds 2.5", "got 2.5"),
    ("--seeds 8:8", "got 8:8"),
    ("--seeds 8:3", "got 8:3"),
    ("--seeds -1:3", "got -1:3"),
    ("--seeds 1:", "got 1:"),
    ("--seeds 1:2:3", "got 1:2:3"),
    ("--seeds 4294967296:4294967298", "got 4294967296"),
    ("--width 0", "--width must be at least 1"),
    ("--epochs 0", "--epochs must be at least 1"),
    ("--batch-size 0", "--batch-size must be at least 1"),
    ("--batch-size 113", "a batch of 113 is larger than the training set of 112"),
    ("--evaluations 0", "--evaluations must be at least 1"),
    ("--train-examples 0", "--train-examples must be at least 1"),
    ("--validation-examples -5", "--validation-examples must be at least 1"),
    ("--oscillation learning-rate --period 2.5", "takes periods of whole steps"),
    ("--oscillation learning-rate --curvature 10", "pass --curvature 0"),
    ("--learning-rate nan", "--learning-rate must be a positive number"),
    ("--learning-rate 0", "--learning-rate must be a positive number"),
    ("--learning-rate inf", "--learning-rate must be a positive number"),
    ("--momentum 1", "--momentum must be at least 0 and below 1"),
    ("--momentum nan", "--momentum must be"),
    ("--stop-epoch -1", "--stop-epoch must be"),
    ("--stop-epoch nan", "--stop-epoch must be"),
    ("--stop-epoch inf", "--stop-epoch must be"),
    ("--dataset cifar10", "cannot be fetched"),
    ("--dataset auto --data-dir missing", "missing does not exist"),
    ("--dataset cifar10 --data-dir missing", "missing does not exist"),
])  # fmt: skip
def test_wrong_use_is_one_sentence_and_exit_code_2(flags, part, capsys, tmp_path):
    assert part in wrong(capsys, tmp_path, *flags.split())


@pytest.mark.parametrize("flags", ["--dataset mnist", "--width 2.5", "--preset slow", "--colour red"])
def test_flags_of_the_wrong_type_are_explained_and_exit_with_2(flags, capsys, tmp_path):
    assert command(*TINY, "--out", tmp_path / "out", *flags.split()) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and flags.split()[0] in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
@pytest.mark.parametrize("damage", ["tfrecord", "archive", "incomplete", "read-only"])
def test_data_that_cannot_be_used_are_an_error_and_never_replaced(dataset, damage, capsys, tmp_path, monkeypatch):
    place = tmp_path / "data"
    copy = place / "cifar10" / prepare.VERSION
    (place / "downloads").mkdir(parents=True)
    if damage in ("tfrecord", "incomplete"):
        copy.mkdir(parents=True)
        name = f"cifar10-train.{'tfrecord' if damage == 'tfrecord' else 'array_record'}-00000-of-00001"
        (copy / name).write_bytes(b"\0" * 100)
    else:
        (place / "downloads" / prepare.ARCHIVE).write_bytes(b"no archive")
    if damage == "read-only":
        monkeypatch.setattr(prepare, "_find_archive", lambda data_dir: data_dir / "archive")

        def fail(*args, **kwargs):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("tempfile.TemporaryFile", fail)  # root may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-cache")
    error = wrong(capsys, tmp_path, "--dataset", dataset, "--data-dir", place)
    words = {"tfrecord": "tfrecord", "archive": "damaged", "incomplete": "incomplete", "read-only": "cannot be written"}
    assert words[damage] in error and str(place) in error


def test_results_that_are_there_are_never_overwritten(capsys, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "digits_results.nc").write_text("precious")
    assert "is not empty" in wrong(capsys, tmp_path, out=tmp_path / "full")
    (tmp_path / "file").write_text("precious")
    assert "file" in wrong(capsys, tmp_path, out=tmp_path / "file")
    assert "/proc/x" in wrong(capsys, tmp_path, out="/proc/x")
    assert (tmp_path / "full" / "digits_results.nc").read_text() == "precious"


def test_help_is_readable(capsys):
    assert command("--help") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "usage: python -m experiments.cifar",
        "paper's protocol",
        "{short,quick,paper}",
        "Preset short: --amplitude 20.0 --period 1ep --width 64 --epochs 100",
        "0.5ep",
        "--amplitude FLOAT",
    ):
        assert part in text
    assert "{None}" not in text


# As its own process


def start(tmp_path, *arguments) -> Any:
    """Starts the command as a user would, in an otherwise empty home, with Ctrl-C as a terminal would send it."""
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv[0] = 'cifar'; runpy.run_module('experiments.cifar', run_name='__main__', alter_sys=True)"
    )
    env = os.environ | {"HOME": str(tmp_path / "home"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def interrupt(process, after: str) -> tuple[list[str], str]:
    """Sends Ctrl-C after the first line that contains a text; returns all lines of stdout, and stderr."""
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if after in line:
                process.send_signal(signal.SIGINT)
                break
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    # JAX says so wherever the compiler of the extra aot is installed, and no GPU's runtime beside it.
    return lines + out.splitlines(), error.replace("cuda_plugin_extension is not found.\n", "")


@pytest.mark.slow
def test_ctrl_c_in_training_keeps_what_was_measured(tmp_path):
    flags = "--seeds 1 --epochs 2000 --evaluations 700".split()
    process = start(tmp_path, *TINY, *flags, "--out", tmp_path / "out")
    lines, error = interrupt(process, "update ")
    assert process.returncode == 130 and error == ""
    results = files.load(tmp_path / "out" / "digits_results.nc")
    done = int(results.attrs["steps_done"])
    assert results.attrs["finished"] == "false" and 0 < done < 14_000 and results.sizes["step"] == done
    assert any(f"INTERRUPTED after {done:,} of 14,000 updates" in line for line in lines)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        f"digits_{name}" for name in FILES
    }


@pytest.mark.slow
def test_ctrl_c_while_compiling_is_quiet(tmp_path):
    process = start(tmp_path, *TINY, "--seeds", 1, "--epochs", 20000, "--evaluations", 700, "--out", tmp_path / "out")
    lines, error = interrupt(process, "members")
    assert process.returncode == 130 and "Traceback" not in error
    assert "members" in lines[0]  # nothing is printed before the line that says what is going to happen
    assert "Interrupted" in error or any("INTERRUPTED after" in line for line in lines)
