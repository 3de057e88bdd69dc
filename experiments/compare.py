"""Several runs in one table and one figure: `python -m experiments.compare results/cifar-A results/cifar-B`."""

import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import _directory, _results, _run, _summary
from ._comparison import Comparison, Row, Run, compare, console_table, count, differing_table, select, write
from ._plots import STATIC, STYLES, grid
from ._run import UsageError, console

MOST_DRAWN = 40  # rows of the figure
MOST_CURVES = 8
_DASHES = ("solid", *(dashes for _, dashes, _ in STYLES), (0, (12, 2, 3, 2)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare runs of the experiments: one table and one figure of the accuracies of all their losses.

    Says first what differs between the runs, by their settings, versions and devices, and warns of different data sets,
    of interrupted runs and of diverged members. Within a run, the difference of a dynamical loss from the static one is
    paired by seed. Between runs, the difference from the first run, the reference, is that of two independent samples,
    given where data set, setting, A and T are the same. Intervals are 95 % confidence intervals. Writes comparison.md,
    comparison.json, comparison.png and, if all runs were evaluated more than once, curves.png.
    """

    runs: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
    ]
    """Directories that runs of an experiment have left, or results files (results.nc) of such runs. The first one is
    the reference."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: results/compare-TIME)")] = (
        None
    )
    """A new or empty directory for the comparison."""


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns True: there is nothing to interrupt."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.compare", description=Config.__doc__)
    _directory.refuse_used(config.out)
    comparison = compare(load(config.runs))
    runs = comparison.runs
    stand_in = next((d for run in runs if (d := run.dataset.attrs["dataset"]) in _results.STAND_INS), "")
    directory = _directory.new_directory(config.out, "compare", stand_in, dataclasses.asdict(config))
    path = lambda name: directory / _results.file_name(stand_in, name)

    console.print(f"{count(len(runs), 'run')}, {count(len(comparison.rows), 'row')} | {comparison.data}")
    for number, run in enumerate(runs if len(runs) > 1 else [], start=1):
        console.print(f"run {number}: {run.name}, {run.data}" + (", the reference" if number == 1 else ""))
    for notice in comparison.notices:
        console.print(notice, style="bold red")
    if comparison.differing:
        console.print(differing_table(comparison))
    elif len(runs) > 1:
        console.print("The runs differ in nothing that was recorded.")
    console.print(console_table(comparison))
    try:
        write(comparison, directory, stand_in)
        draw_outcomes(comparison, path("comparison.png"))
        without = [run.name for run in runs if run.evaluations < 2]
        if without:
            console.print(f"No curves.png: the validation set was not evaluated twice in {', '.join(without)}.")
        else:
            draw_curves(comparison, path("curves.png"))
    except OSError as error:
        raise UsageError(f"cannot write to {directory} ({error.strerror}): make room or pass --out.") from error
    console.print(f"Tables and figures: {directory}")
    return True


# Reading


def load(paths: Sequence[Path]) -> list[Run]:
    """Reads runs, given by their directories or results files. Raises a `UsageError` for what is not a run."""
    if not paths:
        raise UsageError("pass at least one RUN, a directory that an experiment has left.")
    files = [find(path) for path in paths]
    for i, file in enumerate(files):
        if file.resolve() in (other.resolve() for other in files[:i]):
            raise UsageError(f"{paths[i]} is given twice: pass every run once.")
    runs = []
    for name, file in zip(labels(files), files, strict=True):
        dataset, summary = read(file)
        runs.append(Run.of(name, file, dataset, summary, read_config(file, dataset.attrs["dataset"])))
    return runs


def find(path: Path) -> Path:
    """The results file of a run."""
    if path.is_dir():
        found = [file for name in ("", *_results.STAND_INS) if (file := path / _file(name)).is_file()]
        if len(found) > 1:
            raise UsageError(f"{path} holds {' and '.join(file.name for file in found)}: pass one of these files.")
        if not found:
            raise UsageError(f"there is no {_file('')} in {path}: pass the directory of a run that has ended.")
        return found[0]
    if not path.exists():
        raise UsageError(f"{path} does not exist: pass the directory of a run, or its {_file('')}.")
    return path


def _file(dataset: str) -> str:
    return _results.file_name(dataset, "results.nc")


