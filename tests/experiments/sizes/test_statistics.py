"""What is said of sizes, and drawn, from results that were made up."""

from typing import Any

import matplotlib.colors as colors
import numpy as np
import pytest
import xarray as xr
from scipy import stats

from experiments.results.estimate import Estimate
from experiments.results.labelled import SPLITS, combinations, unfold, with_loss_function
from experiments.sizes.__main__ import with_parameters
from experiments.sizes.figure import sizes
from experiments.sizes.statistics import console_tables, established, markdown, plain, points, verdicts

WIDTHS, SEEDS = (3, 30, 100), 8
RATES = {"cross-entropy": (0.3, 1.0), "squared-unit": (0.1, 0.3)}


def study(**attrs: Any) -> xr.Dataset:
    """Of two loss functions. With A = 10, networks from width 30 on are 0.2 more accurate, their loss is a third, and
    their λ is half as large; below nothing differs but by noise."""
    rng, parts = np.random.default_rng(0), list[xr.Dataset]()
    for function, rates in RATES.items():
        own = combinations((1, 10), (50,), range(SEEDS), loss_function=[function], init=["paper"], width=WIDTHS,
                           learning_rate=rates)  # fmt: skip
        members = len(own["seed"])
        helped = (own["amplitude"] == 10) & (own["width"] >= 30)
        luck = 0.02 * rng.normal(size=SEEDS)[own["seed"].astype(int)]
        noise = 0.01 * rng.permuted(np.tile(np.linspace(-1, 1, SEEDS), (members // SEEDS, 1)), axis=1).ravel()
        final = (0.5 + 0.2 * helped + luck + noise)[:, None] + np.array([0.05, 0.0])
        accuracy = np.stack([np.full_like(final, np.nan), final], -1)
        accuracy[:, 1, 0] = final[:, 1] - 0.1
        variables = {
            "accuracy": (("member", "split", "evaluation_step"), accuracy),
            "loss": (
                ("member", "split", "evaluation_step"),
                np.where(helped, 0.3, 0.9)[:, None, None] * (1.5 - accuracy),
            ),
            "hessian_max": (("member", "observation_step"), np.where(helped, 2.0, 4.0)[:, None] + noise[:, None]),
            "diverged_at": ("member", np.full(members, -1)),
        }
        axes = {"split": list(SPLITS), "evaluation_step": [50, 100], "observation_step": [100]}
        parts.append(xr.Dataset(variables, {name: ("member", values) for name, values in own.items()} | axes))
    attrs = {"dataset": "spiral", "finished": True, "steps_done": 100} | attrs
    whole = unfold(xr.concat(parts, "member"), periods=(50,), classes=("a", "b", "c"), **attrs)
    return with_parameters(with_loss_function(whole, *RATES))


@pytest.fixture(scope="module")
def dataset():
    return study()


def members_of(dataset, function, width, rate, amplitude) -> xr.Dataset:
    setting = {"loss_function": function, "width": width, "learning_rate": rate, "amplitude": amplitude}
    return dataset.sel(setting).squeeze()


def test_a_point_is_every_loss_at_every_size_and_rate_of_its_loss_function(dataset):
    found = points(dataset)
    settings = [(p.loss_function, p.width, p.learning_rate, p.condition.amplitude) for p in found]
    assert sorted(settings) == sorted(
        (function, width, rate, A)
        for function in RATES
        for width in WIDTHS
        for rate in RATES[function]
        for A in (1, 10)
    )
    assert {p.width: p.parameters for p in found} == {3: 21, 30: 183, 100: 603}
    for p, (*setting, amplitude) in zip(found, settings, strict=True):
        function, width, rate = setting
        mine, static = (members_of(dataset, function, width, rate, A) for A in (amplitude, 1))
        sharpness = mine.hessian_max.values
        assert p.sharpness.mean == pytest.approx(sharpness.mean()) and p.sharpness.n == SEEDS
        half = stats.t.ppf(0.975, SEEDS - 1) * sharpness.std(ddof=1) / SEEDS**0.5
        assert p.sharpness.high == pytest.approx(sharpness.mean() + half)
        if amplitude == 1:
            assert p.sharpening.n == 0 and p.condition.difference("validation").n == 0
            continue
        assert p.sharpening.mean == pytest.approx((sharpness - static.hessian_max.values).mean())
        gain = (mine.accuracy - static.accuracy).sel(split="validation", evaluation_step=100)
        assert p.condition.difference("validation").mean == pytest.approx(float(gain.mean()))


def test_members_that_diverged_are_in_no_mean(dataset):
    lost = {"loss_function": "cross-entropy", "width": 30, "learning_rate": 1.0, "amplitude": 10, "seed": 2}
    changed = dataset.copy(deep=True)
    changed.diverged_at.loc[lost] = 7
    changed.hessian_max.loc[lost] = 1e9
    (point,) = [p for p in points(changed) if p.width == 30 and p.learning_rate == 1 and p.condition.period]
    assert 2 not in point.sharpness.values and point.sharpness.n == point.sharpening.n == SEEDS - 1
    assert point.sharpness.mean is not None and point.sharpness.mean < 3


def test_both_the_interval_and_the_ranks_have_to_establish_a_difference():
    of = lambda *values: Estimate.of(dict(enumerate(values)), differences=True)
    assert established(of(1, 2, 3, 4, 5, 6)) == 1 and established(of(-1, -2, -3, -4, -5, -6)) == -1
    assert established(of(3, 3.1, 3.2, 3.3, 3.4)) == 0  # five seeds: the ranks cannot
    assert established(of(1, 2, 3, 4, 5, 600)) == 0  # the interval does not
    assert established(of(*[1] * 8)) == established(of(1)) == established(of()) == 0


def test_the_verdicts_name_the_sizes(dataset):
    *lines, _, notes = verdicts(points(dataset))
    assert len(lines) == 4 and "36 comparisons, not corrected" in notes
    (line,) = [line for line in lines if line.startswith("- cross-entropy, η = 1, A = 10, T = 50 against static")]
    assert "validation accuracy higher at 183, 603, undecided at 21;" in line
    assert "train loss lower at 183, 603, undecided at 21;" in line
    assert line.endswith("λ smaller at 183, 603, undecided at 21.")


def test_tables_have_the_numbers(dataset):
    lines = markdown(points(dataset))
    assert [line for line in lines if line.startswith("### ")] == ["### cross-entropy", "### squared-unit"]
    accuracy = members_of(dataset, "squared-unit", 100, 0.1, 10).accuracy.isel(evaluation_step=-1)
    cells = [f"{100 * float(accuracy.sel(split=s).mean()):.1f} ± " for s in SPLITS]
    (row,) = [line for line in lines if line.startswith("| 603 | 100 | 0.1 | A = 10, T = 50 |") and cells[0] in line]
    assert cells[1] in row and " | +" in row
    assert len([line for line in lines if line.startswith("| 21 | 3 |")]) == 2 * 2 * 2 * 2
    assert [table.row_count for table in console_tables(points(dataset))] == [6, 6]
    assert markdown([]) == [] and {p["width"] for p in plain(points(dataset))} == set(WIDTHS)


def lines_of(axes):
    """The curves, without horizontal lines."""
    return [line for line in axes.lines if np.size(line.get_xdata()) == len(WIDTHS)]


def test_the_figure_shows_the_numbers_of_the_dataset(dataset, tmp_path):
    figure = sizes(points(dataset), dataset, tmp_path / "a.png")
    panels = np.array(figure.axes).reshape(5, 2)
    assert [axes.get_title() for axes in panels[0]] == ["cross-entropy", "squared-unit (ours)"]
    assert "(nats)" in panels[3, 0].get_ylabel()
    last = dataset.isel(evaluation_step=-1, observation_step=-1, init=0, period=0)
    validation, train = (last.sel(split=s) for s in ("validation", "train"))
    rows = [
        100 * validation.accuracy,
        100 * train.accuracy,
        100 * (validation.accuracy - validation.accuracy[:, :, :, 0]),
    ]
    rows += [train.loss, last.hessian_max]
    for r, values in enumerate(rows):
        for (function, rates), axes in zip(RATES.items(), panels[r], strict=True):
            amplitudes = (10,) if r == 2 else (1, 10)
            wanted = [(A, rate) for A in amplitudes for rate in rates]
            curves = lines_of(axes)
            assert len(curves) == len(axes.collections) == len(wanted)
            for line, band, (A, rate) in zip(curves, axes.collections, wanted, strict=True):
                mine = values.sel(loss_function=function, learning_rate=rate, amplitude=A)
                np.testing.assert_allclose(line.get_ydata(), mine.mean("seed"))
                assert list(line.get_xdata()) == [21, 183, 603]
                half = stats.t.ppf(0.975, SEEDS - 1) * mine.std("seed", ddof=1) / SEEDS**0.5
                (path,) = band.get_paths()
                top = (mine.mean("seed") + half).values
                assert np.isclose(path.vertices[:, 1].max(), top.max())
            if r >= 3:
                assert axes.get_yscale() == "log"


def test_losses_differ_in_colour_and_filling_and_rates_in_line_style_and_marker(dataset, tmp_path):
    figure = sizes(points(dataset), dataset, tmp_path / "a.png")
    curves = [line for axes in figure.axes[:2] for line in lines_of(axes)]  # static twice, dynamical twice, in each
    looks = [(colors.to_hex(line.get_color()), colors.to_hex(line.get_markerfacecolor())) for line in curves]
    assert len(set(looks)) == 2 and looks[0] == looks[1] == ("#000000", "#ffffff") and looks[2][0] == looks[2][1]
    styles = [(line.is_dashed(), line.get_marker()) for line in curves]
    assert styles[:4] == [(True, "s"), (True, "^")] * 2
    assert styles[4:] == [(False, "o"), (True, "s")] * 2  # a rate, 0.3, looks the same for all loss functions
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert set(names) == {
        f"{loss}, η = {rate}" for loss in ("static", "A = 10, T = 50") for rate in ("0.1", "0.3", "1")
    }
    for axes, rates in zip(figure.axes[-2:], RATES.values(), strict=True):
        heights = {float(np.asarray(line.get_ydata())[0]) for line in axes.lines if np.size(line.get_xdata()) == 2}
        assert heights == {2 / rate for rate in rates}
        assert {text.get_text() for text in axes.texts} == {f"2/η,\nη = {rate:g}" for rate in rates}
        figure.canvas.draw()
        assert [label.get_text() for label in axes.get_xticklabels()] == ["21\n(3)", "183\n(30)", "603\n(100)"]


def test_an_interrupted_run_has_no_sharpness_and_is_drawn(tmp_path):
    dataset = study(finished=False).drop_dims("observation_step")
    found = points(dataset)
    assert all(p.sharpness.n == 0 for p in found) and "λ undecided at 21, 183, 603" in verdicts(found)[0]
    figure = sizes(found, dataset, tmp_path / "a.png")
    assert "INTERRUPTED" in figure.get_suptitle() and not lines_of(figure.axes[-1])
    sizes([], dataset, tmp_path / "b.png")
