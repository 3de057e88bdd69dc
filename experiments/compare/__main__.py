"""Several runs in one table and one figure: `python -m experiments.compare results/cifar-A results/cifar-B`."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from ..results import files
from ..running.devices import require_packages
from ..running.directory import new_directory, refuse_used
from ..running.errors import UsageError
from ..running.terminal import console, execute, warn


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare runs of the experiments: tables and a figure of the accuracies and losses of all their loss functions.

    Says first what differs between the runs, by their settings, versions and devices, and warns of different data sets,
    of interrupted runs and of diverged members. Differences are paired by seed: within a run those of a dynamical loss
    from the static one, and between runs those from the first run, the reference, where data set, setting, A and T are
    the same (of runs that have no seeds in common, Welch's interval is given). Intervals are 95 % confidence intervals.
    Writes comparison.md, comparison.json, comparison.png and, if all runs were evaluated more than once, curves.png.
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
    refuse_used(config.out)
    require_packages()
    from . import figures
    from .comparison import METRICS, compare
    from .reading import load
    from .tables import console_table, count, differing_table, write

    comparison = compare(load(config.runs))
    runs = comparison.runs
    stand_in = next((d for run in runs if (d := run.dataset.attrs["dataset"]) in files.STAND_INS), "")
    directory = new_directory(config.out, "compare", stand_in, dataclasses.asdict(config))
    path = lambda name: directory / files.file_name(stand_in, name)

    console.print(f"{count(len(runs), 'run')}, {count(len(comparison.rows), 'row')} | {comparison.data}")
    for number, run in enumerate(runs if len(runs) > 1 else [], start=1):
        console.print(f"run {number}: {run.name}, {run.data}" + (", the reference" if number == 1 else ""))
    for notice in comparison.notices:
        warn(notice)
    if comparison.differing:
        console.print(differing_table(comparison))
    elif len(runs) > 1:
        console.print("The runs differ in nothing that was recorded.")
    for metric in METRICS:
        console.print(console_table(comparison, metric))
    try:
        write(comparison, directory, stand_in)
        figures.draw_outcomes(comparison, path("comparison.png"))
        without = [run.name for run in runs if run.evaluations < 2]
        if without:
            console.print(f"No curves.png: the validation set was not evaluated twice in {', '.join(without)}.")
        else:
            figures.draw_curves(comparison, path("curves.png"))
    except OSError as error:
        raise UsageError(f"cannot write to {directory} ({error.strerror}): make room or pass --out.") from error
    console.print(f"Tables and figures: {directory}")
    return True


if __name__ == "__main__":
    execute(main)
