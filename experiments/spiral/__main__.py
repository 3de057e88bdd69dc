"""The paper's spiral, every seed at once: `python -m experiments.spiral --seeds 10`.

Trains a small network with the static loss and with every dynamical loss asked for, on the same seeds, and follows the
Hessian and the neural tangent kernel: the paper's Figure 4 with error bars.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro
import xarray as xr

from ..problems import spiral
from ..problems.oscillation import Oscillation
from ..problems.spiral import Init, LossName
from ..results.labelled import by_setting
from ..running.errors import UsageError
from ..running.flags import LEAST, RunFlags, Seeds, ShownSeed, parse_seeds, require, require_different, require_shown
from ..running.session import Session
from ..running.task import Task, announcement
from ..running.terminal import console, execute
from ..running.training import train


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network on the spiral with a static and with dynamical loss functions on the same seeds, and compare.

    The protocol of the paper's Figure 4: three arms of 100 points, one hidden layer of 100 ReLU units, full-batch
    gradient descent at rate 1 in float64, 70,000 updates, A = 70, T = 5000, the oscillation stopping after the last
    whole period (for other periods that is a rule of ours). Periods are counted as in the authors' code, T + 1 updates
    each. Writes results.nc (read it with xarray), summary.md, summary.json, config.json and figures. Flags that take
    several values train all combinations.
    """

    seeds: Seeds = 10
    """Members per loss: so many, or a slice, 8:16. Seed s has the same initial weights for every loss, in every run.
    The data are the same for all."""
    amplitude: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = (70.0,)
    """One or more amplitudes A >= 1 of the dynamical loss. The static loss, A = 1, is always trained."""
    period: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = (5000.0,)
    """One or more periods T of one class, in updates."""
    init: Annotated[tuple[Init, ...], tyro.conf.arg(metavar="{paper,glorot,none} [...]")] = ("paper",)
    """paper: weights N(0, 1/fan_in), biases from 0. glorot: truncated Glorot-normal weights, biases N(0, 0.01^2). none:
    the paper's weights without any biases, with which the network cannot learn the spiral."""
    width: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (100,)
    """Units in the hidden layer."""
    learning_rate: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = (1.0,)
    """The constant learning rate."""
    loss: LossName = "cross-entropy"
    """What is weighted: the paper's cross-entropy, or a squared error whose weights belong to the examples
    (squared-sample) or to the output units (squared-unit). The two squared errors are choices of ours, and at rate 1
    they are at the edge of what is stable: take 0.3 or less."""
    oscillation: Annotated[
        tuple[Oscillation, ...],
        tyro.conf.arg(metavar="{triangle,cosine,square,random-order,learning-rate} [...]"),
    ] = ("triangle",)
    """triangle: the paper's. Controls of ours, with the same A and T: cosine, square: another waveform. random-order:
    the classes take turns in an order drawn anew for every pass. learning-rate: a static loss whose learning rate
    oscillates as the weight of the active class does, with the same mean."""
    updates: int = 70_000
    """How many updates to make."""
    curvature: int = 25
    """Follow the Hessian and the neural tangent kernel every so many updates, a divisor of all; 0 for not at all."""
    show_seed: ShownSeed = None
    """The seed whose trajectory is drawn in full."""
    run: tyro.conf.OmitArgPrefixes[RunFlags] = RunFlags()

    def __post_init__(self):
        require_shown(self)
        require(self, ("updates", "width"), 1, math.inf, "at least 1")
        require_different(self, ("amplitude", "period", "init", "width", "learning_rate", "oscillation"))
        require(self, ("amplitude",), 1, math.inf, "at least 1, which is the static loss")
        require(self, ("period", "learning_rate"), LEAST, math.inf, "a positive number")
        require(self, ("period",), 2, math.inf, "at least 2 updates, shorter ones have no peak")
        if self.curvature < 0 or (self.curvature and self.updates % self.curvature):
            raise UsageError(
                f"--curvature must be a divisor of the {self.updates} updates, or 0, got {self.curvature}."
            )


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    with Session.start(Config, "spiral", sys.argv[1:] if arguments is None else arguments) as run:
        config = run.config
        run.open("spiral", "spiral", dataclasses.asdict(config))
        with jax.enable_x64(True):
            tasks = tasks_of(config)
            work = f"{config.updates:,} updates | the spiral, 300 + 300 points | float64"
            console.print(announcement(tasks, work))
            results = spiral.results(tasks, train(tasks, **run.checkpoints), config.period, config.loss)
        if run.save(results):
            console.print(f"{write_outputs(results, run.directory, config.show_seed)}: {run.directory}")
    return run.finished


def tasks_of(config: Config) -> list[Task]:
    """What is trained: a program for each initialisation and width."""
    controls = config.oscillation != ("triangle",)
    programs = {
        f"{init}-{width}" + (f"-{oscillation}" if oscillation != "triangle" else ""): {
            "init": init,
            "width": width,
            "oscillation": oscillation if controls else None,
        }
        for init in config.init
        for width in config.width
        for oscillation in config.oscillation
    }
    return spiral.tasks(
        programs,
        config.updates,
        min(config.updates, 70),
        {"observe": spiral.curvature, "observe_every": config.curvature} if config.curvature else {},
        amplitudes=config.amplitude,
        periods=config.period,
        seeds=parse_seeds(config.seeds),
        learning_rates=config.learning_rate,
        loss=config.loss,
    )


def write_outputs(results: xr.Dataset, directory: Path, show_seed: int | None = None) -> str:
    """Writes what is to be read and looked at, prints the table, and returns what there is now, in words."""
    # Here: what only the end needs takes seconds to import.
    from ..results import summary, tables
    from . import bifurcation, dynamics, static

    summarised = summary.summarise(results)
    more = bifurcation.markdown(results) if "hessian_max" in results else ()
    tables.write_summary(summarised, results, directory, more)
    figures = dynamics.write(results, directory, int(results.seed[0]) if show_seed is None else show_seed)
    if len(list(by_setting(results))) > 1:
        figures.append(directory / "static_curves.png")
        static.static_curves(results, figures[-1])
    for printed in tables.to_print(summarised):
        console.print(printed)
    speed = results.attrs["member_updates_per_second"]
    lead = f"{speed:,.0f} member-updates/s. " if math.isfinite(speed) else ""
    return f"{lead}Results, summary and {len(figures)} figures"


if __name__ == "__main__":
    execute(main)
