"""Cuts through the landscape: against dense matrices, quadratics and the training itself, and the command."""

import functools as ft
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from jax.flatten_util import ravel_pytree

from eqx_dynloss import ensemble
from experiments.landscape import __main__ as landscape
from experiments.landscape import cuts, statistics
from experiments.problems import spiral
from experiments.results import files
from experiments.results.labelled import by_loss
from experiments.running.training import train

from ..synthetic import interrupt_after, run_command

FLAGS = "--seeds 2 --amplitude 10 --period 12 --cycle 2 --cuts 4 --following 3 --width 6".split()
STEPS = [12, 15, 18, 21]
FILES = {"results.nc", "summary.md", "summary.json", "config.json", "lines.png", "planes.png"}

pytestmark = pytest.mark.usefixtures("sandbox")
command = ft.partial(run_command, landscape.main)


@pytest.fixture(scope="module")
def results(tmp_path_factory, devices_as_they_are) -> xr.Dataset:
    """Of two seeds and a narrow network, from the command itself."""
    path = tmp_path_factory.mktemp("landscape") / "run"
    assert command(*FLAGS, "--out", path) == 0
    assert {p.name for p in path.iterdir() if p.is_file()} == FILES
    text = (path / "summary.md").read_text()
    assert "While the class's weight is rising" in text and "## Network of A = 10, T = 12" in text
    document = json.loads((path / "summary.json").read_text())
    assert document["losses"]["static"]["steps"] == STEPS
    return files.load(path / "results.nc").squeeze(["init", "width", "learning_rate"])


def test_every_variable_says_what_it_is(results):
    assert [name for name in results.variables if name not in ("split", "seed", "class", "init")
            and not results[name].attrs.get("units")] == []  # fmt: skip


@pytest.fixture(scope="module")
def dense(results):
    """For the dynamical loss's second seed at the third step, with all of JAX's own means: the loss as a function of
    flat parameters, those, and the Hessian's eigenvalues and eigenvectors."""
    schedule = [1.0, 1.0, 1.0]
    schedule[1] = 1 + (10 - 1) * 2 * (18 % 12) / 12  # class 1 at its peak
    weights = 3 * np.array(schedule) / sum(schedule)
    with jax.enable_x64(True):
        _, unravel = ravel_pytree(spiral.network("paper", 6, jax.random.key(0)))
        data = spiral.spiral(0)

        def loss(flat):
            log = jax.nn.log_softmax(jax.vmap(unravel(flat))(data.inputs))
            return -jnp.mean(jnp.asarray(weights)[data.labels] * log[jnp.arange(300), data.labels])

        flat = jnp.asarray(by_loss(results)[1].isel(seed=1).parameters.sel(observation_step=18).values)
        values, vectors = jnp.linalg.eigh(jax.hessian(loss)(flat))
        yield loss, flat, values[::-1], vectors[:, ::-1].T


def test_cuts_go_along_the_eigenvectors_of_the_dense_hessian(results, dense, x64):
    loss, flat, values, vectors = dense
    cut, norm = by_loss(results)[1].isel(seed=1).sel(observation_step=18), np.linalg.norm(flat)
    np.testing.assert_allclose(cut.norm, norm, rtol=1e-12)
    np.testing.assert_allclose(cut.loss_here, loss(flat), rtol=1e-10)
    np.testing.assert_allclose(cut.eigenvalue, values[:2], rtol=1e-8)
    assert (cut.eigenvalue_error < 1e-6).all()
    # The sign of an eigenvector is free: the loss is lower at the end of the cut than at its beginning.
    first, second = (v if loss(flat + 0.05 * norm * v) <= loss(flat - 0.05 * norm * v) else -v for v in vectors[:2])
    line = [loss(flat + d * norm * first) for d in cut.distance.values]
    np.testing.assert_allclose(cut.loss_along, line, rtol=1e-6)
    for d1, d2 in [(0.05, 0.05), (-0.05, 0.02), (0, 0)]:
        at = cut.loss_in_plane.sel(distance_in_plane=d1, second=d2, method="nearest")
        x, y = float(at.distance_in_plane), float(at.second)
        np.testing.assert_allclose(at, loss(flat + norm * (x * first + y * second)), rtol=1e-6)
    following = (by_loss(results)[1].isel(seed=1).parameters.sel(observation_step=21).values - flat) / norm
    np.testing.assert_allclose(cut.trajectory[3], np.stack([first, second]) @ following, rtol=1e-6)
    slopes = norm * np.stack([first, second]) @ jax.grad(loss)(flat)
    np.testing.assert_allclose(cut.slope, slopes, rtol=1e-6, atol=1e-9)
    near = cuts.parabola(cut).sel(distance=0.005, method="nearest")
    np.testing.assert_allclose(near, cut.loss_along.sel(distance=near.distance), rtol=1e-3)


