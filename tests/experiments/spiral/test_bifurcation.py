"""When gradient descent becomes unstable: on a quartic whose curvature grows, where the answer is known."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from experiments.spiral import bifurcation as module
from experiments.spiral.bifurcation import Times, bifurcation, crossing


def descent(rate, start, slope, beyond=300):
    """Gradient descent on c(t)·x²/2 − x⁴/4 with curvature c(t) = start + slope·t, a small force and a little noise.

    Unstable from c(t) = 2/rate on: x then alternates with amplitude √(c(t) − 2/rate). Returns losses and curvatures.
    """
    rng = np.random.default_rng(0)
    x, losses, curvatures = 0.0, [], []
    for t in range(round((2 / rate - start) / slope) + beyond):
        c = start + slope * t
        losses.append(1 + c * x**2 / 2 - x**4 / 4 - 0.1 * x)
        curvatures.append(c - 3 * x**2)
        x -= rate * (c * x - x**3 - 0.1 + 1e-3 * rng.standard_normal())
    return np.array(losses), np.array(curvatures)


@pytest.mark.parametrize("rate, start, slope", [(1.0, 1.0, 1e-3), (0.5, 3.0, 1e-3), (0.2, 9.0, 2e-3)])
def test_the_loss_begins_to_alternate_where_the_curvature_crosses_two_over_the_rate(rate, start, slope):
    losses, curvatures = descent(rate, start, slope)
    when = (2 / rate - start) / slope
    steps = np.arange(0, len(losses), 25)
    assert abs(crossing(steps, curvatures[::25], 2 / rate) - when) < 50
    assert 0 <= bifurcation(losses) - when < 250  # the alternation grows from the noise, slowly at first


def test_crossings_are_interpolated():
    steps = np.array([0, 10, 20, 30])
    assert crossing(steps, np.array([1.0, 1.5, 2.5, 3.0]), 2) == 15
    assert crossing(steps, np.array([1.0, 1.0, 2.0, 1.0]), 2) == 20
    assert np.isnan(crossing(steps, np.array([3.0, 1.0, 2.5, 1.0]), 2))  # unstable from the start
    assert np.isnan(crossing(steps, np.array([3.0, 2.5, 2.2, 2.1]), 2))
    assert np.isnan(crossing(steps, np.array([1.0, np.nan, np.nan, np.nan]), 2))


def test_a_smooth_or_short_loss_has_no_bifurcation():
    assert np.isnan(bifurcation(np.exp(-np.arange(500) / 100)))
    assert np.isnan(bifurcation(np.ones(7)))
    assert np.isnan(bifurcation(np.where(np.arange(100) < 50, 1.0, np.nan)))  # diverged


def test_the_correlation_is_that_of_seeds_with_both_times():
    x = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 6.0])
    y = np.array([1.0, 2.5, 2.5, 4.5, 5.0, np.nan])
    r, low, high, n = Times("", "static", x, y).correlation()
    assert n == 4 and np.isclose(r, np.corrcoef(x[:4], y[:4])[0, 1])
    z, half = np.arctanh(r), 1.959964 / np.sqrt(4 - 3)  # Fisher's z
    assert np.allclose([low, high], [np.tanh(z - half), np.tanh(z + half)], atol=1e-6)
    assert np.isnan(Times("", "static", x[:2], y[:2]).correlation()[0])
    assert np.isnan(Times("", "static", np.ones(5), np.arange(5.0)).correlation()[0])


def test_nothing_to_draw_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "first_times", lambda dataset: [Times("", "static", *np.full((2, 3), np.nan))])
    dataset = xr.Dataset(attrs={"dataset": "spiral", "finished": "true"})
    assert isinstance(module.figure(dataset, tmp_path / "a.png"), Figure)
