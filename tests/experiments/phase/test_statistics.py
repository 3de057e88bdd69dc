"""The statistics of phase diagrams, against scipy's paired t-test and a Benjamini–Hochberg procedure written out."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from experiments.phase.statistics import best, counts, loss_function, markdown, over_cells, series, statistics


def diagram(amplitudes=(1, 2, 10, 70), periods=(50, 500, 5000), seeds=6, rng=0, curvature=True, **attrs) -> xr.Dataset:
    """A phase diagram as `_results` describes it: the larger the amplitude, the better, up to 10 points."""
    draw = np.random.default_rng(rng)
    shape = (len(amplitudes), len(periods), seeds)
    gain = 0.1 * np.log(amplitudes) / np.log(70)
    accuracy = 0.7 + gain[:, None, None] + draw.normal(0, 0.03, seeds) + draw.normal(0, 0.03, shape)
    accuracy = np.stack([accuracy + 0.05, accuracy], -1)[..., None] * np.array([0.5, 1.0])  # two evaluations
    accuracy[..., 0, 0] = np.nan  # train is evaluated at the end only
    accuracy[0] = accuracy[0, :1]
    accuracy = accuracy.astype(np.float32)
    dims = ("amplitude", "period", "seed")
    dataset = xr.Dataset(
        {
            "accuracy": ((*dims, "split", "evaluation_step"), accuracy),
            "loss": ((*dims, "split", "evaluation_step"), 1 - accuracy),
            "diverged_at": (dims, np.full(shape, -1)),
        },
        {
            "amplitude": np.array(amplitudes, float),
            "period": np.array(periods, float),
            "seed": np.arange(seeds),
            "split": ["train", "validation"],
            "evaluation_step": [1000, 2000],
        },
        {"dataset": "spiral", "finished": "true", "steps_done": 2000, **attrs},
    )
    if curvature:
        for name in ("hessian_max", "ntk_max"):
            values = draw.lognormal(0, 1, (*shape, 1))
            values[0] = values[0, :1]
            dataset[name] = ((*dims, "observation_step"), values)
        dataset = dataset.assign_coords(observation_step=[2000])
    return dataset


def by_width(rates=(1.0,), shrinks=True) -> xr.Dataset:
    """Networks of three widths of which the wide ones have the more accurate static loss, and so gain less."""
    parts = []
    for i, width in enumerate((10, 100, 1000)):
        part = diagram(amplitudes=(1, 10, 70), periods=(50, 500), rng=i)
        part.accuracy[0] += 0.03 * i if shrinks else -0.03 * i
        parts.append(part.expand_dims(init=["paper"], width=[width]))
    widths = xr.concat(parts, "width", data_vars="all", join="exact")
    rated = [widths.expand_dims(learning_rate=[rate]) for rate in rates]
    dataset = xr.concat(rated, "learning_rate", data_vars="all", join="exact").assign_attrs(parts[0].attrs)
    return dataset.transpose("init", "width", "learning_rate", ...)


def final(dataset, split="validation") -> np.ndarray:
    """Accuracies `[amplitude, period, seed]` at the end, as float64."""
    return dataset.accuracy.sel(split=split).values[..., -1].astype(float)


def set_final(dataset, amplitude, period, values) -> None:
    """Sets the last validation accuracies of a cell's seeds; amplitude and period are indices."""
    dataset.accuracy[amplitude, period, :, 1, -1] = values