def test_the_trajectory_is_that_of_the_training(results):
    """Three updates after one cut is the next one, whose parameters the training itself has given."""
    for members in by_loss(results):
        for seed in (0, 1):
            member = members.sel(seed=seed)
            before, after = (member.parameters.sel(observation_step=step).values for step in (12, 15))
            cut = member.sel(observation_step=12)
            assert float(cut.moved[0]) == 0 and np.all(cut.trajectory[0] == 0)
            moved = np.linalg.norm(after - before) / np.linalg.norm(before)
            np.testing.assert_allclose(cut.moved[3], moved, rtol=1e-9)
            assert 0 <= cut.share_in_plane <= 1 and cut.sizes["update"] == 4
            assert np.all(np.hypot(*cut.trajectory.values.T) <= cut.moved.values * (1 + 1e-9))


def test_it_is_the_training_of_the_spiral_with_the_exact_period(results):
    """Weights of 1 before a turn, at the peak in its middle, and the same networks as in a run without cuts."""
    config = landscape.Config(seeds=2, amplitude=10.0, period=12, cycle=2, cuts=4, following=3, width=6)
    with jax.enable_x64(True):
        (task,) = landscape.tasks_of(config)
        weights = jax.vmap(lambda schedule: schedule(18))(task.members.losses.schedule)
        np.testing.assert_allclose(weights[-1], [0.25, 2.5, 0.25])
        measured = train([task])
    last = measured.parameters.isel(member=-1).sel(observation_step=STEPS).values
    np.testing.assert_array_equal(by_loss(results)[1].sel(seed=1).parameters.values, last)


def valley(curvature=3.0, bottom=0.2, at=0.03, extent=1.0) -> xr.Dataset:
    distance = np.linspace(-extent, extent, 401)
    loss = bottom + curvature * (distance - at) ** 2 / 2
    return xr.Dataset({"loss_along": ("distance", loss)}, {"distance": distance})


def test_width_and_depth_of_a_parabola():
    assert float(cuts.lowest(valley())) == pytest.approx(0.2, abs=1e-4)
    assert float(cuts.valley_width(valley())) == pytest.approx(2 * np.sqrt(2 * 0.1 / 3), rel=1e-3)
    assert np.isnan(cuts.valley_width(valley(extent=0.2)))  # its rim is not in the cut
    assert np.isnan(cuts.valley_width(valley() * np.nan))


def test_changes_are_paired_by_seed(results):
    members = by_loss(results)[1]
    found = statistics.changes(members)["rising weight"]["sharpness"]
    largest = members.eigenvalue.sel(direction=1)
    expected = largest.sel(observation_step=18) - largest.sel(observation_step=12)
    assert found.values == pytest.approx({0: float(expected[0]), 1: float(expected[1])})


