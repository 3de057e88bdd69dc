"""The sizes command, in runs of a few updates: what it leaves behind, that it goes on, and what it refuses."""

import dataclasses
import functools as ft
import json

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from eqx_dynloss import ensemble
from experiments.problems import spiral as problem
from experiments.results import files
from experiments.running.training import train
from experiments.sizes import __main__ as sizes
from experiments.sizes import figure

from ..synthetic import interrupt_after, run_command

TINY = "--seeds 2 --width 3 5 --amplitude 70 --period 10 --updates 40 --evaluations 4".split()
FILES = {"results.nc", "summary.md", "summary.json", "config.json", "sizes.png"}

pytestmark = pytest.mark.usefixtures("sandbox")
command = ft.partial(run_command, sizes.main)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, devices_as_they_are):
    """A small run of two loss functions, which share one of their learning rates; its directory."""
    out = tmp_path_factory.mktemp("sizes") / "run"
    assert command(*TINY, "--loss", "cross-entropy", "squared-unit", "--out", out) == 0
    return out


@pytest.fixture
def without_figure(monkeypatch):
    """For tests of the training: drawing takes longer."""
    monkeypatch.setattr(figure, "sizes", lambda *arguments: None)


def results_of(directory):
    return files.load(directory / "results.nc")


def test_results_have_named_dimensions(finished):
    assert {path.name for path in finished.iterdir() if path.is_file()} == FILES
    results = results_of(finished)
    wanted = {"loss_function": 2, "width": 2, "learning_rate": 3, "amplitude": 2, "period": 1, "seed": 2, "split": 2}
    assert {name: results.sizes[name] for name in wanted} == wanted
    assert results.sizes["evaluation_step"] == 4 and "step" not in results.sizes
    assert results.learning_rate.values.tolist() == [0.1, 0.3, 1.0] and results.observation_step.item() == 40
    last = results.accuracy.isel(evaluation_step=-1)
    trained = np.isfinite(last).all(("init", "width", "amplitude", "period", "seed", "split"))
    assert trained.values.tolist() == [[False, True, True], [True, True, False]]  # each has rates of its own
    assert (np.isfinite(results.hessian_max).sum() == np.isfinite(last).sum() / 2) and "ntk_max" not in results
    assert results.attrs["loss_function"] == "cross-entropy or squared-unit"
    assert results.attrs["finished"] == "true" and results.hessian_max.dtype == np.float64


@pytest.mark.parametrize("init, of_unit, rest", [("paper", 6, 3), ("glorot", 6, 3), ("none", 5, 0)])
def test_the_number_of_parameters_is_that_of_the_weights_and_biases(init, of_unit, rest):
    """2 weights and a bias into a unit, 3 weights out of it, and 3 biases."""
    for width in (1, 3, 100, 1000):
        assert problem.num_parameters(init, width) == of_unit * width + rest


def test_the_results_have_the_number_of_parameters_of_every_width(finished):
    results = results_of(finished)
    assert results.parameters.dims == ("width",) and results.parameters.values.tolist() == [21, 33]
    assert results.parameters.dtype.kind == "i" and results.parameters.attrs["long_name"]


@pytest.mark.parametrize("loss, rate", [("cross-entropy", 1.0), ("squared-unit", 0.1)])
def test_a_member_is_what_the_spiral_command_trains(loss, rate, finished):
    """Accuracies, losses and the eigenvalue, which is that of the plain loss: the weights are 1 at the end."""
    from experiments.spiral import __main__ as spiral

    options = {"amplitude": (70.0,), "period": (10.0,), "width": (5,), "learning_rate": (rate,), "loss": loss}
    with jax.enable_x64(True):
        config = spiral.Config(seeds="1:2", updates=40, curvature=0, **options)  # type: ignore[arg-type]
        (task,) = spiral.tasks_of(config)
        expected = problem.results([task], train([task]), config.period, config.loss)
        schedule = task.members.take(np.array([1])).losses.schedule
        (weights,) = jax.vmap(lambda schedule: schedule(40))(schedule)
        assert weights.tolist() == [1, 1, 1]
    mine = results_of(finished).sel(loss_function=loss, width=[5], learning_rate=[rate], seed=[1])
    for name in ("accuracy", "loss"):
        for split in ("train", "validation"):
            found, wanted = (r[name].sel(split=split).isel(evaluation_step=-1) for r in (mine, expected))
            np.testing.assert_allclose(found.values, wanted.values, rtol=1e-9)
    assert np.ptp(mine.loss.isel(evaluation_step=-1).sel(split="train").values) > 1e-3  # static and dynamical differ


