"""The loss landscape over one period, around a network that is trained on it: `python -m experiments.landscape`.

The first paper's central picture, computed: while a class is emphasised, valleys widen and deepen, then they narrow and
rise again.
"""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import tyro
import xarray as xr

from ..problems import spiral
from ..problems.spiral import Init
from ..running.errors import UsageError
from ..running.flags import LEAST, RunFlags, Seeds, ShownSeed, parse_seeds, require, require_shown
from ..running.session import Session
from ..running.task import Task, announcement
from ..running.terminal import console, execute, warn
from ..running.training import train
from . import cuts


@dataclasses.dataclass(frozen=True)
class Config:
    """Cut through the loss landscape of the spiral, at evenly spaced steps of one period of the class weights.

    Trains networks with the static and with a dynamical loss on the same seeds, as experiments.spiral does (here a
    period has T updates, not T + 1). Around every network, at every such step, it computes the loss with that step's
    weights along the leading eigenvector of its Hessian and in the plane of the two leading ones, and follows the
    training from there. Writes results.nc (read it with xarray), summary.md, summary.json, config.json and two figures.
    """

    seeds: Seeds = 10
    """Members per loss: so many, or a slice, 8:16. Seed s has the same initial weights for every loss, in every run."""
    amplitude: float = 70.0
    """Amplitude A > 1 of the dynamical loss. The static loss is always trained too."""
    period: int = 5000
    """Period T of one class, in updates."""
    cycle: int = 5
    """Which period to look at: 1 is the first one."""
    cuts: int = 8
    """At how many steps of it; a divisor of the period."""
    following: int = 50
    """How many updates of the training to follow from every such step."""
    extent: float = 0.05
    """How far the cuts go to either side, in units of the norm of the network's parameters."""
    init: Init = "paper"
    """As for experiments.spiral."""
    width: int = 100
    """Units in the hidden layer."""
    learning_rate: float = 1.0
    """The constant learning rate."""
    show_seed: ShownSeed = None
    """The seed whose landscapes are drawn."""
    run: tyro.conf.OmitArgPrefixes[RunFlags] = RunFlags()

    def __post_init__(self):
        require_shown(self)
        require(self, ("cycle", "cuts", "following", "width"), 1, math.inf, "at least 1")
        require(self, ("extent", "learning_rate"), LEAST, math.inf, "a positive number")
        require(self, ("period",), 2, math.inf, "at least 2 updates, shorter ones have no peak")
        require(self, ("amplitude",), math.nextafter(1, 2), math.inf, "above 1, which is the static loss")
        if self.period % self.cuts:
            raise UsageError(f"--cuts must be a divisor of the period of {self.period} updates, got {self.cuts}.")
        apart = self.period // self.cuts
        if self.following > apart:
            raise UsageError(
                f"--following must be at most the {apart} updates from one cut to the next, got {self.following}."
            )

    @property
    def steps(self) -> range:
        """Before which updates the landscape is looked at."""
        return range((self.cycle - 1) * self.period, self.cycle * self.period, self.period // self.cuts)


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    with Session.start(Config, "landscape", sys.argv[1:] if arguments is None else arguments) as run:
        config = run.config
        run.open("landscape", "spiral", dataclasses.asdict(config))
        with jax.enable_x64(True):
            (task,) = tasks = tasks_of(config)
            console.print(announcement(tasks, f"{task.plan.num_steps:,} updates | the spiral | float64"))
            measured = train(tasks, **run.checkpoints)
            if not measured.finished:
                raise KeyboardInterrupt
            seen = cuts.take(task, measured, config.steps, config.extent, config.following, console.print)
            measured = seen.assign_attrs(measured.attrs)
            results = spiral.results(tasks, measured, [config.period], "cross-entropy")
        if run.save(results):
            console.print(f"{write_outputs(results, run.directory, config.show_seed)}: {run.directory}")
    return run.finished


def tasks_of(config: Config) -> list[Task]:
    """What is trained: one program."""
    every = config.period // config.cuts
    return spiral.tasks(
        {"": {"init": config.init, "width": config.width}},
        config.cycle * config.period,
        config.cycle,
        {"observe": cuts.parameters, "observe_every": every, "observed_dims": cuts.DIMS, "keep_steps": False},
        amplitudes=[config.amplitude],
        periods=[config.period],
        seeds=parse_seeds(config.seeds),
        learning_rates=[config.learning_rate],
        loss="cross-entropy",
        inclusive_period=False,
    )


def write_outputs(results: xr.Dataset, directory: Path, show_seed: int | None = None) -> str:
    """Writes what is to be read and looked at, prints what it says, and returns what there is now, in words."""
    # Here: what only the end needs takes seconds to import.
    from . import figures, statistics

    notices, sentences = statistics.write(results, directory)
    for notice in notices:
        warn(notice)
    for sentence in sentences:
        console.print(sentence)
    written = figures.write(results, directory, int(results.seed[0]) if show_seed is None else show_seed)
    return f"Results, summary and {len(written)} figures"


if __name__ == "__main__":
    execute(main)
