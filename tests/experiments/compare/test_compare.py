"""The command that compares runs, on results that were made without training anything."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from PIL import Image
from scipy import stats

from experiments.compare import __main__ as compare
from experiments.compare import comparison, figures, reading, tables
from experiments.compare.comparison import Comparison, Run, select
from experiments.compare.difference import Difference
from experiments.compare.tables import MOST_ROWS, write
from experiments.results import files
from experiments.results.estimate import Estimate
from experiments.results.summary import summarise
from experiments.running.errors import UsageError
from experiments.running.flags import parse
from experiments.running.terminal import execute
from experiments.spiral.__main__ import Config

from ..synthetic import results

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGITS = tuple("0123456789")


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """The runs lie in the working directory, and `results/` is made there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> bytes:
    """A results file."""
    files.save(results(), path := tmp_path_factory.mktemp("stored") / "results.nc")
    return path.read_bytes()


def put(path: str, dataset: xr.Dataset | bytes, **config: object) -> Path:
    """Leaves a directory as a run does."""
    directory = Path(path)
    directory.mkdir(parents=True)
    data = "cifar10" if isinstance(dataset, bytes) else dataset.attrs["dataset"]
    file, settings = (directory / files.file_name(data, name) for name in ("results.nc", "config.json"))
    file.write_bytes(dataset) if isinstance(dataset, bytes) else files.save(dataset, file)
    settings.write_text(json.dumps({"run": {"out": path}, "width": 16} | config))
    return directory


def compared(datasets: dict[str, xr.Dataset]) -> Comparison:
    """Compares runs of which there are no files."""
    return comparison.compare([Run.of(name, Path(name), data, summarise(data), {}) for name, data in datasets.items()])


def with_settings(**options: Any) -> xr.Dataset:
    """A dataset as the spiral has it, with two widths."""
    parts = [results(dataset="spiral", **options).assign_coords(width=width) for width in (30, 100)]
    return xr.concat(parts, "width", combine_attrs="override")