@pytest.mark.slow
def test_an_interrupted_run_goes_on(results, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert command(*FLAGS, "--checkpoint-every", "0", "--out", "run") == 130
    assert "To go on: python -m experiments.landscape --resume run" in capsys.readouterr().out
    assert command("--resume", "run") == 0
    xr.testing.assert_equal(
        files.load(tmp_path / "run" / "results.nc").squeeze(["init", "width", "learning_rate"]), results
    )


def interrupt_at(number, monkeypatch):
    """Presses Ctrl-C while the landscapes of that step are taken."""
    observe, calls = ensemble.observe, itertools.count(1)

    def interrupted(*arguments):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return observe(*arguments)

    monkeypatch.setattr(ensemble, "observe", interrupted)


def test_ctrl_c_between_landscapes_stops_there_and_the_run_goes_on(results, tmp_path, monkeypatch, capsys):
    """The trained networks are in the checkpoint."""
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        assert command(*FLAGS, "--out", "run") == 130
    said = capsys.readouterr().out
    assert "landscapes at step 12 of 21" in said and "landscapes at step 15" not in said
    assert "Ctrl-C: stopping after this step" in said and "--resume run" in said
    assert command("--resume", "run") == 0
    xr.testing.assert_equal(
        files.load(tmp_path / "run" / "results.nc").squeeze(["init", "width", "learning_rate"]), results
    )


@pytest.mark.slow
def test_ctrl_c_in_the_last_landscapes_comes_too_late(results, tmp_path, monkeypatch):
    interrupt_at(len(STEPS), monkeypatch)
    assert command(*FLAGS, "--out", "run") == 0
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_file()} == FILES


@pytest.mark.slow
def test_amplitudes_can_be_merged(results, tmp_path):
    from experiments.merge import __main__ as merge

    for amplitude in ("10", "20"):
        assert command(*FLAGS, "--amplitude", amplitude, "--out", amplitude) == 0
    assert run_command(merge.main, "10", "20", "--out", "all") == 0
    assert {p.name for p in (tmp_path / "all").iterdir() if p.is_file()} == FILES
    text = (tmp_path / "all" / "summary.md").read_text()
    assert "## Network of A = 20, T = 12" in text and "- A = 20, T = 12: While the class's weight is rising" in text
    found = files.load(tmp_path / "all" / "results.nc").squeeze(["init", "width", "learning_rate"])
    in_order = lambda dataset: dataset.transpose(*results.dims)
    xr.testing.assert_equal(in_order(found.sel(amplitude=[1, 10])), in_order(results))


@pytest.mark.parametrize("flags, part", [
    ("--amplitude 1", "--amplitude must be above 1, which is the static loss, got 1"),
    ("--amplitude inf", "--amplitude must be above 1"),
    ("--cuts 5", "--cuts must be a divisor of the period of 12 updates, got 5"),
    ("--cuts 0", "--cuts must be at least 1"),
    ("--cycle 0", "--cycle must be at least 1"),
    ("--following 0", "--following must be at least 1"),
    ("--following 4", "--following must be at most the 3 updates from one cut to the next, got 4"),
    ("--extent 0", "--extent must be a positive number"),
    ("--extent nan", "--extent must be a positive number"),
    ("--period 1", "--period must be at least 2 updates"),
    ("--show-seed 7", "--show-seed must be one of the seeds 0 to 1, got 7"),
    ("--seeds 3:3", "--seeds takes a number of seeds"),
])  # fmt: skip
def test_wrong_use_is_one_sentence_and_2(flags, part, tmp_path, capsys):
    assert command(*FLAGS, *flags.split(), "--out", "run") == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mean_says_so_where_some_cuts_do_not_show_it(results, tmp_path):
    valley = results.copy(deep=True).expand_dims(["init", "width", "learning_rate"])
    valley["loss_along"] = 1e4 * valley.distance**2 + 0 * valley.loss_along
    valley.loss_along.loc[{"amplitude": 10, "seed": 1}] = 0.0  # no rim
    statistics.write(valley, tmp_path)
    static, dynamical = (tmp_path / "summary.md").read_text().split("## Network of A")
    assert " (1) |" not in static and dynamical.count(" (1) |") == len(STEPS)


def test_networks_that_diverge_are_left_out_and_drawn_without(tmp_path, capsys):
    assert command(*FLAGS, "--learning-rate", "1e200", "--out", "run") == 0
    text = (tmp_path / "run" / "summary.md").read_text()
    for said in (text, " ".join(capsys.readouterr().out.split())):
        assert "DIVERGED (became non-finite) and left out: static: seed 0, 1." in said
    document = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["losses"]["static"]["diverged"] == [0, 1]
    assert document["losses"]["static"]["outcomes"]["sharpness"][0]["n"] == 0
