"""Decision regions: against the network itself, and the command."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from PIL import Image

from experiments.problems import spiral
from experiments.regions import __main__ as regions
from experiments.regions import figures
from experiments.results import files
from experiments.running.training import train

from ..synthetic import interrupt_after, run_command

FLAGS = "--seeds 2 --amplitude 10 --period 4 --updates 12 --frames 3 --shown 2 --width 6".split()
FILES = {"results.nc", "summary.md", "summary.json", "config.json", "regions.png", "regions.gif"}

pytestmark = pytest.mark.usefixtures("sandbox")
command = ft.partial(run_command, regions.main)


@pytest.fixture(scope="module")
def results(tmp_path_factory, devices_as_they_are) -> xr.Dataset:
    """Of two seeds and a narrow network, from the command itself."""
    path = tmp_path_factory.mktemp("regions") / "run"
    assert command(*FLAGS, "--animation", "--out", path) == 0
    assert {p.name for p in path.iterdir() if p.is_file()} == FILES
    with Image.open(path / "regions.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 3
    return files.load(path / "results.nc").squeeze(["init", "width", "learning_rate"])


def test_decisions_and_confidence_are_those_of_the_network(results, x64):
    """Of a second seed before its first update, point by point, in NumPy."""
    (task,) = regions.tasks_of(regions.Config(seeds=2, updates=12, period=4, frames=3, shown=2, width=6))
    states = task.members.init()
    first, last = (jax.tree.map(lambda a: np.asarray(a[1]), layer) for layer in states.model.layers)
    seen = results.sel(seed=1, amplitude=1).isel(period=0).sel(observation_step=0)
    assert seen.decision.dtype == np.int8 and seen.confidence.dtype == np.float32
    for x, y in [(-1.25, -1.25), (0.5, -1.0), (0.0, 1.0), (1.25, 0.25)]:
        at = seen.sel(x=x, y=y, method="nearest")
        hidden = np.maximum(first.weight @ [float(at.x), float(at.y)] + first.bias, 0)
        exponentials = np.exp(last.weight @ hidden + last.bias)
        assert int(at.decision) == exponentials.argmax()
        assert float(at.confidence) == pytest.approx(exponentials.max() / exponentials.sum(), rel=1e-6)


def test_what_is_seen_is_what_is_evaluated(results, x64):
    """The accuracy of the decisions nearest to the validation points is about the one evaluated at that step."""
    data = spiral.spiral(1)
    for amplitude in (1, 10):
        member = results.sel(seed=0, amplitude=amplitude).isel(period=0)
        at = xr.DataArray(np.asarray(data.inputs), dims=("point", "axis"))
        nearest = member.decision.sel(observation_step=8).sel(x=at.isel(axis=0), y=at.isel(axis=1), method="nearest")
        found = np.mean(nearest.values == np.asarray(data.labels))
        evaluated = member.accuracy.sel(split="validation", evaluation_step=8)
        assert found == pytest.approx(float(evaluated), abs=0.05)


def test_looking_changes_nothing(results, x64):
    (task,) = regions.tasks_of(
        regions.Config(seeds=2, amplitude=10.0, updates=12, period=4, frames=3, shown=2, width=6)
    )
    plain = spiral.tasks(
        {"": {"init": "paper", "width": 6}}, 12, 3, {}, amplitudes=[10.0], periods=[4.0], seeds=range(2),
        learning_rates=[1.0], loss="cross-entropy",
    )  # fmt: skip
    np.testing.assert_allclose(train(plain).loss.isel(evaluation_step=-1), train([task]).loss.isel(evaluation_step=-1),
                               rtol=1e-12)  # fmt: skip


def test_an_interrupted_run_shows_what_it_has_and_goes_on(results, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        assert command(*FLAGS, "--checkpoint-every", "0", "--out", "run") == 130
    assert "To go on: python -m experiments.regions --resume run" in capsys.readouterr().out
    assert (tmp_path / "run" / "regions.png").exists()
    assert command("--resume", "run") == 0
    found = files.load(tmp_path / "run" / "results.nc").squeeze(["init", "width", "learning_rate"])
    xr.testing.assert_equal(found, results)


@pytest.mark.slow
def test_slices_of_the_seeds_become_the_run(results, tmp_path):
    from experiments.merge import __main__ as merge

    for seeds in ("0:1", "1:2"):
        assert command(*FLAGS, "--seeds", seeds, "--out", seeds) == 0
    assert run_command(merge.main, "0:1", "1:2", "--out", "all") == 0
    found = files.load(tmp_path / "all" / "results.nc").squeeze(["init", "width", "learning_rate"])
    xr.testing.assert_equal(found, results)
    assert found.decision.dtype == results.decision.dtype and (tmp_path / "all" / "regions.png").exists()


def test_a_network_that_never_came_to_a_step_is_white(results, tmp_path):
    gone = results.assign(
        decision=xr.full_like(results.decision, -1), confidence=xr.full_like(results.confidence, jnp.nan)
    ).expand_dims(init=1, width=1, learning_rate=1)
    figure = figures.regions(gone, 0, 1, tmp_path / "regions.png")
    assert np.all(figure.axes[0].images[0].get_array() == 1)


@pytest.mark.parametrize("flags, part", [
    ("--amplitude 1", "--amplitude must be above 1, which is the static loss, got 1"),
    ("--frames 5", "--frames must be a divisor of the 12 updates, got 5"),
    ("--frames 0", "--frames must be at least 1"),
    ("--shown 4", "--shown must be at most the number of --frames, 3, got 4"),
    ("--period 1", "--period must be at least 2 updates"),
    ("--learning-rate nan", "--learning-rate must be a positive number"),
    ("--show-seed 2", "--show-seed must be one of the seeds 0 to 1, got 2"),
])  # fmt: skip
def test_wrong_use_is_one_sentence_and_2(flags, part, tmp_path, capsys):
    assert command(*FLAGS, *flags.split(), "--out", "run") == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
