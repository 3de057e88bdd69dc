"""Decision regions of the spiral's networks while they learn: `python -m experiments.regions`."""

import dataclasses
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
import xarray as xr
from jaxtyping import Array, Float

from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.train import Dataset, TrainState

from ..problems import spiral
from ..problems.spiral import Init
from ..running.errors import UsageError
from ..running.flags import LEAST, RunFlags, Seeds, ShownSeed, parse_seeds, require, require_shown
from ..running.session import Session
from ..running.task import Observe, Task, announcement
from ..running.terminal import console, execute
from ..running.training import train

SIDE = np.linspace(-1.25, 1.25, 71)
"""Where, along either axis, the networks are asked for a class: the arms end at radius 1."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Watch the decision regions of networks on the spiral, of the static and a dynamical loss on the same seeds.

    The protocol of experiments.spiral. Which class the network gives every point of the plane, and how sure it is,
    is observed at evenly spaced steps. Writes results.nc (read it with xarray), summary.md, summary.json, config.json,
    regions.png and, if it is asked for, regions.gif.
    """

    seeds: Seeds = 4
    """Members per loss: so many, or a slice, 8:16. Seed s has the same initial weights for every loss, in every run."""
    amplitude: float = 70.0
    """Amplitude A > 1 of the dynamical loss. The static loss is always trained too."""
    period: float = 5000.0
    """Period T of one class, in updates."""
    updates: int = 70_000
    """How many updates to make."""
    frames: int = 28
    """At how many steps to look, from the first on; a divisor of the updates."""
    shown: int = 7
    """How many of them regions.png shows, evenly spaced, the last one being the last."""
    animation: bool = False
    """Write regions.gif too, which shows all."""
    init: Init = "paper"
    """As for experiments.spiral."""
    width: int = 100
    """Units in the hidden layer."""
    learning_rate: float = 1.0
    """The constant learning rate."""
    show_seed: ShownSeed = None
    """The seed whose networks are drawn."""
    run: tyro.conf.OmitArgPrefixes[RunFlags] = RunFlags()

    def __post_init__(self):
        require_shown(self)
        require(self, ("updates", "width", "frames", "shown"), 1, math.inf, "at least 1")
        require(self, ("learning_rate",), LEAST, math.inf, "a positive number")
        require(self, ("period",), 2, math.inf, "at least 2 updates, shorter ones have no peak")
        require(self, ("amplitude",), math.nextafter(1, 2), math.inf, "above 1, which is the static loss")
        if self.updates % self.frames:
            raise UsageError(f"--frames must be a divisor of the {self.updates} updates, got {self.frames}.")
        if self.shown > self.frames:
            raise UsageError(f"--shown must be at most the number of --frames, {self.frames}, got {self.shown}.")


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    with Session.start(Config, "regions", sys.argv[1:] if arguments is None else arguments) as run:
        config = run.config
        run.open("regions", "spiral", dataclasses.asdict(config))
        with jax.enable_x64(True):
            tasks = tasks_of(config)
            console.print(announcement(tasks, f"{config.updates:,} updates | the spiral | float64"))
            measured = train(tasks, **run.checkpoints).assign_coords(x=SIDE, y=SIDE)
            results = spiral.results(tasks, measured, [config.period], "cross-entropy")
        if run.save(results):
            how = config.show_seed, config.shown, config.animation
            console.print(f"{write_outputs(results, run.directory, *how)}: {run.directory}")
    return run.finished


def tasks_of(config: Config) -> list[Task]:
    """What is trained: one program, evaluated as often as it is looked at."""
    dims = {"decision": ("y", "x"), "confidence": ("y", "x")}
    every = config.updates // config.frames
    return spiral.tasks(
        {"": {"init": config.init, "width": config.width}},
        config.updates,
        config.frames,
        {"observe": regions(SIDE), "observe_every": every, "observed_dims": dims, "keep_steps": False},
        amplitudes=[config.amplitude],
        periods=[config.period],
        seeds=parse_seeds(config.seeds),
        learning_rates=[config.learning_rate],
        loss="cross-entropy",
    )


def regions(side: Float[np.ndarray, " side"]) -> Observe:
    """Observes at the points of a square, `[y, x]` with both coordinates from `side`: `decision`, the class of the
    largest output, int8; and `confidence`, its softmax probability, float32."""
    points = jnp.stack(jnp.meshgrid(jnp.asarray(side), jnp.asarray(side)), -1)

    def observe(state: TrainState, loss: DynamicalLoss, data: Dataset) -> dict[str, Array]:
        probabilities = jax.nn.softmax(jax.vmap(jax.vmap(state.model))(points))
        decision = jnp.argmax(probabilities, -1).astype(jnp.int8)
        return {"decision": decision, "confidence": jnp.max(probabilities, -1).astype(jnp.float32)}

    return observe


def write_outputs(
    results: xr.Dataset,
    directory: Path,
    show_seed: int | None = None,
    shown: int = Config.shown,
    animation: bool = False,
) -> str:
    """Writes what is to be read and looked at, prints the table, and returns what there is now, in words."""
    # Here: what only the end needs takes seconds to import.
    from ..results import summary, tables
    from . import figures

    summarised = summary.summarise(results)
    tables.write_summary(summarised, results, directory)
    seed = int(results.seed[0]) if show_seed is None else show_seed
    figures.regions(results, seed, min(shown, results.sizes["observation_step"]), directory / "regions.png")
    if animation:
        figures.animation(results, seed, directory / "regions.gif")
    for printed in tables.to_print(summarised):
        console.print(printed)
    return f"Results, summary and {'figure and animation' if animation else 'figure'}"


if __name__ == "__main__":
    execute(main)