def command(*arguments: object) -> int:
    """Runs the command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        execute(lambda: compare.main([str(argument) for argument in arguments]))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def document(directory: Path | str = "out", prefix: str = "") -> dict:
    return json.loads(Path(directory, f"{prefix}comparison.json").read_text(encoding="utf-8"))


def title(path: Path | str) -> str:
    """Checks that the file is an image with something drawn on it, and returns the title stored in it."""
    with Image.open(path) as image:
        assert image.format == "PNG" and len(np.unique(np.asarray(image.convert("L")))) > 10
        return str(image.info["Title"])


def looks(axes: Any) -> list[tuple[object, ...]]:
    """Colour, marker and dashes of all lines."""
    return [(to_hex(line.get_color()), line.get_marker(), str(line._unscaled_dash_pattern)) for line in axes.lines]


# Numbers


@pytest.mark.parametrize("shared", [5, 1, 0])
def test_rows_and_differences_against_scipy(shared, capsys):
    """The second run has eight seeds, of which the first one has so many of its five, too."""
    rng = np.random.default_rng(1)
    first, second = results(seeds=5), results(seeds=8, amplitudes=(1, 10, 30), diverged={9: 50})
    second = second.assign_coords(seed=np.arange(8) + 5 - shared)
    for metric in ("accuracy", "loss"):
        second[metric] = second[metric] - 0.03 + rng.normal(0, 0.02, second.accuracy.shape)
    assert command(put("a", first), put("b", second), "--out", "out") == 0
    rows: list[dict[str, Any]] = document()["rows"]
    assert [(r["run"], r["amplitude"], r["period"]) for r in rows] == [
        ("a", 1, None), ("a", 10, 50), ("b", 1, None), ("b", 10, 50), ("b", 30, 50)
    ]  # fmt: skip
    data = {"a": first, "b": second}
    for row, split, metric in itertools.product(rows, ("train", "validation"), ("accuracy", "loss")):
        final = {name: of[metric].sel(split=split).isel(period=0, evaluation_step=-1) for name, of in data.items()}
        members, static = (final[row["run"]].sel(amplitude=A).to_series() for A in (row["amplitude"], 1))
        outcome, used = row["outcomes"][split][metric], members.dropna()
        assert (outcome["n"], row["diverged"]) == (len(used), members.index.difference(used.index).tolist())
        assert (outcome["mean"], outcome["std"]) == pytest.approx((used.mean(), used.std()))
        if row["amplitude"] > 1:
            assert_interval(row["differences"][split][metric], stats.ttest_1samp((used - static).dropna(), 0))
        if row["run"] == "a" or row["amplitude"] == 30:
            assert row["versus_reference"] == {}
            continue
        versus, reference = row["versus_reference"][split][metric], final["a"].sel(amplitude=row["amplitude"])
        pairs = (used - reference.to_series()).dropna()
        if shared > 1:
            assert versus["paired"] and versus["seeds"] == versus["reference_seeds"] == len(pairs) == 5 - (
                len(used) < 8
            )
            assert_interval(versus, stats.ttest_1samp(pairs, 0))
        else:
            assert not versus["paired"] and (versus["seeds"], versus["reference_seeds"]) == (len(used), 5)
            assert_interval(versus, stats.ttest_ind(used, reference, equal_var=False))

    text = Path("out/comparison.md").read_text(encoding="utf-8")
    printed = " ".join(capsys.readouterr().out.split())
    for output, (metric, scale, digits) in itertools.product((text, printed), (("accuracy", 100, 2), ("loss", 1, 3))):
        versus = rows[2]["versus_reference"]["validation"][metric]
        mean, low = (f"{number:+.{digits}f}".replace("-", "−").replace("+", plus)
                     for number, plus in ((scale * versus["mean"], "+"), (scale * versus["low"], "")))  # fmt: skip
        assert f"{mean} [{low}" in output
        outcome = rows[4]["outcomes"]["validation"][metric]
        assert f"{scale * outcome['mean']:.{digits}f} ± {scale * outcome['std']:.{digits}f}" in output
        assert "7/8" in output and "DIVERGED" in output and f"T = 50 (1.25 ep): seed {6 - shared}" in output
    assert ("Welch" in text) == (shared < 2) and text.count("] (Welch)") == 8 * (shared < 2)
    assert text.count("] (5 pairs)") + text.count("] (4 pairs)") == 8 * (shared > 1)


def assert_interval(found: dict[str, Any], test: Any) -> None:
    """Against the result of a test of SciPy's, whose interval has the mean of the difference in the middle."""
    interval = test.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((float(interval.low), float(interval.high)), abs=1e-9)
    assert found["mean"] == pytest.approx(float(interval.low + interval.high) / 2, abs=1e-9)


@pytest.mark.parametrize("sample, other, interval", [
    ([0.5], [0.4, 0.6], False), ([0.5, 0.7], [0.4], False), ([1.0, 1.0, 1.0], [0.5, 0.5], False),
    ([1.0, 1.0, 1.0], [0.5, 0.7], True),
])  # fmt: skip
@pytest.mark.parametrize("paired", [True, False])
def test_without_spread_or_a_second_seed_there_is_no_interval_between_runs(sample, other, interval, paired):
    seeds = range(0 if paired else 10, 20)
    reference = dict(zip(seeds, other, strict=False))
    difference = Difference.between(Estimate.of(dict(enumerate(sample))), Estimate.of(reference))
    shared = (
        [value for value, _ in zip(sample, other, strict=False)]
        if paired and min(len(sample), len(other)) > 1
        else sample
    )
    assert difference is not None and difference.mean == pytest.approx(np.mean(shared) - np.mean(other))
    assert (difference.low is not None) == (difference.high is not None) == interval


def test_nothing_is_compared_with_nothing():
    assert Difference.between(Estimate.of({}), Estimate.of({0: 1.0, 1: 2.0})) is None


