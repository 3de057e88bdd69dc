"""Frozen losses: thresholds of maps that are known, gradient descent by hand, and the command."""

import functools as ft
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from jax.flatten_util import ravel_pytree

from experiments.bifurcation import __main__ as bifurcation
from experiments.bifurcation import thresholds
from experiments.compare import __main__ as compare
from experiments.problems import spiral
from experiments.results import files
from experiments.running.training import train

from ...helpers import slow
from ..synthetic import interrupt_after, run_command

FLAGS = "--seeds 2 --amplitude 10 --period 20 --num-rates 3 --rates 0.5 1.5 --updates 8 --last 16 --width 6".split()
FILES = {"results.nc", "summary.md", "summary.json", "config.json", "bifurcation.png"}

pytestmark = pytest.mark.usefixtures("sandbox")
command = ft.partial(run_command, bifurcation.main)


# Maps with known thresholds


def iterate(step, start, parameters: np.ndarray, settle=4000, last=128) -> np.ndarray:
    """The last iterates of a map, `[parameters, last]`, in NumPy."""
    x, seen = np.full(len(parameters), start), []
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(settle + last):
            x = step(x, parameters)
            if k >= settle:
                seen.append(x)
    return np.stack(seen, 1)


def test_onsets_of_the_logistic_map():
    """It doubles its period at r = 3 and 1 + √6, and is chaotic from 3.569946 on. A doubling is seen when the new
    alternation is a tenth of the old one, and so is chaos, whose bands are narrow at first."""
    r = np.linspace(2.8, 4.0, 1201)
    seen = thresholds.behaviour(iterate(lambda x, r: r * x * (1 - x), 0.3, r), np.full(len(r), 0.3))
    found = thresholds.onset(r, seen)
    assert found["period 2"] == pytest.approx(3, abs=0.011)  # there it converges slowly
    assert found["period 4"] == pytest.approx(1 + np.sqrt(6), abs=0.02)
    assert 3.569946 < found["no period"] < 3.62
    assert np.isnan(found["divergence"])
    assert seen[0] == 1 and seen[-1] == 0


def test_gradient_descent_on_a_quadratic_diverges_from_2_over_lambda_on():
    """And nothing else happens: the loss of λx²/2 falls below, and grows above."""
    curvature, multiples = 3.0, np.round(np.linspace(0.5, 1.5, 101), 6)
    x = iterate(lambda x, m: x - m * 2 / curvature * curvature * x, 1.0, multiples)
    with np.errstate(over="ignore"):
        loss = curvature * x**2 / 2
    found = thresholds.onset(multiples, thresholds.behaviour(loss, np.full(101, curvature / 2)))
    assert found["divergence"] == pytest.approx(1.01)  # at 1 it neither falls nor grows
    assert np.isnan([found["period 4"], found["no period"]]).all()


def test_gradient_descent_in_a_double_well_doubles_its_period_at_2_over_lambda():
    """The loss (x² − 1)²/4 has λ = 2 at x = 1, where gradient descent, a cubic map, has its first doubling at η = 1. Of
    an asymmetric well the loss shows it: left and right of the minimum differ."""
    multiples = np.round(np.linspace(0.8, 1.4, 121), 6)
    x = iterate(lambda x, m: x - m * (x**3 - x), 0.9, multiples)
    found = thresholds.onset(multiples, thresholds.behaviour((x**2 - 1) ** 2 / 4 + 0.1, np.full(121, 0.11)))
    assert found["period 2"] == pytest.approx(1, abs=0.011)
    assert found["period 2"] < found["period 4"] < found["no period"]


def test_what_is_not_finite_or_never_comes_back_diverges():
    loss = np.array([np.full(128, 50.0), np.full(128, np.nan), np.tile([50.0, 2.0], 64), np.full(128, 2.0)])
    assert thresholds.behaviour(loss, np.full(4, 2.0)).tolist() == [-1, -1, 2, 1]


# The command


@pytest.fixture(scope="module")
def results(tmp_path_factory, devices_as_they_are) -> xr.Dataset:
    path = tmp_path_factory.mktemp("bifurcation") / "run"
    assert command(*FLAGS, "--out", path) == 0
    assert {p.name for p in path.iterdir() if p.is_file()} == FILES
    document = json.loads((path / "summary.json").read_text())
    assert list(document["onsets"]) == ["static", "0.5 T", "0.9 T"]
    assert (path / "summary.md").read_text().count("With the loss frozen at") == 2
    return files.load(path / "results.nc")


def test_every_variable_says_what_it_is(results):
    assert [
        name for name in results.variables if name not in ("seed", "init") and not results[name].attrs.get("units")
    ] == []


