"""Maps of phase diagrams: the numbers in the cells, the colours and the marks are those of the dataset."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.phase import figures
from experiments.phase.figures import _ink, _short, curvature_map, heat_maps, loss_maps, write
from experiments.phase.statistics import best, over_cells, statistics
from experiments.phase.widths import gain_by_width

from ..cifar.test_figures import title
from .test_statistics import by_width, diagram, final


def panels(figure: Figure) -> list:
    """The panels of a figure of maps, without its colour bars."""
    return [axes for axes in figure.axes if len(axes.images) == 2]


def texts(axes) -> dict[tuple[int, int], str]:
    """The texts of the cells by amplitude and period, which are indices; the static loss is (0, 0)."""
    return {(round(t.get_position()[1]), round(t.get_position()[0]) * (t.get_position()[1] > 0)): t.get_text()
            for t in axes.texts}  # fmt: skip


def dots(axes) -> set[tuple[int, int]]:
    """The amplitudes above 1 and periods that are marked, as indices."""
    return {(round(line.get_ydata()[0]) - 1, round(line.get_xdata()[0])) for line in axes.lines}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A dataset, the figure of its maps, and the title stored in the file."""
    path = tmp_path_factory.mktemp("maps") / "a.png"
    dataset = diagram()
    figure = heat_maps(dataset, path)
    return dataset, figure, title(path)


def test_the_maps_show_the_numbers_of_the_dataset(drawn):
    dataset, figure, name = drawn
    found = panels(figure)
    for row, split in enumerate(("train", "validation")):
        values = final(dataset, split)
        gain = 100 * (values - values[0]).mean(-1)
        numbers = 100 * values.mean(-1), 100 * values.std(-1, ddof=1), gain
        for axes, grid in zip(found[3 * row : 3 * row + 3], numbers, strict=True):
            cells, static = axes.images
            np.testing.assert_allclose(np.asarray(cells.get_array()), grid[1:], rtol=1e-6)
            np.testing.assert_allclose(np.asarray(static.get_array()), grid[:1, :1], rtol=1e-6, atol=1e-9)
            assert axes.get_title().startswith(f"{split}: ")
            sign = "+" if grid is gain else ""
            written = {index: f"{grid[index]:{sign}.1f}".replace("-", "−") for index in np.ndindex(grid.shape)
                       if index[0] or not index[1]}  # fmt: skip
            assert texts(axes) == written | ({(0, 0): "0"} if grid is gain else {})
    assert name.startswith("Accuracy over amplitude and period: the spiral; 6 seeds; dot: ")


def test_axes_colour_bars_and_scales_are_labelled(drawn):
    _, figure, _ = drawn
    found = panels(figure)
    for axes in found:
        assert [t.get_text() for t in axes.get_xticklabels()] == ["50", "500", "5,000"]
        assert [t.get_text() for t in axes.get_yticklabels()] == ["1 (static)", "2", "10", "70"]
        assert axes.get_xlim() == (-0.5, 2.5) and axes.get_ylim() == (-0.5, 3.5)
    assert {axes.get_xlabel() for axes in found[3:]} == {"period T (updates)"}
    assert {axes.get_ylabel() for axes in found[::3]} == {"amplitude A"}
    bars = [axes.get_ylabel() for axes in figure.axes if axes not in found]
    assert sorted(bars) == ["%"] * 2 + ["points"] * 4
    for axes in found[2::3]:
        low, high = axes.images[0].get_clim()
        assert -low == high >= np.abs(np.asarray(axes.images[0].get_array())).max()


def test_significant_cells_have_a_dot(drawn):
    dataset, figure, _ = drawn
    found = panels(figure)
    significant = statistics(dataset).significant
    for axes, split in zip(found[2::3], ("train", "validation"), strict=True):
        assert dots(axes) == {tuple(index) for index in np.argwhere(significant.sel(split=split).values)}
        assert 0 < len(dots(axes)) < 9
    assert not any(dots(axes) for i, axes in enumerate(found) if i % 3 != 2)


def test_texts_can_be_read_on_every_colour(drawn):
    """WCAG 2 asks for a contrast of 4.5."""

    def luminance(rgb):
        rgb = np.asarray(rgb)[:3]
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for axes in panels(drawn[1]):
        for (a, p), text in zip(texts(axes), axes.texts, strict=True):
            image = axes.images[0 if a else 1]
            cell = np.asarray(image.get_array())[a - 1 if a else 0, p]
            behind = luminance(image.cmap(image.norm(cell)))
            ink = 1.0 if text.get_color() == "white" else 0.0
            assert (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05) >= 4.5
    assert _ink(1, 1, 1) == "black" and _ink(0, 0, 0) == "white"