@pytest.mark.slow
def test_the_sharpness_is_the_largest_eigenvalue_of_the_plain_losss_hessian(finished):
    """Of members of the dynamical loss, whose training is repeated here, against dense Hessians."""
    with jax.enable_x64(True):
        config = sizes.Config(seeds=2, width=(3,), amplitude=(70.0,), period=(10.0,), updates=40, learning_rate=(1.0,))
        task = sizes.tasks_of(config)[0]
        members = task.members.take(np.flatnonzero(task.members.coordinates["amplitude"] == 70))
        states, *_ = ensemble.train_chunk(members.init(), members.losses, members.optimiser, task.data, num_steps=40)
        expected = []
        for seed in (0, 1):
            model = jax.tree.map(lambda leaf, seed=seed: leaf[seed], states.model)
            parameters, unravel = ravel_pytree(model)

            def plain(p, unravel=unravel):
                logits = jax.vmap(unravel(p))(task.data.inputs)
                return -jax.nn.log_softmax(logits)[np.arange(300), task.data.labels].mean()

            expected.append((plain(parameters), np.linalg.eigvalsh(jax.hessian(plain)(parameters))[-1]))
    mine = results_of(finished).sel(loss_function="cross-entropy", width=3, learning_rate=1, amplitude=70).squeeze()
    found = np.stack([mine.loss.sel(split="train").isel(evaluation_step=-1), mine.hessian_max], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_the_two_squared_errors_have_the_same_static_loss(tmp_path, without_figure):
    assert command(*TINY, "--width", 3, "--loss", "squared-sample", "squared-unit", "--out", "run") == 0
    loss = results_of(tmp_path / "run").loss.isel(evaluation_step=-1)
    sample, unit = (loss.sel(loss_function=name) for name in ("squared-sample", "squared-unit"))
    np.testing.assert_allclose(sample.sel(amplitude=1), unit.sel(amplitude=1), rtol=1e-9)
    assert not np.isclose(sample.sel(amplitude=70), unit.sel(amplitude=70)).any()


def test_the_summary_has_every_size(finished):
    text = (finished / "summary.md").read_text()
    assert "### cross-entropy" in text and "### squared-unit" in text and "### squared-sample" not in text
    for row in ("| 21 | 3 | 0.3 | static |", "| 33 | 5 | 1 | A = 70, T = 10 |", "| 33 | 5 | 0.1 | A = 70, T = 10 |"):
        assert text.count(row) >= 2  # accuracies, and minima
    document = json.loads((finished / "summary.json").read_text())
    assert len(document["sizes"]) == len(document["conditions"]) == 2 * 2 * 2 * 2
    results = results_of(finished)
    for point in document["sizes"]:
        setting = {name: point[name] for name in ("loss_function", "width", "learning_rate", "amplitude")}
        eigenvalues = results.sel(setting).hessian_max.squeeze()
        assert point["parameters"] == 6 * point["width"] + 3
        assert point["sharpness"]["mean"] == pytest.approx(float(eigenvalues.mean()))
        static = results.sel(setting | {"amplitude": 1}).hessian_max.squeeze()
        gain = None if point["period"] is None else pytest.approx(float((eigenvalues - static).mean()))
        assert point["sharpening"]["mean"] == gain
    assert "AT CHANCE" in text  # after 40 updates


def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(tmp_path, finished, monkeypatch, capsys):
    """In the second of two programs, in chunks of ten updates; the run that it is compared with has more of them."""
    with monkeypatch.context() as patch:
        interrupt_after(6, patch)
        assert command(*TINY, "--loss", "cross-entropy", "--out", "run") == 130
    partial = results_of(tmp_path / "run")
    assert partial.attrs["finished"] == "false" and "hessian_max" not in partial
    reached = np.isfinite(partial.accuracy.sel(split="validation")).all(("amplitude", "learning_rate", "seed"))
    assert reached.squeeze().values.tolist() == [[True] * 4, [True, True, False, False]]  # by width and evaluation
    assert "INTERRUPTED" in (tmp_path / "run" / "summary.md").read_text()
    assert "--resume" in capsys.readouterr().out
    assert command("--resume", "run") == 0
    found = results_of(tmp_path / "run")
    expected = results_of(finished).sel(loss_function=["cross-entropy"], learning_rate=[0.3, 1.0])
    assert found.attrs["finished"] == "true" and set(found.variables) == set(expected.variables)
    for name in expected.variables:
        np.testing.assert_array_equal(found[name].values, expected[name].values, err_msg=str(name))
    assert command("--resume", "run", "--updates", 50) == 2
    assert "--updates 40, not 50" in capsys.readouterr().err


@pytest.mark.slow
def test_slices_of_seeds_join(tmp_path, finished, without_figure):
    from experiments.merge import __main__ as merge

    for seeds in ("0:1", "1:2"):
        slice_of = [*TINY, "--seeds", seeds, "--loss", "cross-entropy", "squared-unit"]
        assert command(*slice_of, "--out", f"slice-{seeds[0]}") == 0
    assert run_command(merge.main, "slice-1", "slice-0", "--out", "whole") == 0
    found, expected = results_of(tmp_path / "whole"), results_of(finished)
    assert found.seed.values.tolist() == [0, 1] and found.parameters.values.tolist() == [21, 33]
    for name in ("accuracy", "hessian_max"):
        np.testing.assert_allclose(found[name].values, expected[name].values, rtol=1e-6)
    assert "### cross-entropy" in (tmp_path / "whole" / "summary.md").read_text()


def test_the_presets_and_what_is_given():
    paper = sizes.Config(preset="paper").chosen
    assert paper.seeds == 20 and max(paper.width) / min(paper.width) == 100
    assert sizes.Config(width=(4,), seeds="3:5").chosen == dataclasses.replace(
        sizes.PRESETS["quick"], width=(4,), seeds="3:5"
    )
    with jax.enable_x64(True):
        tasks = sizes.tasks_of(sizes.Config())
    assert [task.name for task in tasks[:4]] == [*(f"cross-entropy-{w}" for w in (10, 30, 100)), "squared-sample-10"]
    assert len({task.plan.chunk for task in tasks}) == 1  # all are evaluated at the same updates
    for task in tasks:
        rates = {"cross-entropy": {0.3, 1.0}}.get(task.name.rsplit("-", 1)[0], {0.1, 0.3})
        assert set(task.members.coordinates["learning_rate"]) == rates and len(task.members) == 2 * 2 * 6


def test_a_member_that_diverges_is_reported_and_left_out(tmp_path):
    flags = ["--width", 3, "--loss", "squared-unit", "--squared-learning-rate", 0.1, 1e300]
    assert command(*TINY, *flags, "--out", "run") == 0
    results = results_of(tmp_path / "run")
    assert (results.diverged_at.sel(learning_rate=0.1) == -1).all()
    lost = int((results.diverged_at.sel(learning_rate=1e300) >= 0).sum())
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    left = [point["sharpness"]["n"] for point in document["sizes"] if point["learning_rate"] == 1e300]
    assert lost and sum(left) <= 4 - lost
    assert "DIVERGED" in (tmp_path / "run" / "summary.md").read_text()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("--seeds 0", "--seeds takes a number of seeds, 8, or a slice"),
        ("--updates 0", "--updates must be at least 1"),
        ("--evaluations 0", "--evaluations must be at least 1"),
        ("--width 0", "--width must be at least 1"),
        ("--width 3 3", "--width takes one or more different values"),
        ("--width", "--width takes one or more different values, got none."),
        ("--loss squared-unit squared-unit", "--loss takes one or more different values"),
        ("--amplitude 1", "--amplitude must be above 1, which is the static loss, got 1."),
        ("--period 1", "--period must be at least 2 updates"),
        ("--period 40", "--period 40 is too long for 40 updates"),
        ("--learning-rate nan", "--learning-rate must be a positive number"),
        ("--squared-learning-rate 0", "--squared-learning-rate must be a positive number"),
    ],
)
def test_wrong_use_is_one_sentence_and_2(arguments, reason, capsys, tmp_path):
    assert command(*TINY, *arguments.split(), "--out", "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