def read(file: Path) -> tuple[xr.Dataset, _summary.Summary]:
    """The dataset of a results file, and its summary."""
    try:
        dataset = _results.load(file)
        return dataset, _summary.summarise(dataset)
    except PermissionError as error:
        raise UsageError(f"cannot read {file} ({error.strerror}).") from error
    except (OSError, ValueError, KeyError, AttributeError, IndexError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"{file} is not the results of an experiment, or is damaged ({type(error).__name__}): pass the directory "
            "of a run."
        ) from error


def read_config(file: Path, dataset: str) -> dict[str, Any] | None:
    """The `config.json` next to a results file, None if it is not there or cannot be read."""
    if file.name != _file(dataset):
        return None
    try:
        text = file.with_name(_results.file_name(dataset, "config.json")).read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=str)  # NaN and infinity are words
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def labels(files: Sequence[Path]) -> list[str]:
    """The shortest names that tell runs apart: of their directories, with as many parents as it takes.

    The name of the file is part of it where it is not the usual one, or where two lie in one directory.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    folders = [path.parent for path in paths]
    usual = {_file(name) for name in ("", *_results.STAND_INS)}
    short = [path.name in usual and folders.count(path.parent) == 1 for path in paths]
    named = [path.parent.parts if only else path.parts for path, only in zip(paths, short, strict=True)]
    result = []
    for i, parts in enumerate(named):
        others = named[:i] + named[i + 1 :]
        lengths = range(1, len(parts) + 1)
        length = next((n for n in lengths if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        result.append(str(Path(*parts[-length:])))
    return result


# Drawing


def draw_outcomes(comparison: Comparison, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of the accuracies at the last evaluation: a small mark for each seed of every condition of every
    run, and below, mean and 95 % confidence interval. At most 40 conditions are drawn. The figure is returned too."""
    rows = select(comparison, MOST_DRAWN)
    styles = _styles(rows)
    ticks: dict[float, str] = {}
    positions, headings, borders, y = [], [], [], 0.0  # y in units of a row, downwards
    for i, row in enumerate(rows):
        if i == 0 or row.run is not rows[i - 1].run:
            heading = _heading(row.run, comparison)
            borders += [y - 0.35] if i else []
            headings.append(len(ticks))
            ticks[y + 0.3 * (len(heading) - 1)] = "\n".join(heading)
            y += 0.6 * len(heading) + 0.2
        ticks[y] = row.name
        positions.append(y)
        y += 1
    figure = Figure(figsize=(11, 2.2 + 0.34 * y), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, split in zip(panels, ("validation", "train"), strict=True):
        for row, at in zip(rows, positions, strict=True):
            axes.axhline(at, color="0.9", linewidth=0.8, zorder=0)
            _draw_row(axes, row, split, at, styles[row.loss])
        for border in borders:
            axes.axhline(border, color="0.4", linewidth=0.8)
        axes.set_xlabel(f"{split} accuracy (%)")
        axes.margins(x=0.06)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -2), min(high, 102))  # the interval of two seeds can go far beyond any accuracy
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(list(ticks), list(ticks.values()))
    panels[0].set_ylim(y - 0.4, -0.5)
    for i in headings:
        panels[0].get_yticklabels()[i].set_fontweight("bold")
    figure.supxlabel("small marks: single seeds; large mark and bar: mean, its 95 % confidence interval", fontsize=10)
    note = f"{len(rows)} of {len(comparison.rows)} rows shown" if len(rows) < len(comparison.rows) else ""
    return _finish(figure, "Accuracy at the last evaluation", comparison, note, path)


def _draw_row(axes: Axes, row: Row, split: str, y: float, style: tuple[str, str]) -> None:
    colour, marker = style
    estimate = row.accuracy(split)
    if estimate is None or estimate.mean is None:
        text = "diverged for every seed" if len(row.condition.diverged) == row.condition.seeds else "not evaluated"
        axes.text(0.5, y, text, transform=axes.get_yaxis_transform(), ha="center", va="center", fontsize=8)
        return
    seeds = 100 * np.array(list(estimate.values.values()))
    axes.plot(seeds, np.full(len(seeds), y - 0.18), marker, color=colour, alpha=0.5, markersize=4, markeredgewidth=0)
    axes.plot(100 * estimate.mean, y + 0.18, marker, color=colour, markersize=8, markeredgecolor="white")
    if estimate.low is not None and estimate.high is not None:
        interval = [100 * estimate.low, 100 * estimate.high]
        axes.plot(interval, [y + 0.18] * 2, "|-", color=colour, linewidth=1.6, zorder=1)