def test_losses_of_two_loss_functions_are_not_compared():
    runs = compared({"a": results(), "b": results(loss_function="squared-unit")})
    assert [set(row.versus["validation"]) for row in runs.rows[2:]] == [{"accuracy"}] * 2
    assert runs.loss_unit == "" and compared({"a": results()}).loss_unit == "nats"


def test_only_what_is_comparable_is_compared():
    runs = compared({
        "a": with_settings(seeds=2),
        "b": with_settings(seeds=3),
        "other": results(dataset="digits", classes=DIGITS),
        "half": with_settings(finished=False),
        "without settings": results(dataset="spiral"),
    })  # fmt: skip
    assert {(row.run.name, row.condition.name) for row in runs.rows if row.versus} == {
        ("b", f"width {width}, {loss}") for width in (30, 100) for loss in ("static", "A = 10, T = 50 (1.25 ep)")
    }
    assert "DIFFERENT DATA SETS" in runs.notices[0] and "other on scikit-learn digits" in runs.notices[0]
    assert any(notice.startswith("half: INTERRUPTED") for notice in runs.notices)


@pytest.mark.parametrize("reference, other, compared_with", [
    ({}, {"oscillation": ["triangle", "cosine"]}, ["triangle"]),
    ({"oscillation": ["triangle", "cosine"]}, {}, ["triangle"]),
    ({}, {"oscillation": "learning-rate"}, ["learning-rate"]),  # in which whole runs differ, is what is compared
    ({"oscillation": "cosine"}, {"oscillation": ["triangle", "cosine"]}, ["cosine"]),
    ({"width": 30}, {"width": 100}, ["triangle"]),
    ({"width": 30}, {"width": [100, 300]}, []),
])  # fmt: skip
def test_settings_that_one_of_the_runs_varies_have_to_be_the_same(reference, other, compared_with):
    def run(**settings):
        data = results(dataset="spiral")
        for name, values in settings.items():
            data = data.expand_dims({name: values}) if isinstance(values, list) else data.assign_coords({name: values})
        return data

    rows = compared({"a": run(**reference), "b": run(**other)}).rows
    assert [row.settings["oscillation"] for row in rows if row.versus and row.condition.period] == compared_with


# What differs


