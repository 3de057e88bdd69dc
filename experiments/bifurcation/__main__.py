"""The bifurcation by itself: a frozen loss, and a sweep of learning rates: `python -m experiments.bifurcation`.

Under a dynamical loss the curvature moves through 2/η. Here the loss stands still instead, with the class weights of
one step, and the learning rate is what is varied: a bifurcation diagram, as of the logistic map.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro

from ..problems import spiral
from ..problems.spiral import Init
from ..running.errors import UsageError
from ..running.flags import LEAST, RunFlags, Seeds, ShownSeed, parse_seeds, require, require_different, require_shown
from ..running.session import Session
from ..running.task import Task, announcement
from ..running.terminal import console, execute
from ..running.training import train
from . import frozen


@dataclasses.dataclass(frozen=True)
class Config:
    """Freeze the loss of networks on the spiral, and go on with gradient descent at a sweep of learning rates.

    Trains networks with the static and with a dynamical loss, as experiments.spiral does (here a period has T updates,
    not T + 1), until some phase of a period. From there on every network goes on many times, once for every learning
    rate, with the class weights of that phase, which do not change any more; the network of the static loss with all
    weights 1. Rates are multiples of 2/λ, the edge of stability, where λ is the largest Hessian eigenvalue of the
    frozen loss at the beginning. Writes results.nc (read it with xarray), summary.md, summary.json, config.json and
    bifurcation.png.
    """

    seeds: Seeds = 4
    """Networks per loss: so many, or a slice, 8:16."""
    amplitude: float = 70.0
    """Amplitude A > 1 of the dynamical loss."""
    period: int = 5000
    """Period T of one class, in updates."""
    cycle: int = 1
    """In which period to freeze the loss: 1 is the first one."""
    phase: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")] = (0.5, 0.9)
    """At which phases of it, hundredths of the period. The static loss is taken up at the first of them."""
    rates: tuple[float, float] = (0.2, 3.0)
    """The lowest and the highest learning rate, in units of 2/λ."""
    num_rates: int = 113
    """How many rates, evenly spaced."""
    updates: int = 1000
    """How many updates every network makes before it is looked at. It goes on learning meanwhile, and λ changes, so
    this matters."""
    last: int = 128
    """How many updates after that are looked at."""
    init: Init = "paper"
    """As for experiments.spiral."""
    width: int = 100
    """Units in the hidden layer."""
    learning_rate: float = 1.0
    """The learning rate until the loss is frozen."""
    show_seed: ShownSeed = None
    """The seed that is drawn."""
    run: tyro.conf.OmitArgPrefixes[RunFlags] = RunFlags()

    def __post_init__(self):
        require_shown(self)
        require(self, ("cycle", "width", "updates"), 1, math.inf, "at least 1")
        require(self, ("num_rates",), 2, math.inf, "at least 2")
        require(self, ("last",), 16, math.inf, "at least 16 updates, in which a period of 4 can be seen")
        require(self, ("learning_rate", "rates"), LEAST, math.inf, "a positive number")
        require(self, ("period",), 2, math.inf, "at least 2 updates, shorter ones have no peak")
        require_different(self, ("phase",))
        require(self, ("amplitude",), math.nextafter(1, 2), math.inf, "above 1, which is the static loss")
        if not (self.rates[1] - self.rates[0]) / (self.num_rates - 1) >= 1e-5:
            raise UsageError(
                "--rates takes the lowest and the highest rate, with steps of at least 0.00001 between "
                f"--num-rates, got {self.rates[0]:g} {self.rates[1]:g}."
            )
        for phase in self.phase:
            at = phase * self.period
            if not 0 <= phase < 1 or abs(100 * phase - round(100 * phase)) > 1e-9 or abs(at - round(at)) > 1e-6:
                raise UsageError(
                    f"--phase takes hundredths of the period below 1, at whole updates, such as 0.5, got {phase:g}."
                )

    @property
    def steps(self) -> list[int]:
        """The steps at which the loss is frozen, one for every phase."""
        return [(self.cycle - 1) * self.period + round(phase * self.period) for phase in self.phase]


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    with Session.start(Config, "bifurcation", sys.argv[1:] if arguments is None else arguments) as run:
        config = run.config
        run.open("bifurcation", "spiral", dataclasses.asdict(config))
        with jax.enable_x64(True):
            (begun,) = first = tasks_of(config)
            console.print(announcement(first, f"{begun.plan.num_steps:,} updates | the spiral | float64"))
            started = train(first, **run.checkpoints)
            if not started.finished:
                raise KeyboardInterrupt
            starts = frozen.starts(begun, started, config.steps)
            if not starts:
                raise UsageError("no network has an edge of stability: all diverged, or have no positive eigenvalue.")
            task = frozen.sweep(begun, starts, config.rates, config.num_rates, config.updates, config.last)
            work = f"{task.plan.num_steps:,} updates with a frozen loss"
            console.print(f"{len(task.members):,} members = {len(starts)} networks x {config.num_rates} rates | {work}")
            measured = train([task], **run.checkpoints)
            results = frozen.results(measured, starts, config.last, init=config.init, width=config.width)
        if run.save(results):
            console.print(f"{write_outputs(results, run.directory, config.show_seed)}: {run.directory}")
    return run.finished


def tasks_of(config: Config) -> list[Task]:
    """What is trained until the loss is frozen, and on to the end of that period: the oscillation would stop before it
    in a shorter training."""
    end = config.cycle * config.period
    plan = {"observe": frozen.whereabouts, "observe_every": math.gcd(*config.steps, end)}
    return spiral.tasks(
        {"start": {"init": config.init, "width": config.width}},
        end,
        1,
        plan | {"observed_dims": {"parameters": ("parameter",)}, "keep_steps": False},
        amplitudes=[config.amplitude],
        periods=[config.period],
        seeds=parse_seeds(config.seeds),
        learning_rates=[config.learning_rate],
        loss="cross-entropy",
        inclusive_period=False,
    )


def write_outputs(results, directory: Path, show_seed: int | None = None) -> str:
    """Writes what is to be read and looked at, prints what it says, and returns what there is now, in words."""
    # Here: what only the end needs takes seconds to import.
    from . import diagram, thresholds

    for line in thresholds.write(results, directory):
        console.print(line)
    seed = int(results.seed[0]) if show_seed is None else show_seed
    diagram.draw(results, seed, directory / "bifurcation.png")
    return "Results, summary and figure"


if __name__ == "__main__":
    execute(main)