def benjamini_hochberg(p: np.ndarray, rate=0.05) -> np.ndarray:
    """Rejects the k smallest p-values, k being the largest with p_(k) ≤ k/m · rate."""
    order = np.sort(p.ravel())
    passed = [value for k, value in enumerate(order, start=1) if value <= k / p.size * rate]
    return p <= max(passed, default=-1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_cell_agrees_with_scipy(split):
    dataset = diagram()
    found, values = statistics(dataset).sel(split=split), final(dataset, split)
    static, p_values = values[0, 0], np.empty((3, 3))
    for (a, p), _ in np.ndenumerate(p_values):
        cell, sample = found.isel(amplitude=a, period=p), values[a + 1, p]
        test = stats.ttest_rel(sample, static)
        interval = test.confidence_interval(0.95)
        numbers = sample.mean(), sample.std(ddof=1), (sample - static).mean(), interval.low, interval.high, test.pvalue
        names = "mean", "std", "gain", "low", "high", "p"
        np.testing.assert_allclose([cell[name] for name in names], numbers, rtol=1e-9)
        p_values[a, p] = test.pvalue
    np.testing.assert_array_equal(found.significant, benjamini_hochberg(p_values))
    assert 0 < found.significant.sum() < 9  # the test would be empty otherwise
    np.testing.assert_allclose([found.static_mean, found.static_std], [static.mean(), static.std(ddof=1)])
    assert (found.n == 6).all() and found.amplitude.values.tolist() == [2, 10, 70]


def test_benjamini_hochberg_is_over_the_cells_of_a_split():
    """A cell that is significant alone need not be among others; one that is not alone never is."""
    dataset = diagram(amplitudes=(1, *range(2, 12)), rng=3)
    found = statistics(dataset)
    for split in ("train", "validation"):
        p = found.p.sel(split=split).values
        np.testing.assert_array_equal(found.significant.sel(split=split), benjamini_hochberg(p))
    assert ((found.p < 0.05) & ~found.significant).any() and not ((found.p > 0.05) & found.significant).any()


def test_members_that_diverged_or_are_nan_are_left_out_on_both_sides():
    dataset = diagram()
    dataset.diverged_at[0, :, 1] = 7  # static
    dataset.diverged_at[2, 0, 2] = 7
    dataset.accuracy[2, 0, 3] = np.nan  # not flagged
    cell = statistics(dataset).sel(split="validation").isel(amplitude=1, period=0)
    values = final(dataset)
    assert (cell.n, cell.static_n) == (4, 5)
    np.testing.assert_allclose(cell["mean"], values[2, 0, [0, 1, 4, 5]].mean())
    sample, static = values[2, 0, [0, 4, 5]], values[0, 0, [0, 4, 5]]
    assert cell.gain.item() == pytest.approx((sample - static).mean())
    assert cell.p.item() == pytest.approx(stats.ttest_rel(sample, static).pvalue)


def test_a_cell_without_members_has_no_numbers_and_is_no_evidence():
    dataset = diagram()
    dataset.diverged_at[3, 1] = 0
    found = statistics(dataset).sel(split="validation")
    cell = found.isel(amplitude=2, period=1)
    assert cell.n == 0 and not cell.significant and all(np.isnan(cell[name]) for name in ("mean", "std", "gain", "p"))
    np.testing.assert_array_equal(found.significant, benjamini_hochberg(found.p.fillna(1).values))
    text = "\n".join(markdown(dataset))
    assert "| – |" in text and "(1 of them could not be tested)" in text and "nan" not in text


def test_one_seed_establishes_nothing():
    found = statistics(diagram(seeds=1))
    assert np.isfinite(found.gain).all() and np.isnan(found.p).all() and not found.significant.any()
    text = "\n".join(markdown(diagram(seeds=1)))
    assert "undecided in 9 (9 of them could not be tested)" in text
    assert not any(word in text.replace("mean ± std", "") for word in ("nan", "±", "▲ |", "▼ |"))


def test_the_same_difference_for_every_seed_is_no_evidence():
    """In float32 the differences differ in their last digits, of which a t-test makes certainty."""
    dataset = diagram()
    static = np.array([0.4, 0.5, 0.6, 0.7, 0.8, 0.9], np.float32) / np.float32(1.01)
    set_final(dataset, 0, slice(None), static)
    set_final(dataset, 1, 0, static + np.float32(0.05))  # rounded
    set_final(dataset, 1, 1, static)  # no difference
    values = final(dataset)
    assert stats.ttest_rel(values[1, 0], values[0, 0]).pvalue < 1e-9
    found = statistics(dataset).sel(split="validation").isel(amplitude=0)
    assert np.isnan(found.p[:2]).all() and not found.significant[:2].any()


def test_equal_outcomes_are_evidence_if_the_static_ones_vary():
    dataset = diagram()
    set_final(dataset, 3, 2, 0.9933)
    cell = statistics(dataset).sel(split="validation").isel(amplitude=2, period=2)
    values = final(dataset)
    assert cell["std"] < 1e-9 and cell.significant
    assert cell.p.item() == pytest.approx(stats.ttest_rel(values[3, 2], values[0, 0]).pvalue)


def test_better_worse_and_undecided_cells_are_counted_and_marked():
    dataset = diagram(amplitudes=(1, 2), periods=(1, 2, 3))
    static, wobble = final(dataset)[0, 0], np.array([0.01, -0.01] * 3)
    for period, shift in enumerate((0.2, -0.2, 0)):
        set_final(dataset, 1, period, static + shift + wobble)
    cells = statistics(dataset).sel(split="validation")
    assert counts(cells) == (1, 1, 1) and best(cells) == {"amplitude": 0, "period": 0}
    row = [line for line in markdown(dataset) if line.startswith("| 2 |")][1]
    _, _, up, down, neither, _ = row.split("|")
    assert up.endswith(" ▲ ") and down.endswith(" ▼ ") and neither.strip()[-1].isdigit()


def test_the_loss_is_compared_as_the_accuracy_is_and_lower_is_better():
    dataset = diagram()
    values = dataset.loss.sel(split="validation").values[..., -1].astype(float)
    cells = statistics(dataset, "loss").sel(split="validation")
    for a, p in np.ndindex(3, 3):
        oracle = stats.ttest_rel(values[a + 1, p], values[0, 0])
        assert cells.gain.values[a, p] == pytest.approx((values[a + 1, p] - values[0, 0]).mean())
        assert cells.p.values[a, p] == pytest.approx(oracle.pvalue)
    above, below, undecided = counts(cells)
    text = "\n".join(markdown(dataset))
    assert below > 0 == above
    assert f"significantly lower with the dynamical loss in {below}, significantly higher in 0, undecided in" in text
    lowest = values.mean(-1)[1:].min()
    assert (
        f"It is lowest at A = 70, T = {dataset.period.values[values.mean(-1)[3].argmin()]:g} with {lowest:.2f}" in text
    )
    assert f"Static loss (A = 1), validation loss: {values[0, 0].mean():.2f} ± " in text


def test_a_loss_that_is_lower_only_because_the_static_one_overfits_is_not_lower_where_both_are_stopped_early():
    dataset = diagram()
    wobble = np.array([0.01, -0.01] * 3)
    early, end = (dataset.loss.values[..., 1, k] for k in (0, 1))
    early[:1], end[:1] = 0.3 + wobble, 0.9 + wobble
    early[1:], end[1:] = 0.3 - wobble, 0.4 - wobble
    dataset.accuracy.values[1:, ..., 1, 0] = dataset.accuracy.values[:1, ..., 1, :].max(-1) + 0.1 + wobble
    text = "\n".join(markdown(dataset))
    assert "it is significantly lower with the dynamical loss in 9, significantly higher in 0, undecided in 0." in text
    assert (
        "- Stopped early: every member at its best validation accuracy, that is significantly better in 9 of 9 cells, "
        "worse in 0, undecided in 0; every member at its lowest validation loss, that is lower in 0, higher in 0, "
        "undecided in 9."
    ) in text


def test_members_that_collapsed_are_counted_in_tables_but_stay_in_means():
    dataset = diagram()
    dataset.accuracy[2, 1, :2, 1, -1] = 0.1
    cell = statistics(dataset).sel(split="validation").isel(amplitude=1, period=1)
    assert cell.collapsed == 2 and cell.n == 6 and statistics(dataset).static_collapsed.values.max() == 0
    text = "\n".join(markdown(dataset))
    assert text.count(" †2") == 3  # train and validation accuracy, validation loss
    assert "†n: n seeds collapsed" in text


def test_the_report_has_the_numbers():
    dataset = diagram()
    text, values = "\n".join(markdown(dataset)), final(dataset)
    mean, std = 100 * values.mean(-1), 100 * values.std(-1, ddof=1)
    assert f"Static loss (A = 1), validation: {mean[0, 0]:.1f} ± {std[0, 0]:.1f}." in text
    assert all(f"{mean[index]:.1f} ± {std[index]:.1f}" in text for index in np.ndindex(mean.shape))
    a, p = np.unravel_index(mean[1:].argmax(), (3, 3))
    name = f"A = {dataset.amplitude.values[a + 1]:g}, T = {dataset.period.values[p]:g}"
    test = stats.ttest_rel(values[a + 1, p], values[0, 0]).confidence_interval(0.95)
    assert f"{name} with {mean[a + 1, p]:.1f}" in text
    assert f"+{mean[a + 1, p] - mean[0, 0]:.1f} [95 % CI {100 * test.low:.1f} to {100 * test.high:.1f}] points" in text
    assert "Choosing the best of 9 cells" in text and "from width" not in text


def test_averages_over_cells_are_per_seed():
    dataset = diagram()
    dataset.diverged_at[1, 0, 0] = 5
    values = final(dataset)
    values[1, 0, 0] = np.nan
    gains = np.nanmean(values[1:] - values[0], axis=(0, 1))
    gain, accuracy = (over_cells(dataset, "validation", what) for what in ("difference", "outcome"))
    np.testing.assert_allclose(list(gain.values.values()), gains)
    np.testing.assert_allclose(list(accuracy.values.values()), np.nanmean(values[1:], axis=(0, 1)))
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert (gain.low, gain.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


@pytest.mark.parametrize("shrinks", [True, False])
def test_widths_are_compared(shrinks):
    dataset = by_width(shrinks=shrinks)
    along, groups = series(dataset)
    assert along == "width" and [part.width.item() for part in groups[""]] == [10, 100, 1000]
    lines = markdown(dataset)
    members = dataset.accuracy.isel(init=0, learning_rate=0, evaluation_step=-1).sel(split="validation")
    values = members.transpose("width", "amplitude", "period", "seed").values.astype(float)
    gains = (values[:, 1:] - values[:, :1]).mean((1, 2))
    test = stats.ttest_rel(gains[2], gains[0]).confidence_interval(0.95)
    change = f"[95 % CI {100 * test.low:.1f} to {100 * test.high:.1f}] points (6 seeds, paired)".replace("-", "−")
    assert lines[-1].startswith("- From width 10 to 1000 the mean gain changes by ") and change in lines[-1]
    assert lines[-1].endswith(f"it {'shrinks' if shrinks else 'grows'}.")
    table = [line for line in lines if line.startswith(("| width 10 |", "| width 100 |", "| width 1000 |"))]
    for line, static, gain in zip(table, values[:, 0, 0], gains, strict=True):
        assert f"| {100 * static.mean():.1f} ± {100 * static.std(ddof=1):.1f} |" in line
        assert f"| {100 * gain.mean():+.1f} [95 % CI ".replace("-", "−") in line


def test_other_settings_keep_widths_apart():
    along, groups = series(by_width(rates=(0.1, 1.0)))
    assert along == "width" and list(groups) == ["learning rate 0.1", "learning rate 1"]
    lines = markdown(by_width(rates=(0.1, 1.0)))
    assert [line.split(":")[0] for line in lines[-2:]] == ["- learning rate 0.1", "- learning rate 1"]


def test_with_one_width_learning_rates_are_compared():
    dataset = by_width(rates=(1.0, 0.1)).isel(width=[0])
    along, groups = series(dataset)
    assert along == "learning_rate" and [part.learning_rate.item() for part in groups[""]] == [0.1, 1]
    assert "no change is established" in markdown(dataset)[-1]  # the same numbers
    assert series(dataset.isel(learning_rate=[0])) == ("", {})


def test_an_interrupted_run_without_results_is_reported():
    dataset = diagram(finished="false")
    dataset["accuracy"] = dataset.accuracy * np.nan
    text = "\n".join(markdown(dataset))
    assert "undecided in 9" in text and "No member is left" in text and "nan" not in text


def test_without_a_dynamical_loss_there_is_no_report():
    assert markdown(diagram(amplitudes=(1,))) == []


def test_the_loss_is_named_unless_it_is_cross_entropy():
    assert loss_function(diagram()) == loss_function(diagram(loss_function="cross-entropy")) == ""
    assert "squared-unit" in markdown(diagram(loss_function="squared-unit"))[0]
