"""The spiral command, in runs of a few updates: what it leaves behind, and what it refuses."""

import functools as ft
import json
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.problems import spiral as problem
from experiments.results import files
from experiments.spiral import __main__ as spiral
from experiments.spiral import dynamics, static

from ...helpers import slow
from ..synthetic import interrupt_after, run_command

TINY = "--seeds 2 --width 4 --updates 40 --period 10 --curvature 5".split()
FILES = {"results.nc", "summary.md", "summary.json", "config.json"}
FIGURES = {"dynamics.png", "dynamics_over_seeds.png", "accuracy.png", "bifurcation.png"}


pytestmark = pytest.mark.usefixtures("sandbox")
command = ft.partial(run_command, spiral.main)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, devices_as_they_are):
    """One small run with two values of everything; its directory."""
    out = tmp_path_factory.mktemp("spiral") / "run"
    several = "--init paper none --learning-rate 0.5 1 --amplitude 5 70 --period 10 20".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamics, "_MOST", 1)
        assert command(*TINY, *several, "--out", out) == 0
    return out


@pytest.fixture
def without_figures(monkeypatch):
    """For tests of the training: drawing takes longer."""
    monkeypatch.setattr(dynamics, "write", lambda *arguments: [])
    monkeypatch.setattr(static, "static_curves", lambda *arguments: None)


def test_of_a_slice_of_the_seeds_the_first_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(dynamics, "write", lambda dataset, directory, seed: drawn.append(seed) or [])
    assert command(*TINY, "--seeds", "3:5", "--curvature", "0", "--out", "run") == 0
    assert results_of(tmp_path / "run").seed.values.tolist() == [3, 4] and drawn == [3]


def test_what_oscillates_is_a_setting_like_the_others(tmp_path, without_figures):
    arguments = [*TINY, "--curvature", "0", "--amplitude", "5", "--learning-rate", "0.5"]
    kinds = ["triangle", "random-order", "learning-rate"]
    assert command(*arguments, "--oscillation", *kinds, "--out", "all") == 0
    results = results_of(tmp_path / "all")
    assert results.oscillation.values.tolist() == kinds
    loss = results.minibatch_loss.isel(init=0, width=0, learning_rate=0, period=0)
    for kind in kinds[1:]:  # the static loss is the same in all, and the dynamical one is not
        np.testing.assert_array_equal(
            loss.sel(oscillation=kind, amplitude=1), loss.sel(oscillation="triangle", amplitude=1)
        )
        assert not np.allclose(loss.sel(oscillation=kind, amplitude=5), loss.sel(oscillation="triangle", amplitude=5))
    names = {c["setting"] for c in json.loads((tmp_path / "all" / "summary.json").read_text())["conditions"]}
    assert names == {"triangle", "random order", "oscillating learning rate"}

    assert command(*arguments, "--out", "paper") == 0
    paper = results_of(tmp_path / "paper")
    assert "oscillation" not in paper.dims
    np.testing.assert_array_equal(
        paper.minibatch_loss.values, results.sel(oscillation="triangle").minibatch_loss.values
    )


def results_of(directory):
    return files.load(directory / "results.nc")


def test_results_have_named_dimensions_and_are_float64(finished):
    results = files.load(finished / "results.nc")
    sizes = {"init": 2, "width": 1, "learning_rate": 2, "amplitude": 3, "period": 2, "seed": 2}
    assert {name: results.sizes[name] for name in sizes} == sizes
    assert results.sizes["step"] == 40 and results.observation_step.values.tolist() == list(range(0, 40, 5))
    assert results.minibatch_loss.dtype == results.hessian_max.dtype == np.float64
    for name, variable in results.data_vars.items():
        if name not in ("accuracy", "loss"):  # the training set is evaluated once
            assert np.isfinite(variable).all(), name
    assert results.attrs["finished"] == "true" and results.attrs["dataset"] == "spiral"
    assert results.hessian_max.attrs["long_name"]


