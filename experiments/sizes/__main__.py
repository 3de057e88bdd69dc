"""Networks of many sizes, two learning rates, several loss functions, many seeds: `python -m experiments.sizes`.

Accuracy, gain over the static loss, and depth and sharpness of the minima against the number of parameters: the study
of Lavin Pallero and Ruiz-Garcia, arXiv 2410.10690. Its formulas of the squared errors, sizes and rates are not known.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
import xarray as xr

from ..problems import spiral
from ..problems.spiral import LOSSES, Init, LossName
from ..running.errors import UsageError
from ..running.flags import LEAST, RunFlags, parse_seeds, require, require_different, words
from ..running.session import Session
from ..running.task import Task, announcement
from ..running.terminal import console, execute, warn
from ..running.training import train

PresetName = Literal["quick", "paper"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A value for every flag that is not given. All of them are ours, but the 20 seeds of the paper."""

    seeds: int
    width: tuple[int, ...]
    amplitude: tuple[float, ...]
    period: tuple[float, ...]
    updates: int
    evaluations: int = 20


PRESETS: dict[PresetName, Preset] = {
    # A first look, of two minutes on two CPU cores.
    "quick": Preset(6, (10, 30, 100), (10.0,), (500.0,), 20_000),
    # Two decades of sizes.
    "paper": Preset(20, (3, 10, 30, 100, 300), (10.0,), (500.0,), 50_000),
}
_OF_PRESET = tuple(field.name for field in dataclasses.fields(Preset))