def test_only_the_settings_that_differ_are_listed(capsys):
    a = put("a", results(jax="1", device="2 x cpu", git_commit=COMMIT), learning_rate=0.1, amplitude=[1.0, 10.0])
    other: dict[str, Any] = {"jax": "1", "device": "1 x H100", "git_commit": f"{COMMIT}+dirty", "command": "python x"}
    b = put("b", results(**other), amplitude=[10.0], width=16.0)
    assert command(a, b, "--out", "out") == 0
    assert document()["differing"] == {
        "learning_rate": {"a": 0.1, "b": None},
        "amplitude": {"a": [1.0, 10.0], "b": [10.0]},
        "device": {"a": "2 x cpu", "b": "1 x H100"},
        "git_commit": {"a": COMMIT, "b": f"{COMMIT}+dirty"},
    }
    text, printed = Path("out/comparison.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert "| amplitude | 1.0 10.0 | 10.0 |" in text and "| git_commit | 0123456789 | 0123456789+dirty |" in text
    assert "uncommitted" in text and "`python x`" in text
    assert (
        printed.index("run 1: a, CIFAR-10, the reference")
        < printed.index("What differs")
        < printed.index("Accurac")
        < printed.index("Loss at")
    )


@pytest.mark.parametrize("content, width", [(None, None), ("{", None), ("[1]", None), ('{"width": NaN}', "NaN")])
def test_a_config_that_cannot_be_read_is_no_error_and_said(content, width, stored):
    a, b = put("a", stored), put("b", stored)
    (b / "config.json").write_text(content) if content else (b / "config.json").unlink()
    runs = comparison.compare(reading.load([a, b]))
    assert runs.differing == {"width": [16, width]}
    assert any("No readable config.json was found for b" in note for note in runs.notes) == (width is None)


def test_the_config_of_another_file_is_not_read(stored):
    a = put("a", stored)
    (a / "results.nc").rename(a / "mine.nc")
    assert reading.read_config(a / "results.nc", "cifar10") == {"run": {"out": "a"}, "width": 16}
    assert reading.read_config(a / "mine.nc", "cifar10") is None
    assert reading.read_config(a / "results.nc", "digits") is None


def test_equal_runs_differ_in_nothing():
    assert compared({"a": results(), "b": results()}).differing == {}


# Names, places, wrong use


@pytest.mark.parametrize("paths, names", [
    (["x/results.nc"], ["x"]),
    (["a/x/results.nc", "b/x/results.nc", "b/y/results.nc"], ["a/x", "b/x", "y"]),
    (["a/x/results.nc", "b/x/digits_results.nc"], ["a/x", "b/x"]),
    (["x/results.nc", "x/digits_results.nc"], ["results.nc", "digits_results.nc"]),
    (["x/results.nc", "x/mine.nc"], ["results.nc", "mine.nc"]),
    (["x/mine.nc", "y/mine.nc"], ["x/mine.nc", "y/mine.nc"]),
    (["x/results.nc", "y/x/results.nc"], ["{cwd}/x", "y/x"]),
])  # fmt: skip
def test_names_are_the_shortest_that_tell_runs_apart(tmp_path, paths, names):
    assert reading.labels([Path(path) for path in paths]) == [name.format(cwd=tmp_path.name) for name in names]


def test_one_run_goes_to_a_new_directory(monkeypatch, stored):
    monkeypatch.chdir(put("run", stored))  # whose name is not in the path then
    assert command(".") == 0
    (out,) = Path("results").glob("compare-*")
    files = {"config.json", "comparison.md", "comparison.json", "comparison.png", "curves.png"}
    assert {path.name for path in out.iterdir()} == files
    assert document(out)["reference"] == "run"
    text = (out / "comparison.md").read_text(encoding="utf-8")
    assert "Comparison of 1 run:" in text and "reference" not in text and "What differs" not in text
    assert json.loads((out / "config.json").read_text()) == {"runs": ["."], "out": None}


def test_a_stand_in_is_in_every_name_and_title(stored):
    assert command(put("a", results(dataset="digits", classes=DIGITS)), put("b", stored), "--out", "out") == 0
    assert all(path.name.startswith("digits_") for path in Path("out").iterdir())
    for name in ("comparison", "curves"):
        assert "scikit-learn digits (stand-in, not CIFAR-10)" in title(f"out/digits_{name}.png")
        assert "DIFFERENT DATA SETS" in title(f"out/digits_{name}.png")


def damaged(kind: str, stored: bytes) -> Path:
    path = Path("bad.nc")
    if kind == "text":
        path.write_text("accuracy: 100 %")
    elif kind == "empty":
        path.touch()
    elif kind == "foreign":
        xr.Dataset({"tas": ("time", [1.0])}).to_netcdf(path, engine="h5netcdf")
    elif kind == "without a data set":
        dataset = results()
        del dataset.attrs["dataset"]
        files.save(dataset, path)
    elif kind == "without the static loss":
        files.save(results().isel(amplitude=[1]), path)
    else:
        path.write_bytes(stored[: int(float(kind) * len(stored))])
    return path


@pytest.mark.parametrize(
    "kind", ["text", "empty", "foreign", "without a data set", "without the static loss", "0.1", "0.5", "0.99"]
)
def test_a_file_that_is_no_results_file_is_one_sentence(kind, stored, capsys):
    assert command(damaged(kind, stored), "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: bad.nc is not the results of an experiment") and error.count("\n") == 0
    assert not Path("out").exists()


@pytest.mark.parametrize("runs, message", [
    ([], "at least one RUN"),
    (["missing"], "missing does not exist"),
    (["empty"], "no results.nc in empty"),
    (["a", "a"], "a is given twice"),
    (["a", "a/results.nc"], "a/results.nc is given twice"),
    (["a", "link"], "link is given twice"),
    (["both"], "both holds results.nc and digits_results.nc"),
])  # fmt: skip
def test_wrong_use_is_one_sentence(runs, message, stored, capsys):
    put("a", stored)
    put("both", stored)
    Path("both/digits_results.nc").touch()
    Path("empty").mkdir()
    Path("link").symlink_to("a")
    assert command(*runs, "--out", "out") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and error.count("\n") == 0
    assert not Path("out").exists()


def test_a_comparison_is_not_taken_for_a_run_that_was_merged(stored, capsys):
    assert command(put("a", stored), "--out", "out") == 0
    with pytest.raises(UsageError, match="not the configuration of a run of this command"):
        parse(Config, ["--resume", "out"], "spiral")


def test_nothing_is_overwritten(stored, capsys):
    run = put("a", stored)
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert command(run, "--out", run) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir()} == before


