from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from experiments.cifar.figures import _windows, class_weights, learning_curves
from experiments.results.style import BINS, extremes

from ..synthetic import CLASSES, results
from ..synthetic import class_weights as weights

PLOTS = [learning_curves, class_weights]


def title(path) -> str:
    """Checks that the file is an image with something drawn on it, and returns the title stored in it."""
    with Image.open(path) as image:
        assert image.format == "PNG" and len(np.unique(np.asarray(image.convert("L")))) > 10
        return str(image.info["Title"])


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("plot", PLOTS)
def test_titles_name_the_data_set(tmp_path, plot):
    plot(results(), tmp_path / "a.png")
    assert title(tmp_path / "a.png").endswith(": CIFAR-10")
    figure = plot(results(dataset="digits", classes=tuple("0123456789")), tmp_path / "b.png")
    assert "scikit-learn digits (stand-in, not CIFAR-10)" in title(tmp_path / "b.png")
    assert "stand-in, not CIFAR-10" in figure.get_suptitle()


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("evaluations", [0, 1, 2])
def test_interrupted_runs_are_drawn_and_say_so(tmp_path, plot, evaluations):
    plot(results(steps=30, evaluations=evaluations, finished=False), tmp_path / "a.png")
    assert "INTERRUPTED after 30 updates" in title(tmp_path / "a.png")


@pytest.mark.parametrize("plot", PLOTS)
def test_runs_with_nothing_to_draw_do_not_fail(tmp_path, plot):
    plot(results(evaluations=0).isel(step=slice(0)), tmp_path / "a.png")
    plot(results(seeds=1, diverged={0: 3, 1: 3}), tmp_path / "b.png")
    assert title(tmp_path / "a.png") and title(tmp_path / "b.png")


def test_the_legend_says_what_each_line_is(tmp_path):
    dataset = results(seeds=2, amplitudes=(10, 70), diverged={2: 50, 4: 50, 5: 50})
    static, partly, gone = legend(learning_curves(dataset, tmp_path / "a.png"))
    assert static.startswith("static: ") and "±" in static
    assert (
        partly.startswith("A = 10, T = 50 (1.25 ep): ")
        and "1 of 2 seeds; the others diverged" in partly
        and "±" not in partly
    )
    assert gone == "A = 70, T = 50 (1.25 ep): diverged for every seed"


def test_one_seed_has_no_band(tmp_path):
    one, three = (learning_curves(results(seeds=n), tmp_path / "a.png") for n in (1, 3))
    assert "1 seed, no band" in one.legends[0].get_title().get_text()
    assert [len(axes.collections) for axes in one.axes] == [0, 0, 0]
    assert [len(axes.collections) for axes in three.axes] == [2, 2, 2]


@pytest.mark.parametrize("seeds, lines", [(2, 2), (8, 8), (9, 0)])
def test_few_seeds_are_drawn_one_by_one(tmp_path, seeds, lines):
    dataset = results(seeds=seeds)
    figure: Any = learning_curves(dataset, tmp_path / "a.png")
    validation = 100 * dataset.accuracy.sel(split="validation", amplitude=10).isel(period=0).values
    thin = [line for line in figure.axes[0].lines if line.get_linewidth() < 1]
    assert len(thin) == 2 * lines and ("thin: every seed" in figure.legends[0].get_title().get_text()) == bool(lines)
    if lines:
        np.testing.assert_allclose([line.get_ydata() for line in thin[lines:]], validation)


def test_collapsed_seeds_are_counted_in_the_legend(tmp_path):
    dataset = results(seeds=4)
    dataset.accuracy[1, 0, 2, 1, -2:] = 0.1
    static, dynamical = legend(learning_curves(dataset, tmp_path / "a.png"))
    assert "collapsed" not in static and "1 of 4 seeds collapsed" in dynamical and "median" in dynamical