def test_a_network_goes_on_by_gradient_descent_with_the_weights_of_its_phase(results, x64):
    """Every update of one member, from JAX's own gradient of the weighted cross-entropy."""
    config = bifurcation.Config(seeds=2, amplitude=10.0, period=20, width=6)
    (task,) = bifurcation.tasks_of(config)
    flat = jnp.asarray(train([task]).parameters.isel(member=-1).sel(observation_step=18).values)
    _, unravel = ravel_pytree(spiral.network("paper", 6, jax.random.key(0)))
    raw = np.array([1 + 2 * 9 * (1 - 0.9), 1, 1])  # of class 0, after 0.9 of its turn
    weights, data = jnp.asarray(3 * raw / raw.sum()), spiral.spiral(0)

    def loss(flat):
        log = jax.nn.log_softmax(jax.vmap(unravel(flat))(data.inputs))
        return -jnp.mean(weights[data.labels] * log[jnp.arange(300), data.labels])

    hessian, value_and_grad = jax.jit(jax.hessian(loss)), jax.jit(jax.value_and_grad(loss))
    seen = results.sel(frozen="0.9 T", seed=1)
    largest = np.linalg.eigvalsh(hessian(flat))[-1]
    np.testing.assert_allclose(seen.hessian_max, largest, rtol=1e-6)
    for multiple in (0.5, 1.5):
        x, values = flat, []
        for _ in range(24):
            value, gradient = value_and_grad(x)
            values.append(value)
            x = x - multiple * 2 / largest * gradient
        one = seen.sel(multiple=multiple)
        np.testing.assert_allclose(one.initial_loss, values[0], rtol=1e-10)
        np.testing.assert_allclose(one.final_loss, values[-16:], rtol=1e-5)
        np.testing.assert_allclose(one.final_hessian_max, np.linalg.eigvalsh(hessian(x))[-1], rtol=1e-4)


@pytest.mark.parametrize("cycle, phases", [(2, (0.5, 0.6)), (3, (0.1, 0.3)), (5, (0.25, 0.5)), (1, (0.0,))])
def test_the_oscillation_goes_on_until_it_is_frozen(cycle, phases, x64):
    """Whatever the phases: the weights are those of the phase, by the formula."""
    config = bifurcation.Config(cycle=cycle, phase=phases, width=4, seeds=1)
    (task,) = bifurcation.tasks_of(config)
    schedule = jax.tree.map(lambda leaf: leaf[-1], task.members.losses.schedule)
    for step, phase in zip(config.steps, phases, strict=True):
        raw = np.ones(3)
        raw[(cycle - 1) % 3] += 2 * 69 * min(phase, 1 - phase)
        np.testing.assert_allclose(schedule(step), 3 * raw / raw.sum(), rtol=1e-9)
        assert task.plan.num_steps > step and step % (task.plan.observe_every or 1) == 0


def test_an_unfinished_sweep_says_so_and_counts_no_network_that_never_began(results, tmp_path):
    cut = results.assign_attrs(finished="false", steps_done=9)
    cut = cut.where(cut.seed == 0).assign(hessian_max=results.hessian_max, diverged_at=results.diverged_at)
    assert thresholds.write(cut, tmp_path)[0].startswith("INTERRUPTED after 9 updates")
    assert all(e.n <= 1 for events in thresholds.onsets(cut).values() for e in events.values())


def test_the_static_loss_goes_on_with_all_weights_1(results):
    assert results.frozen.values.tolist() == ["static", "0.5 T", "0.9 T"]
    assert results.sizes == {"frozen": 3, "seed": 2, "multiple": 3, "update": 16}
    assert np.isfinite(results.final_loss).all() and (results.diverged_at == -1).all()


@pytest.mark.parametrize("chunks", [slow(1), 4], ids=["after the networks", "in the sweep"])
def test_an_interrupted_run_goes_on(results, chunks, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(chunks, patch)
        assert command(*FLAGS, "--checkpoint-every", "0", "--out", "run") == 130
    assert "To go on: python -m experiments.bifurcation --resume run" in capsys.readouterr().out
    assert command("--resume", "run") == 0
    xr.testing.assert_equal(files.load(tmp_path / "run" / "results.nc"), results)


def test_compare_says_that_a_diagram_has_nothing_to_compare(results, tmp_path, capsys):
    files.save(results, tmp_path / "results.nc")
    assert run_command(compare.main, tmp_path) == 2
    assert "results.nc is a bifurcation diagram, which has no accuracies to compare" in capsys.readouterr().err


@pytest.mark.parametrize("flags, part", [
    ("--amplitude 1", "--amplitude must be above 1, which is the static loss, got 1"),
    ("--rates 2 1", "--rates takes the lowest and the highest rate"),
    ("--rates 1 1.00001", "--rates takes the lowest and the highest rate, with steps of at least 0.00001"),
    ("--rates 0 1", "--rates must be a positive number"),
    ("--num-rates 1", "--num-rates must be at least 2"),
    ("--last 15", "--last must be at least 16 updates"),
    ("--updates 0", "--updates must be at least 1"),
    ("--phase 0.123", "--phase takes hundredths of the period below 1, at whole updates, such as 0.5, got 0.123"),
    ("--phase 1", "--phase takes hundredths of the period below 1"),
    ("--phase 0.51", "at whole updates"),
    ("--phase 0.5 0.5", "different"),
    ("--show-seed 2", "--show-seed must be one of the seeds 0 to 1, got 2"),
])  # fmt: skip
def test_wrong_use_is_one_sentence_and_2(flags, part, tmp_path, capsys):
    assert command(*FLAGS, *flags.split(), "--out", "run") == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