def test_the_maps_of_the_loss_show_its_numbers(tmp_path):
    dataset = diagram()
    mean, std, gain = panels(loss_maps(dataset, tmp_path / "a.png"))
    values = dataset.loss.sel(split="validation").values[..., -1].astype(float)
    for axes, grid in ((mean, values.mean(-1)), (std, values.std(-1, ddof=1)), (gain, (values - values[0]).mean(-1))):
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), grid[1:], rtol=1e-5, atol=1e-7)
    assert texts(mean)[2, 1] == f"{values[2, 1].mean():.2f}" and texts(gain)[3, 2].startswith("−0.")
    significant = statistics(dataset, "loss").sel(split="validation").significant.values
    assert dots(gain) == {(a + 0, p) for a, p in np.argwhere(significant).tolist()} != set()
    assert title(tmp_path / "a.png").startswith("Validation loss over amplitude and period: the spiral; 6 seeds; dot: ")


def test_members_that_collapsed_are_counted_in_the_cell(tmp_path):
    dataset = diagram()
    dataset.accuracy[2, 1, :2, 1, -1] = 0.1  # it was 0.4
    for figure in (heat_maps(dataset, tmp_path / "a.png"), loss_maps(dataset, tmp_path / "b.png")):
        mean = texts(panels(figure)[0])
        assert mean[2, 1].endswith("\n†2") and not any("†" in text for cell, text in mean.items() if cell != (2, 1))
    assert "†n: n seeds collapsed" in title(tmp_path / "a.png") and "†n: n seeds collapsed" in title(tmp_path / "b.png")
    heat_maps(diagram(), tmp_path / "c.png")
    assert "†" not in title(tmp_path / "c.png")


def test_members_that_diverged_are_counted_in_the_cell(tmp_path):
    dataset = diagram()
    dataset.diverged_at[1, 0, :2] = 3
    dataset.diverged_at[2, 2] = 3
    found = panels(heat_maps(dataset, tmp_path / "a.png"))
    for split in (0, 1):
        mean, std, gain = (texts(axes) for axes in found[3 * split : 3 * split + 3])
        assert mean[1, 0].endswith("\n4/6") and "\n" not in mean[1, 1]
        assert mean[2, 2] == std[2, 2] == gain[2, 2] == "–"
    assert title(tmp_path / "a.png").endswith("n/N: n seeds are left, the others diverged or were not reached")
    curves = panels(curvature_map(dataset, tmp_path / "b.png"))
    assert texts(curves[0])[1, 0].endswith("\n4/6") and texts(curves[0])[2, 2] == "–"
    assert title(tmp_path / "b.png").endswith("n/N: n seeds are left, the others diverged or were not reached")


def test_curvature_is_the_median_over_seeds(tmp_path):
    dataset = diagram()
    dataset.hessian_max[1, 1, 0] = np.nan
    found = panels(curvature_map(dataset, tmp_path / "a.png"))
    for axes, name in zip(found, ("hessian_max", "ntk_max"), strict=True):
        medians = np.nanmedian(dataset[name].values[..., 0], axis=-1)
        np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), medians[1:])
        np.testing.assert_allclose(np.asarray(axes.images[1].get_array()), medians[:1, :1])
        assert texts(axes)[3, 2] == _short(medians[3, 2]) and "median over seeds" in axes.get_title()
    assert "observed after 2,000 updates" in title(tmp_path / "a.png")


def test_curvature_that_is_not_positive_is_drawn(tmp_path):
    dataset = diagram()
    dataset["hessian_max"] = -dataset.hessian_max
    (hessian,) = panels(curvature_map(dataset.drop_vars("ntk_max"), tmp_path / "a.png"))
    assert all(text.startswith("−") for text in texts(hessian).values())


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0.00"), (0.00724, "7.2e−3"), (0.1, "0.100"), (-2.345, "−2.35"), (123.4, "123"), (12345, "12,345"),
     (123456, "1.2e5")],
)  # fmt: skip
def test_eigenvalues_fit_a_cell(value, text):
    assert _short(value) == text