def test_every_member_is_what_the_library_computes(finished):
    """One member, trained by a loop over plain gradient steps on a loss written out by hand."""
    results = files.load(finished / "results.nc")
    mine = results.sel(init="none", width=4, learning_rate=0.5, amplitude=5, period=20, seed=1)
    with jax.enable_x64(True):
        data = problem.spiral(0)
        model_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))
        model = problem.MLP(2, 4, 3, use_bias=False, key=model_key)
        weights = [layer.weight for layer in model.layers]

        def loss(weights, gamma):
            logits = jax.nn.relu(data.inputs @ weights[0].T) @ weights[1].T
            nll = -jax.nn.log_softmax(logits)[jnp.arange(300), data.labels]
            return jnp.mean(jnp.asarray(gamma)[data.labels] * nll)

        step = jax.jit(jax.value_and_grad(loss))
        for t in range(40):
            value, gradient = step(weights, mine.class_weights.values[t])
            assert np.isclose(value, mine.minibatch_loss.values[t], rtol=1e-9)
            weights = [w - 0.5 * g for w, g in zip(weights, gradient, strict=True)]
    assert mine.class_weights.values[10, 0] == pytest.approx(3 * 5 / 7)  # the peak of A = 5 at T / 2
    assert np.allclose(mine.class_weights.values[21 * (40 // 21) :], 1)  # one whole period of 21 updates fits


def test_the_same_seed_starts_from_the_same_weights(finished):
    results = files.load(finished / "results.nc")
    start = results.minibatch_loss.isel(step=0)
    for name in ("amplitude", "period", "learning_rate"):
        assert float((start - start.isel({name: 0})).max()) == 0
    assert abs(start.sel(seed=0) - start.sel(seed=1)).min() > 1e-6


def test_tables_and_figures_name_every_setting(finished):
    text = (finished / "summary.md").read_text()
    for setting in ("paper init, learning rate 0.5", "no biases, learning rate 1"):
        assert f"| {setting} | 70 | 20 |" in text
    summary = json.loads((finished / "summary.json").read_text())
    assert len(summary["conditions"]) == 4 * 5
    written = {path.name for path in finished.iterdir() if path.is_file()}
    assert written >= FILES | {"accuracy.png", "bifurcation.png", "static_curves.png"}
    assert "dynamics-paper-init-learning-rate-0.5-A5-T10.png" in written
    start = results_of(finished).minibatch_loss.sel(step=5, init="paper", learning_rate=1, amplitude=70, period=10)
    moment = f"| paper init, learning rate 1, A = 70, T = 10 | 5 | {float(start.mean()):.4f} ± "
    assert moment in text  # half a period


def test_the_default_is_one_network(tmp_path):
    assert command(*TINY, "--out", "run") == 0
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} == FILES | FIGURES
    text = (tmp_path / "run" / "summary.md").read_text()
    assert text.startswith("# Static and dynamical loss on the spiral (paper init, width 4, learning rate 1)")
    assert "| A | T (updates) |" in text


def test_the_defaults_are_the_papers_protocol():
    config = spiral.Config()
    assert (config.amplitude, config.period, config.updates) == ((70.0,), (5000.0,), 70_000)
    assert (config.width, config.learning_rate, config.init, config.curvature) == ((100,), (1.0,), ("paper",), 25)
    with jax.enable_x64(True):
        (task,) = spiral.tasks_of(config)
        schedule: Any = task.members.losses.schedule
        assert schedule.inclusive_period and schedule.stop[-1] == 65_013 == 13 * 5001


def test_without_curvature_and_without_a_dynamical_loss(tmp_path):
    assert command(*TINY, "--curvature", 0, "--amplitude", 1, "--out", "run") == 0
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} == (FILES | FIGURES) - {
        "bifurcation.png"
    }
    assert "hessian_max" not in files.load(tmp_path / "run" / "results.nc")


@pytest.mark.parametrize("chunks", [1, 5])
def test_an_interrupted_run_keeps_what_it_has(chunks, tmp_path, capsys, monkeypatch, without_figures):
    """Chunks are of 5 updates: the second network begins with the ninth."""
    interrupt_after(chunks + 8 * (chunks == 5), monkeypatch)
    monkeypatch.setattr(problem, "chunk_length", lambda num_steps, target: 5)
    assert command(*TINY, "--curvature", 0, "--init", "glorot", "--width", 4, 6, "--out", "run") == 130
    results = files.load(tmp_path / "run" / "results.nc")
    assert results.attrs["finished"] == "false"
    assert "INTERRUPTED" in (tmp_path / "run" / "summary.md").read_text()
    if chunks == 1:
        assert results.width.values.tolist() == [4] and results.sizes["step"] == 5
    else:
        first, second = (results.sel(width=width).minibatch_loss.values for width in (4, 6))
        assert np.isfinite(first).all()
        assert np.isfinite(second[..., :25]).all() and np.isnan(second[..., 25:]).all()
        assert "(0 of" not in capsys.readouterr().out


def test_a_member_that_diverges_is_reported_and_left_out(tmp_path):
    assert command(*TINY, "--learning-rate", 1, 1e300, "--out", "run") == 0
    results = files.load(tmp_path / "run" / "results.nc")
    assert (results.diverged_at.sel(learning_rate=1) == -1).all()
    lost = (results.diverged_at.sel(learning_rate=1e300) >= 0).sum("seed").values.ravel()
    assert lost.any()  # not all: one whose units are all dead only drifts away
    assert "DIVERGED" in (tmp_path / "run" / "summary.md").read_text()
    bottom = dynamics.accuracy(results, tmp_path / "a.png").axes[1]
    notes = [text.get_text() for text in bottom.texts if "left out" in text.get_text()]
    assert notes == [f"{n} left out" for n in lost if n]
    assert (tmp_path / "run" / "dynamics-learning-rate-1e+300-A70-T10.png").exists()


@pytest.mark.parametrize(
    "arguments", [*map(slow, ["--period 2", "--updates 4 --amplitude 1 --curvature 1", "--updates 1 --curvature 1"])]
)
def test_very_short_runs(arguments, tmp_path):
    assert command(*TINY, *arguments.split(), "--seeds", 1, "--out", "run") == 0
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} == FILES | FIGURES