def test_a_full_disk_is_one_sentence(stored, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "write", full)
    assert command(put("a", stored), "--out", "out") == 2
    assert "cannot write to out (No space left on device)" in capsys.readouterr().err


# Figures


def test_the_figure_has_a_point_per_seed_and_a_mean_per_condition(tmp_path):
    other = results(seeds=6, amplitudes=(1, 10, 30), diverged={6: 1})
    runs = compared({"a": results(seeds=4), "b": other})
    panels: list[Any] = figures.draw_outcomes(runs, tmp_path / "a.png").axes
    shown = {"validation accuracy (%)": 100, "validation loss (nats)": 1, "train accuracy (%)": 100}
    assert [axes.get_xlabel() for axes in panels] == list(shown)
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    ten, thirty = (f"A = {A}, T = 50 (1.25 ep)" for A in (10, 30))
    assert labels == ["a", "static", ten, "b", "static", f"{ten} (5 of 6 seeds)", thirty]
    for axes, (name, scale) in zip(panels, shown.items(), strict=True):
        split, metric = name.split()[:2]
        bars = [line for line in axes.lines if line.get_marker() == "|"]
        seeds, means = ([m for m in axes.lines if m.get_markersize() == size and m not in bars] for size in (4, 8))
        seen: dict[Any, set[Any]] = {}
        for row, points, mean, bar in zip(runs.rows, seeds, means, bars, strict=True):
            values = scale * np.array(list(row.condition.outcomes[split][metric].values.values()))
            np.testing.assert_allclose(points.get_xdata(), values)
            np.testing.assert_allclose(mean.get_xdata(), values.mean())
            interval = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
            np.testing.assert_allclose(bar.get_xdata(), interval)
            seen.setdefault(row.loss, set()).add((to_hex(mean.get_color()), mean.get_marker()))
        assert [len(look) for look in seen.values()] == [1, 1, 1]  # a loss looks the same in all runs,
        for column in zip(*(look for (look,) in seen.values()), strict=True):  # and losses differ in both
            assert len(set(column)) == 3


def test_curves_are_means_over_the_seeds_that_are_left(tmp_path):
    dataset = results(seeds=4, diverged={5: 1})
    runs = compared({"a": dataset, "_b$1$": results(seeds=1, evaluations=2)})
    figure: Any = figures.draw_curves(runs, tmp_path / "a.png")
    (axes,) = figure.axes
    values = 100 * dataset.accuracy.sel(amplitude=10, split="validation").isel(period=0, seed=[0, 2, 3]).values
    np.testing.assert_allclose(axes.lines[1].get_ydata(), values.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), dataset.evaluation_step)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[1].startswith("a: A = 10, T = 50 (1.25 ep) (3 of 4 seeds): ")
    assert texts[1].endswith(f"{values.mean(0)[-1]:.1f} ± {values.std(0, ddof=1)[-1]:.1f} %")
    assert len(texts) == len(axes.lines) == 4 and len(axes.collections) == 2  # one seed, no band
    assert "static" in texts[2] and "±" not in texts[2] and r"\$" in texts[2]
    (colours, _, dashes) = zip(*looks(axes), strict=True)
    assert colours[0] == colours[2] != colours[1] == colours[3] and dashes[0] == dashes[1] != dashes[2] == dashes[3]