def _of_preset(metavar: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the preset's)")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train networks of several sizes on the spiral, with static and dynamical loss functions on the same seeds.

    One hidden layer of ReLU units, full-batch gradient descent in float64, every loss function with two learning rates,
    the oscillation stopping after the last whole period. At the end the plain loss and the largest eigenvalue of its
    Hessian say how deep and how sharp the minima are. Writes results.nc (read it with xarray), summary.md,
    summary.json, config.json and sizes.png.
    """

    preset: PresetName = "quick"
    """quick: a first look, about two minutes on two CPU cores. paper: 20 seeds, as in the paper, and widths over two
    decades; the rest is ours. Within an hour on two CPU cores."""
    seeds: Annotated[int | str | None, _of_preset("N|FIRST:END")] = None
    """Members per loss: so many, or a slice, 8:16. Seed s has the same initial weights for every loss, in every run."""
    width: Annotated[tuple[int, ...] | None, _of_preset("INT [INT ...]")] = None
    """Units in the hidden layer: a network of width w has 6 w + 3 parameters, or 5 w without biases. Each width is a
    program."""
    loss: Annotated[
        tuple[LossName, ...], tyro.conf.arg(metavar="{cross-entropy,squared-sample,squared-unit} [...]")
    ] = tuple(LOSSES)
    """What is weighted: the cross-entropy, or a squared error whose weights belong to the examples (squared-sample) or
    to the output units (squared-unit). The two squared errors are ours: the paper's formulas are not known."""
    learning_rate: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = (0.3, 1.0)
    """Learning rates of the cross-entropy."""
    squared_learning_rate: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = (0.1, 0.3)
    """Learning rates of the squared errors, which at 1 are at the edge of what is stable."""
    amplitude: Annotated[tuple[float, ...] | None, _of_preset("FLOAT [FLOAT ...]")] = None
    """One or more amplitudes A > 1 of the dynamical loss. The static loss, A = 1, is always trained."""
    period: Annotated[tuple[float, ...] | None, _of_preset("FLOAT [FLOAT ...]")] = None
    """One or more periods T of one class, in updates."""
    init: Init = "paper"
    """Initialisation: see `python -m experiments.spiral --help`."""
    updates: Annotated[int | None, _of_preset("INT")] = None
    """How many updates to make."""
    evaluations: Annotated[int | None, _of_preset("INT")] = None
    """How often the validation set is evaluated during training."""
    run: tyro.conf.OmitArgPrefixes[RunFlags] = RunFlags()

    def __post_init__(self):
        require_different(self, ("width", "loss", "learning_rate", "squared_learning_rate", "amplitude", "period"))
        require(self, ("width", "updates", "evaluations"), 1, math.inf, "at least 1")
        require(self, ("amplitude",), math.nextafter(1, 2), math.inf, "above 1, which is the static loss")
        require(self, ("learning_rate", "squared_learning_rate"), LEAST, math.inf, "a positive number")
        require(self, ("period",), 2, math.inf, "at least 2 updates, shorter ones have no peak")
        parse_seeds(self.chosen.seeds)

    @property
    def chosen(self) -> Preset:
        """The preset, with those of its values replaced that are given."""
        given = {name: getattr(self, name) for name in _OF_PRESET if getattr(self, name) is not None}
        return dataclasses.replace(PRESETS[self.preset], **given)


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    arguments = sys.argv[1:] if arguments is None else arguments
    description = f"{Config.__doc__}\n\n" + "\n".join(map(in_words, PRESETS))
    with Session.start(Config, "sizes", arguments, description) as run:
        config, preset = run.config, run.config.chosen
        if max(preset.period) + 1 > preset.updates:  # here: by now the flags of a run that is resumed are known
            raise UsageError(
                f"--period {max(preset.period):g} is too long for {preset.updates:,} updates: the oscillation has to "
                "stop, which it does after a whole period of T + 1 updates."
            )
        run.open("sizes", "spiral", dataclasses.asdict(config) | dataclasses.asdict(preset))
        with jax.enable_x64(True):
            tasks = tasks_of(config)
            console.print(announcement(tasks, f"{preset.updates:,} updates | the spiral | preset {config.preset}"))
            measured = train(tasks, **run.checkpoints)
            results = with_parameters(spiral.results(tasks, measured, preset.period, *config.loss))
        if run.save(results):
            console.print(f"{write_outputs(results, run.directory)}: {run.directory}")
    return run.finished


def in_words(name: PresetName) -> str:
    """A preset as flags of the command line."""
    return f"Preset {name}: {' '.join(f'--{flag} {words(value)}' for flag, value in vars(PRESETS[name]).items())}."


def tasks_of(config: Config) -> list[Task]:
    """What is trained: a program for each loss function and width."""
    preset = config.chosen
    rates = {loss: config.learning_rate if loss == "cross-entropy" else config.squared_learning_rate for loss in LOSSES}
    programs = {
        f"{loss}-{width}": {"loss": loss, "width": width, "learning_rates": rates[loss]}
        for loss in config.loss
        for width in preset.width
    }
    return spiral.tasks(
        programs,
        preset.updates,
        preset.evaluations,
        {"observe": spiral.sharpness, "keep_steps": False},
        init=config.init,
        amplitudes=preset.amplitude,
        periods=preset.period,
        seeds=parse_seeds(preset.seeds),
        name_loss=True,
    )


def with_parameters(results: xr.Dataset) -> xr.Dataset:
    """Adds the number of trained parameters, `[width]`, and sorts the learning rates, which loss functions share."""
    init = results.init.item()
    numbers = [spiral.num_parameters(init, width) for width in results.width.values.tolist()]
    attrs = {"units": "1", "long_name": "number of trained parameters, weights and biases"}
    return results.assign_coords(parameters=("width", numbers, attrs)).sortby("learning_rate")


def write_outputs(results: xr.Dataset, directory: Path) -> str:
    """Writes what is to be read and looked at, prints what it says, and returns what there is now, in words."""
    # Here: what only the end needs takes seconds to import.
    from ..results.summary import summarise
    from ..results.tables import write_summary
    from . import figure, statistics

    summarised, points = summarise(results), statistics.points(results)
    write_summary(summarised, results, directory, statistics.markdown(points), {"sizes": statistics.plain(points)})
    figure.sizes(points, results, directory / "sizes.png")
    for notice in summarised.notices:
        warn(notice)
    for printed in (*statistics.console_tables(points), *statistics.verdicts(points)):
        console.print(printed)
    speed = results.attrs["member_updates_per_second"]
    lead = f"{speed:,.0f} member-updates/s. " if math.isfinite(speed) else ""
    return f"{lead}Results, summary and figure"


if __name__ == "__main__":
    execute(main)
