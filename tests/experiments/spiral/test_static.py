"""The figure of the static loss, from results that were made up."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.text import Annotation

from experiments.results import labelled
from experiments.spiral import dynamics
from experiments.spiral.static import static_curves

from ..cifar.test_figures import legend, title
from ..synthetic import results
from .test_dynamics import STEPS, run


def runs(widths=(7, 30), rates=(0.5, 1.0), **options):
    """Settings that differ in width and learning rate, each with numbers of its own, and a dynamical loss to ignore."""

    def one(width, rate):
        part = run(rate=rate, **options).assign_coords(width=width)
        scaled = {name: part[name] * width * rate for name in ("minibatch_loss", "hessian_max") if name in part}
        return part.assign(scaled)

    rows = [xr.concat([one(width, rate) for rate in rates], "learning_rate") for width in widths]
    return xr.concat(rows, "width").expand_dims("init")


def curves(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axes.lines[:4]}


def test_curves_are_medians_of_the_static_losss_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamics, "_WINDOWS", 4)
    dataset = runs()
    figure = static_curves(dataset, tmp_path / "a.png")
    assert title(tmp_path / "a.png").startswith("Static loss: the spiral (Glorot init); median of 3 seeds, band: 16th")
    for axes, variable in zip(figure.axes, ("minibatch_loss", "hessian_max"), strict=True):
        drawn = curves(axes)
        assert list(drawn) == legend(figure) and len(drawn) == 4
        for name, part in labelled.by_setting(dataset):
            windows = part[variable].values[0, 0].reshape(3, 4, -1).mean(2)
            np.testing.assert_allclose(drawn[name], np.median(windows, 0))
        assert axes.get_yscale() == "log" and len(axes.collections) == 4  # a band for each
    assert "(nats)" in figure.axes[0].get_ylabel() and figure.axes[1].get_xlabel() == "step (updates)"


def test_the_edge_of_stability_of_every_learning_rate_is_marked(tmp_path):
    axes = static_curves(runs(rates=(0.5, 1.0)), tmp_path / "a.png").axes[1]
    dashed = [line for line in axes.lines if len(set(np.asarray(line.get_ydata()))) == 1]
    assert [np.asarray(line.get_ydata())[0] for line in dashed] == [4, 2]
    assert all(line.is_dashed() for line in dashed)
    labels = {text.get_text(): text.xy[1] for text in axes.texts if isinstance(text, Annotation)}
    assert labels == {"2/η, η = 0.5": 4, "2/η, η = 1": 2}
    low, high = axes.get_ylim()
    assert low < 2 and high > 4


def test_learning_rates_differ_in_line_style_and_networks_in_colour_and_marker(tmp_path):
    lines = static_curves(runs(), tmp_path / "a.png").axes[0].lines
    (a, b), (c, d) = ([(x.get_color(), x.get_marker(), x.is_dashed()) for x in pair] for pair in (lines[:2], lines[2:]))
    assert a[:2] == b[:2] and c[:2] == d[:2] and a[0] != c[0] and a[1] != c[1]
    assert a[2] == c[2] != b[2] == d[2]


@pytest.mark.parametrize("widths, rates", [(range(1, 14), (1.0,)), ((7,), np.arange(1, 14) / 13)])
def test_twelve_settings_look_different_and_more_are_left_out_and_counted(widths, rates, tmp_path):
    figure = static_curves(runs(widths, rates), tmp_path / "a.png")
    names = ("color", "marker", "markerfacecolor", "dash_pattern", "linewidth")
    looks = {tuple(str(getattr(line, f"_{name}")) for name in names) for line in figure.axes[0].lines}
    assert len(looks) == len(figure.axes[0].lines) == len(legend(figure)) == 12
    assert "the first 12 of 13 settings shown" in title(tmp_path / "a.png")


def test_diverged_members_are_missing_from_then_on_and_off_the_scale_before(tmp_path):
    dataset = runs()
    worst = {"amplitude": 0, "period": 0, "width": 1, "learning_rate": 1}
    for seed, step, huge in ((0, 100, 1e300), (2, 200, np.inf)):
        dataset.diverged_at[worst | {"seed": seed}] = step
        dataset.minibatch_loss[worst | {"seed": seed, "step": slice(step + 1, None)}] = np.nan
        dataset.minibatch_loss[worst | {"seed": seed, "step": slice(step - 50, step + 1)}] = huge
        dataset.hessian_max[worst | {"seed": seed, "observation_step": slice(step // 10 + 1, None)}] = np.nan
    figure = static_curves(dataset, tmp_path / "a.png")
    assert legend(figure)[-1] == "width 30, learning rate 1 (2 of 3 diverged)"
    assert "members that diverged are missing from then on" in title(tmp_path / "a.png")
    low, high = figure.axes[0].get_ylim()
    assert high <= 100 * dataset.minibatch_loss[..., 0].values.max()
    *calm, diverged = curves(figure.axes[0]).values()
    assert all(low < curve.min() and curve.max() < high for curve in calm)
    np.testing.assert_allclose(diverged[-1], dataset.minibatch_loss[worst | {"seed": 1}].values[0, -4:].mean())


def test_a_setting_that_diverged_at_once_is_in_the_legend(tmp_path):
    dataset = runs()
    worst = {"amplitude": 0, "period": 0, "width": 0, "learning_rate": 0}
    dataset.diverged_at[worst] = 1
    dataset.minibatch_loss[worst | {"step": slice(1, None)}] = np.nan
    dataset.hessian_max[worst | {"observation_step": slice(1, None)}] = np.nan
    assert legend(static_curves(dataset, tmp_path / "a.png"))[0].endswith("(3 of 3 diverged)")


def test_one_seed_has_no_band_and_without_curvature_there_is_one_panel(tmp_path):
    (axes,) = static_curves(runs(seeds=1, observed=False), tmp_path / "a.png").axes
    assert len(axes.lines) == 4 and not axes.collections and axes.get_xlabel() == "step (updates)"
    assert "1 seed, no band" in title(tmp_path / "a.png")


def test_other_losses_are_named_and_interrupted_runs_say_so(tmp_path):
    dataset = runs(finished=False, steps_done=STEPS, loss_function="squared-unit")
    figure = static_curves(dataset, tmp_path / "a.png")
    assert title(tmp_path / "a.png").startswith("Static loss, squared-unit: the spiral")
    assert "INTERRUPTED after 400 updates" in title(tmp_path / "a.png")
    assert figure.axes[0].get_ylabel() == "train loss (squared-unit)"


def test_results_without_settings_have_one_curve(tmp_path):
    figure = static_curves(results(), tmp_path / "a.png")
    assert legend(figure) == ["static loss"] and len(figure.axes[0].lines) == 1