def test_accuracies_against_the_width(tmp_path):
    dataset = by_width(rates=(0.1, 1.0))
    figure = gain_by_width(dataset, tmp_path / "a.png")
    rows = np.asarray(figure.axes, object).reshape(2, 2)
    parts = [dataset.isel(init=0, width=i, learning_rate=1) for i in range(3)]
    found = [statistics(part) for part in parts]
    cells = [best(each.sel(split="validation")) for each in found]
    for axes, split in zip(rows[:, 1], ("validation", "train"), strict=True):
        static, mean, top = (np.asarray(c.lines[0].get_ydata(), float) / 100 for c in axes.containers)
        np.testing.assert_allclose(static, [each.static_mean.sel(split=split) for each in found])
        np.testing.assert_allclose(mean, [over_cells(part, split, "outcome").mean or 0 for part in parts])
        at = [each.sel(split=split)["mean"].isel(cell) for each, cell in zip(found, cells, strict=True)]
        np.testing.assert_allclose(top, at)
        assert axes.get_xscale() == "log"
    assert [t.get_text() for t in rows[1, 1].get_xticklabels()] == ["10", "100", "1000"]
    assert [axes.get_title() for axes in rows[0]] == ["learning rate 0.1", "learning rate 1"]
    assert rows[0, 0].get_ylabel() == "validation accuracy (%)" and rows[1, 0].get_ylabel() == "train accuracy (%)"
    assert len(figure.legends[0].get_texts()) == 3


@pytest.mark.parametrize("name, prefix", [("spiral", ""), ("digits", "digits_")])
def test_every_setting_has_its_files(name, prefix, tmp_path, monkeypatch):
    drawn = []
    for function in ("heat_maps", "loss_maps", "curvature_map", "gain_by_width"):
        draw = lambda part, path: drawn.append((part.width.values.tolist(), path))
        monkeypatch.setattr(figures, function, draw)
    written = write(by_width().isel(width=[0, 2]).assign_attrs(dataset=name), tmp_path)
    kinds = ("phase", "validation_loss", "curvature")
    names = [*(f"{kind}-width-{width}" for width in (10, 1000) for kind in kinds), "widths"]
    assert written == [tmp_path / f"{prefix}{name}.png" for name in names]
    assert drawn == list(zip([*[10] * 3, *[1000] * 3, [10, 1000]], written, strict=True))


def test_titles_name_the_setting(tmp_path):
    curvature_map(by_width().isel(init=0, width=2, learning_rate=0), tmp_path / "a.png")
    assert "the spiral (paper init, width 1000, learning rate 1)" in title(tmp_path / "a.png")
    gain_by_width(by_width(), tmp_path / "b.png")
    assert title(tmp_path / "b.png").startswith("Accuracy by width: the spiral (paper init, learning rate 1); 6 seeds")


def test_the_smallest_grid_a_stand_in_and_an_interruption(tmp_path):
    """One cell and one seed: no std, nothing significant; the title says what must not be overlooked."""
    dataset = diagram((1, 10), (50,), 1, dataset="digits", finished="false", loss_function="squared-unit")
    found = panels(heat_maps(dataset, tmp_path / "a.png"))
    assert set(texts(found[1]).values()) == {"–"} and not any(dots(axes) for axes in found)
    name = "Accuracy over amplitude and period, squared-unit loss: scikit-learn digits (stand-in, not CIFAR-10)"
    assert title(tmp_path / "a.png").startswith(f"{name}; INTERRUPTED after 2,000 updates; 1 seed; dot")


def test_a_run_without_results_is_drawn(tmp_path):
    dataset = diagram((1, 10), (50,))
    dataset.accuracy[:] = np.nan
    dataset.hessian_max[:] = np.nan
    assert [path.name for path in write(dataset, tmp_path)] == ["phase.png", "validation_loss.png", "curvature.png"]
    assert title(tmp_path / "phase.png") and title(tmp_path / "curvature.png")


def test_without_observations_or_dynamical_loss_there_are_fewer_files(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "heat_maps", lambda part, path: None)
    monkeypatch.setattr(figures, "loss_maps", lambda part, path: None)
    assert [path.name for path in write(diagram(curvature=False), tmp_path)] == ["phase.png", "validation_loss.png"]
    assert [path.name for path in write(diagram().isel(observation_step=slice(0)), tmp_path)] == [
        "phase.png",
        "validation_loss.png",
    ]
    assert write(diagram(amplitudes=(1,)), tmp_path) == []