def draw_curves(comparison: Comparison, path: str | os.PathLike[str]) -> Figure:
    """Writes a PNG of validation accuracy against updates, mean over seeds with a band of ± std. Colour and marker tell
    the losses apart, dashes the runs. At most eight curves are drawn. The figure is returned too."""
    rows = select(comparison, MOST_CURVES, least=2)  # the static loss alone would be of no use
    styles, groups = _styles(rows), list(dict.fromkeys((row.run.name, row.condition.setting) for row in rows))
    figure = Figure(figsize=(9, 5.6 + 0.25 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        estimate = row.accuracy("validation")
        survivors = list(estimate.values) if estimate else []
        accuracy = 100 * row.members.accuracy.sel(split="validation", seed=survivors)
        accuracy = accuracy.dropna("evaluation_step", how="all")
        x, mean = accuracy.evaluation_step.values, accuracy.mean("seed").values
        colour, marker = styles[row.loss]
        every = max(1, len(x) // 10)
        look: dict[str, Any] = {
            "marker": marker,
            "markersize": 5,
            "markevery": (every * i // len(rows), every),
            "linestyle": _DASHES[groups.index((row.run.name, row.condition.setting))],
        }
        label = f"{row.run.name}: {row.name}"
        if not survivors:
            label += ", nothing to draw"
        elif len(survivors) == 1:
            label += f": {mean[-1]:.1f} %"
        else:
            std = accuracy.std("seed", ddof=1).values
            axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
            label += f": {mean[-1]:.1f} ± {std[-1]:.1f} %"
        label = "\n".join(textwrap.wrap(_text(label), 95))
        axes.plot(x, mean, color=colour, label=label, **look)
    axes.set_xlabel("optimiser updates")
    axes.set_ylabel("validation accuracy (%)")
    grid(axes)
    title = "last validation accuracy, mean ± std over seeds (bands: ± std)"
    figure.legend(loc="outside lower center", handlelength=4.5, title=title)
    note = f"{len(rows)} of {len(comparison.rows)} curves shown" if len(rows) < len(comparison.rows) else ""
    return _finish(figure, "Learning curves", comparison, note, path)


def _styles(rows: Sequence[Row]) -> dict[tuple[float, float | None], tuple[str, str]]:
    """Colour and marker of every loss, the same in all runs; up to 36 dynamical losses differ."""
    dynamical = dict.fromkeys(row.loss for row in rows if row.condition.period is not None)
    n = len(STYLES)
    styles = {loss: (STYLES[i % n][0], STYLES[(i + i // n) % n][2]) for i, loss in enumerate(dynamical)}
    return styles | {(1.0, None): (STATIC[0], STATIC[2])}


def _heading(run: Run, comparison: Comparison) -> list[str]:
    """The lines above the conditions of a run."""
    parts = [run.name, *[run.data] * comparison.mixed, *["INTERRUPTED"] * (not run.summary.finished)]
    return [_text(line) for part in parts for line in textwrap.wrap(part, 40)]


def _text(name: str) -> str:
    """A name that matplotlib prints as it is: dollars would be mathematics, a first underscore not in the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _finish(figure: Figure, title: str, comparison: Comparison, note: str, path: str | os.PathLike[str]) -> Figure:
    """Adds the title, which names the data sets and the interrupted runs, and writes the PNG."""
    lines = [f"{title}: {comparison.data}"]
    lines += ["DIFFERENT DATA SETS: do not compare them"] if comparison.mixed else []
    interrupted = [run.name for run in comparison.runs if not run.summary.finished]
    lines += [f"INTERRUPTED: {', '.join(interrupted)}"] if interrupted else []
    lines += [note] if note else []
    width = int(8.5 * figure.get_figwidth())  # characters
    wrapped = [part for line in lines for part in textwrap.wrap(_text(line), width)]
    figure.suptitle("\n".join(wrapped), fontsize=13, fontweight="bold")
    figure.savefig(path, format="png", metadata={"Title": "; ".join(lines)})
    return figure


if __name__ == "__main__":
    _run.run(main)