def test_a_prime_number_of_updates_is_cut_into_chunks(tmp_path, monkeypatch, capsys, without_figures):
    monkeypatch.setattr(problem, "cpu_seconds_per_update", lambda width, observe_every: 0.1)
    assert command(*TINY, "--updates", 47, "--curvature", 0, "--out", "run") == 0
    assert files.load(tmp_path / "run" / "results.nc").sizes["step"] == 47
    assert capsys.readouterr().out.count("\nupdate ") > 5


@pytest.mark.parametrize("last", [False, slow(True)])
def test_ctrl_c_while_the_last_chunk_runs_or_results_are_put_together(last, tmp_path, monkeypatch, without_figures):
    """Of two networks: in the first one's last chunk, or when all are trained."""
    place = "results" if last else "curvature"
    real = getattr(problem, place)

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(problem, place, interrupted)
    code = command(*TINY, "--updates", 5, "--width", 4, 6, "--out", "run")
    assert code == 130
    results = files.load(tmp_path / "run" / "results.nc")
    assert results.attrs["finished"] == ("true" if last else "false")
    assert results.width.values.tolist() == ([4, 6] if last else [4])
    assert np.isfinite(results.minibatch_loss).all() and results.sizes["step"] == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ("--seeds 0", "--seeds takes a number of seeds, 8, or a slice"),
        ("--updates 0", "--updates must be at least 1"),
        ("--amplitude 0.5", "--amplitude must be at least 1"),
        ("--amplitude 70 70", "--amplitude takes one or more different values, got 70.0 70.0."),
        ("--amplitude", "--amplitude takes one or more different values, got none."),
        ("--period 0", "--period must be a positive number"),
        ("--period 1", "--period must be at least 2 updates"),
        ("--learning-rate nan", "--learning-rate must be a positive number"),
        ("--width 0", "--width must be at least 1"),
        ("--curvature 7", "--curvature must be a divisor of the 40 updates"),
        ("--curvature -5", "--curvature must be a divisor"),
        ("--show-seed 2", "--show-seed must be one of the seeds 0 to 1, got 2"),
        ("--init paper paper", "--init takes one or more different values"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, reason, capsys, tmp_path):
    assert command(*TINY, *arguments.split(), "--out", "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_results_are_never_overwritten(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.nc").write_text("precious")
    assert command(*TINY, "--out", "run") == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.nc").read_text() == "precious"