def test_settings_are_in_the_labels(tmp_path):
    runs = compared({"a": with_settings()})
    figure = figures.draw_curves(runs, tmp_path / "a.png")
    assert [text.get_text().rsplit(":", 1)[0] for text in figure.legends[0].get_texts()] == [
        f"a: width {width}, {loss}" for width in (30, 100) for loss in ("static", "A = 10, T = 50 (1.25 ep)")
    ]
    assert len(set(looks(figure.axes[0]))) == 4


def test_a_phase_diagram_is_whole_in_the_files_and_capped_elsewhere(capsys):
    amplitudes, periods = (1, 2, 3, 5, 10, 20, 50), (1, 2, 5, 10, 20, 50, 100)
    phase = results(amplitudes=amplitudes, periods=periods, seeds=2, evaluations=1).drop_dims("step")
    small = put("small", results(amplitudes=(1, 5), periods=(10,)))
    assert command(put("phase", phase), small, "--out", "out") == 0
    assert len(document()["rows"]) == 1 + 6 * 7 + 2
    text, printed = Path("out/comparison.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert text.count("| phase | CIFAR-10") == 2 * 43
    assert (
        sum(line.split()[0] in "12" for line in printed.splitlines() if "/2 " in line or "/3 " in line) == 2 * MOST_ROWS
    )
    assert "15 of 45 rows are left out here" in printed and "No curves.png" in printed and "twice in phase" in printed
    assert title("out/comparison.png").endswith("40 of 45 rows shown")
    assert not Path("out/curves.png").exists()


def test_shared_conditions_come_first_and_the_others_are_evenly_spread():
    periods = tuple(float(T) for T in range(1, 10))
    runs = compared({"a": results(periods=periods), "b": results(periods=(6.0,)), "c": results()})
    names = lambda rows: [(row.run.name, row.condition.period) for row in rows]
    assert names(select(runs, 8)) == [
        ("a", None), ("a", 1), ("a", 6), ("a", 9), ("b", None), ("b", 6), ("c", None), ("c", 50)
    ]  # fmt: skip
    assert names(select(runs, 3)) == [("a", None), ("b", None), ("c", None)]
    assert names(select(runs, 4, least=2)) == [("a", None), ("a", 6), ("b", None), ("b", 6)]
    assert len(select(runs, 100)) == len(runs.rows) == 14


def test_runs_with_little_to_tell_do_not_fail(tmp_path):
    runs = compared({
        "unseen": results(evaluations=0, finished=False),
        "one": results(seeds=1),
        "gone": results(seeds=2, diverged={i: 3 for i in range(4)}),
        "static": results(amplitudes=(1,)),
        "without baseline": results(seeds=2, diverged={0: 3, 1: 3}),
    })  # fmt: skip
    write(runs, tmp_path, "")
    assert [len(row["versus_reference"]) for row in document(tmp_path)["rows"]] == [0] * 9
    figure = figures.draw_outcomes(runs, tmp_path / "a.png")
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said == ["not evaluated"] * 2 + ["diverged for every seed"] * 3
    assert title(tmp_path / "a.png").endswith("CIFAR-10; INTERRUPTED: unseen")
    figures.draw_curves(runs, tmp_path / "b.png")
    assert title(tmp_path / "b.png").endswith("INTERRUPTED: unseen; 7 of 9 curves shown")


def test_more_runs_than_curves(tmp_path):
    runs = compared({f"run {i}": results() for i in range(5)})
    figure = figures.draw_curves(runs, tmp_path / "a.png")
    assert len(figure.axes[0].lines) == 8 and "8 of 10 curves shown" in title(tmp_path / "a.png")
    assert len(set(looks(figure.axes[0]))) == 8