def test_the_curvature_has_a_panel_with_what_is_stable(tmp_path):
    dataset = results(seeds=3, momentum=0.9)
    steps = dataset.evaluation_step.values
    shape = (*dataset.diverged_at.shape, len(steps))
    dims = ("amplitude", "period", "seed", "observation_step")
    largest = np.random.default_rng(0).lognormal(2, 1, shape)
    dataset = dataset.assign_coords(observation_step=steps).assign(
        peak_hessian_max=(dims, largest), static_hessian_max=(dims, largest / 2),
        step_size=("observation_step", np.linspace(0.02, 0.05, len(steps))),
    )  # fmt: skip
    axes = learning_curves(dataset, tmp_path / "a.png").axes
    assert len(axes) == 4 and len(learning_curves(results(), tmp_path / "b.png").axes) == 3
    panel: Any = axes[2]
    drawn = {str(line.get_label()): line.get_ydata() for line in panel.lines}
    np.testing.assert_allclose(drawn["2/η"], 2 / dataset.step_size)
    np.testing.assert_allclose(panel.lines[0].get_ydata(), np.exp(np.log(largest[0, 0]).mean(0)))
    for rate, limit in zip(dataset.step_size.values, drawn["stable below, with Nesterov momentum 0.9"], strict=True):
        assert converges(0.99 * limit, rate) and not converges(1.01 * limit, rate)


def converges(eigenvalue: float, rate: float) -> bool:
    """Whether the optimiser of the experiments comes to rest on a quadratic loss of that curvature."""
    optimiser = optax.sgd(rate, momentum=0.9, nesterov=True)

    def step(carry, _):
        x, state = carry
        update, state = optimiser.update(eigenvalue * x, state)
        return (x + update, state), None

    (x, _), _ = jax.lax.scan(step, (jnp.float32(1.0), optimiser.init(jnp.float32(1.0))), length=3000)
    return bool(jnp.abs(x) < 1e-3)


@pytest.mark.parametrize("plot, shown", [(learning_curves, 6), (class_weights, 4)])
def test_a_large_grid_is_thinned_evenly_and_says_so(tmp_path, plot, shown):
    dataset = results(seeds=2, amplitudes=(2, 4, 8), periods=(10.0, 20.0, 40.0))
    figure = plot(dataset, tmp_path / "a.png")
    assert f"{shown} of 9 dynamical conditions shown" in title(tmp_path / "a.png")
    titles = legend(figure) if plot is learning_curves else [axes.get_title() for axes in figure.axes]
    assert any("A = 2, T = 10" in t for t in titles) and any("A = 8, T = 40" in t for t in titles)


def test_epochs_are_shown_only_when_known(tmp_path):
    dataset = results(steps_per_epoch=40)
    assert len(learning_curves(dataset, tmp_path / "a.png").axes[0].child_axes) == 1
    del dataset.attrs["steps_per_epoch"]
    assert not learning_curves(dataset, tmp_path / "a.png").axes[0].child_axes


def test_windows_average_what_they_cover():
    middle, means = _windows(np.arange(1000.0)[None])
    np.testing.assert_allclose(means[0], middle)
    middle, means = _windows(np.arange(3.0)[None])
    np.testing.assert_array_equal(middle, [0, 1, 2])


def test_decimation_keeps_every_peak_and_the_ends():
    series = weights(70, 500, 70_000)[:, 3]
    steps, values = extremes(series)
    assert len(steps) <= 2 * BINS + 2 and (steps[0], steps[-1]) == (0, 69_999)
    peaks = np.flatnonzero(series == series.max())
    assert len(peaks) == 12 and np.isin(peaks, steps).all()
    np.testing.assert_array_equal(values, series[steps])


def test_the_zoom_names_the_classes_at_their_peaks(tmp_path):
    whole, zoom = class_weights(results(steps=1000), tmp_path / "a.png").axes
    assert [text.get_text() for text in zoom.texts] == list(CLASSES)
    assert [text.xy[0] for text in zoom.texts] == [25 + 50 * i for i in range(10)]  # pyright: ignore[reportAttributeAccessIssue]
    assert zoom.get_xlim()[1] < 520 and whole.get_xlim()[1] > 999


def test_a_run_of_many_passes_shows_the_range_of_the_weights(tmp_path):
    whole, _ = class_weights(results(steps=2000, periods=(20.0,)), tmp_path / "a.png").axes
    assert "range" in whole.get_title() and len(whole.lines) == 1


def test_without_dynamical_conditions_the_static_weights_are_drawn(tmp_path):
    class_weights(results(amplitudes=(1,)), tmp_path / "a.png")
    assert title(tmp_path / "a.png")
