"""The paper's spiral, every seed at once: `python -m experiments.spiral --seeds 10`.

Trains a small network with the static loss and with every dynamical loss asked for, on the same seeds, and follows the
Hessian and the neural tangent kernel: the paper's Figure 4 with error bars.
"""

import dataclasses
import functools as ft
import math
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
import xarray as xr

from . import _directory, _results, _run, _training
from ._directory import Run
from ._plan import Plan
from ._record import History
from ._run import UsageError, console
from ._spiral import (
    Init,
    LossName,
    cpu_seconds_per_update,
    curvature,
    labelled,
    make_members,
    make_schedules,
    spiral,
    train_networks,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network on the spiral with a static and with dynamical loss functions on the same seeds, and compare.

    The protocol of the paper's Figure 4: three arms of 100 points, one hidden layer of 100 ReLU units, full-batch
    gradient descent at rate 1 in float64, 70,000 updates, A = 70, T = 5000, the oscillation stopping after the last
    whole period (for other periods that is a rule of ours). Periods are counted as in the authors' code, T + 1 updates
    each. Writes results.nc (read it with xarray), summary.md, summary.json, config.json and figures. Flags that take
    several values train all combinations.
    """

    seeds: int = 10
    """Members per loss. Member s of every loss has the same initial weights. The data are the same for all."""
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
    updates: int = 70_000
    """How many updates to make."""
    curvature: int = 25
    """Follow the Hessian and the neural tangent kernel every so many updates, a divisor of all; 0 for not at all."""
    show_seed: int = 0
    """The seed whose trajectory is drawn in full."""
    run: tyro.conf.OmitArgPrefixes[Run] = Run()


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = _directory.parse(Config, arguments, "spiral")
    _check(config)
    _run.start_jax(config.run.distributed)
    directory = _directory.directory_of(config.run, "spiral", arguments, "spiral", "spiral", dataclasses.asdict(config))

    def trained() -> xr.Dataset:
        with jax.enable_x64(True):
            return train(config, directory)

    reported = ft.partial(report, show_seed=config.show_seed)
    return _directory.conclude("spiral", arguments, directory, trained, reported)


def train(config: Config, directory: Path) -> xr.Dataset:
    """Trains all members, one program for each initialisation and width, and gives what was measured its dimensions."""
    num_losses = len(_results.conditions(config.amplitude, config.period))
    networks: list[tuple[Init, int]] = [(init, width) for init in config.init for width in config.width]
    members = config.seeds * num_losses * len(config.learning_rate)
    seconds = sum(cpu_seconds_per_update(width, config.curvature) for _, width in networks) * members * config.updates
    console.print(
        f"{_run.devices()} | {members * len(networks)} members = {config.seeds} seeds x "
        f"{num_losses} losses x {len(networks) * len(config.learning_rate)} settings | {config.updates:,} updates | "
        f"the spiral, 300 + 300 points | float64 | {_run.announced(seconds)}"
    )
    every, evaluations = config.curvature or 1, min(config.updates, 70)
    pace = cpu_seconds_per_update(max(config.width), config.curvature) * members
    chunk = every * _run.chunk_length(config.updates // every, min(2 / pace, config.updates / evaluations) / every)
    schedules = make_schedules(config.amplitude, config.period, config.updates)  # one per loss

    def train_network(init: Init, width: int) -> tuple[xr.Dataset, History]:
        history = _training.train(
            make_members(init, width, schedules, config.seeds, config.learning_rate, config.loss),
            spiral(0),
            {"train": spiral(0), "validation": spiral(1)},
            Plan(
                num_steps=config.updates,
                chunk=chunk,
                num_evaluations=evaluations,
                observe=curvature if config.curvature else None,
                observe_every=every,
            ),
            checkpoint=directory / "checkpoint" / f"{init}-{width}",
            checkpoint_minutes=config.run.checkpoint_every,
        )
        weights = jax.vmap(lambda schedule: jax.vmap(schedule)(jnp.arange(history.steps_done)))(schedules)
        labels = {"amplitudes": config.amplitude, "periods": config.period, "seeds": range(config.seeds)}
        seen = np.arange(0, history.steps_done, every), history.observations
        return labelled(history, labels, config.learning_rate, *seen, class_weights=weights), history

    results = _results.with_loss_function(train_networks(networks, train_network), config.loss)
    return results.assign_attrs(steps_planned=config.updates * len(networks))


def report(results: xr.Dataset, directory: Path, show_seed: int) -> None:
    """Writes what is to be read and looked at, and prints the table."""
    # Here: what only the end needs takes seconds to import.
    from . import _bifurcation, _dynamics_plots, _static_plots, _summary

    summary = _summary.summarise(results)
    observed = "hessian_max" in results
    _summary.write_summary(summary, results, directory, _bifurcation.report(results) if observed else ())
    figures = _dynamics_plots.write(results, directory, show_seed)
    if len(list(_results.settings(results))) > 1:
        figures.append(directory / "static_curves.png")
        _static_plots.static_curves(results, figures[-1])
    console.print(_summary.console_table(summary))
    for condition in summary.conditions:
        if condition.evidence:
            console.print(condition.evidence)
    speed = results.attrs["member_updates_per_second"]
    console.print(
        (f"{speed:,.0f} member-updates/s. " if math.isfinite(speed) else "")
        + f"Results, summary and {len(figures)} figures: {directory}"
    )


def _check(config: Config) -> None:
    for name in ("seeds", "updates"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(config, name)}.")
    for name in ("amplitude", "period", "init", "width", "learning_rate"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} takes one or more different values, got {_directory.words(values)}.")
    for amplitude in config.amplitude:
        if not 1 <= amplitude < math.inf:
            raise UsageError(f"--amplitude must be at least 1, which is the static loss, got {amplitude:g}.")
    for name in ("period", "learning_rate"):
        for value in getattr(config, name):
            if not 0 < value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must be a positive number, got {value:g}.")
    if min(config.period) < 2:
        raise UsageError(f"--period must be at least 2 updates, shorter ones have no peak, got {min(config.period):g}.")
    if min(config.width) < 1:
        raise UsageError(f"--width must be at least 1, got {min(config.width)}.")
    if config.curvature < 0 or (config.curvature and config.updates % config.curvature):
        raise UsageError(
            f"--curvature must be a divisor of the {config.updates} updates, or 0, got {config.curvature}."
        )
    if not 0 <= config.show_seed < config.seeds:
        raise UsageError(f"--show-seed must be one of the {config.seeds} seeds, 0 or more, got {config.show_seed}.")


if __name__ == "__main__":
    _run.run(main)
