"""The paper's spiral, every seed at once: `python -m experiments.spiral --seeds 10`.

Trains a small network with the static loss and with every dynamical loss asked for, on the same seeds, and follows the
Hessian and the neural tangent kernel: the paper's Figure 4 with error bars.
"""

import dataclasses
import functools as ft
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
import xarray as xr

from eqx_dynloss import ensemble, landscape
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import MLP
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset

from . import _bifurcation, _dynamics_plots, _results, _run, _summary
from ._run import UsageError, console

CLASSES = ("class 0", "class 1", "class 2")
NTK_POINTS = 50  # the kernel is that of the first 50 training points, as in the paper's figure
Init = Literal["paper", "glorot", "none"]


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
    updates: int = 70_000
    """How many updates to make."""
    curvature: int = 25
    """Follow the Hessian and the neural tangent kernel every so many updates, a divisor of all; 0 for not at all."""
    show_seed: int = 0
    """The seed whose trajectory is drawn in full."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: results/spiral-TIME)")] = (
        None
    )
    """A new or empty directory for the results."""


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.spiral", description=Config.__doc__)
    _check(config)
    _run.refuse_used(config.out)
    _run.use_all_cores()
    directory = _run.new_directory(config.out, "spiral", "spiral", dataclasses.asdict(config))
    attrs = {"command": shlex.join(["python", "-m", "experiments.spiral", *arguments])}
    with _run.saving_first():
        with jax.enable_x64(True):
            results = train(config)
        results.attrs |= _results.provenance() | attrs
        _results.save(results, directory / "results.nc")
        if results.attrs["finished"] != "true":
            report(results, directory, config.show_seed)
            return False
    report(results, directory, config.show_seed)
    return True


def train(config: Config) -> xr.Dataset:
    """Trains all members, one program for each initialisation and width, and gives what was measured its dimensions."""
    device = jax.devices()[0]
    num_losses = len(_results.conditions(config.amplitude, config.period))
    networks: list[tuple[Init, int]] = [(init, width) for init in config.init for width in config.width]
    members = config.seeds * num_losses * len(config.learning_rate)
    seconds = sum(cpu_seconds_per_update(width, config.curvature) for _, width in networks) * members * config.updates
    console.print(
        f"{jax.device_count()} x {device.device_kind} | {members * len(networks)} members = {config.seeds} seeds x "
        f"{num_losses} losses x {len(networks) * len(config.learning_rate)} settings | {config.updates:,} updates | "
        "the spiral, 300 + 300 points | float64 | "
        + (f"about {_run.duration(seconds)}" if device.platform == "cpu" else "time: see the ETA after the first chunk")
    )
    every, evaluations = config.curvature or 1, min(config.updates, 70)
    pace = cpu_seconds_per_update(max(config.width), config.curvature) * members
    chunk = every * _run.chunk_length(config.updates // every, min(2 / pace, config.updates / evaluations) / every)
    finished, steps_done = True, 0
    parts: dict[str, list[xr.Dataset]] = {}
    for number, (init, width) in enumerate(networks):
        if len(networks) > 1:
            console.print(f"network {number + 1} of {len(networks)}: {init} initialisation, width {width}")
        try:
            part, finished, interrupted = train_network(config, init, width, chunk, evaluations)
        except KeyboardInterrupt:  # before the first chunk of this network was over
            if not parts:
                raise
            finished = False
            break
        parts.setdefault(init, []).append(part)
        steps_done += part.sizes["step"]
        if not finished or interrupted:
            finished = finished and number == len(networks) - 1
            break
    results = _join([_join(row, "width") for row in parts.values()], "init")
    results.attrs |= {
        "finished": str(finished).lower(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "steps_done": steps_done,
        "steps_planned": config.updates * len(networks),
    }
    return results


def _join(parts: list[xr.Dataset], dim: str) -> xr.Dataset:
    """Parts side by side along a new dimension; what some lack is NaN."""
    return xr.concat(parts, dim, join="outer", fill_value={"diverged_at": -1}, combine_attrs="override")


def train_network(
    config: Config, init: Init, width: int, chunk: int, evaluations: int
) -> tuple[xr.Dataset, bool, bool]:
    """Trains the members of one initialisation and width.

    Returns their results, whether it came to the end, and whether Ctrl-C was pressed.
    """
    schedules = make_schedules(config)  # one per loss
    num_losses, num_rates = len(schedules.amplitude), len(config.learning_rate)
    # Members are ordered by learning rate, then loss, then seed.
    seeds = jnp.tile(jnp.arange(config.seeds), num_losses * num_rates)
    rates = jnp.repeat(jnp.asarray(config.learning_rate, float), num_losses * config.seeds)
    losses = DynamicalLoss(jax.tree.map(lambda leaf: jnp.tile(jnp.repeat(leaf, config.seeds), num_rates), schedules))
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    weights: Literal["paper", "glorot"] = "glorot" if init == "glorot" else "paper"
    make_model = lambda key: MLP(2, width, 3, init=weights, use_bias=init != "none", key=key)
    keys = jax.vmap(ft.partial(jr.fold_in, jr.key(0)))(seeds)
    states = ensemble.init(make_model, optimiser, keys, {"learning_rate": rates})
    data, validation = ensemble.replicate((spiral(0), spiral(1)), states)

    every = config.curvature or 1
    states, history = _run.train(
        states,
        losses,
        optimiser,
        data,
        {"train": data, "validation": validation},
        num_steps=config.updates,
        chunk=chunk,
        batch_size=None,
        microbatch_size=None,
        num_evaluations=evaluations,
        observe=curvature if config.curvature else None,
        observe_every=every,
    )
    steps_done = history.minibatch.loss.shape[1]
    weights_of_all = jax.vmap(lambda schedule: jax.vmap(schedule)(jnp.arange(steps_done)))(schedules)
    arrays = history.arrays()
    rows = [slice(i * num_losses * config.seeds, (i + 1) * num_losses * config.seeds) for i in range(num_rates)]
    parts = [
        _results.assemble(
            amplitudes=config.amplitude,
            periods=config.period,
            seeds=range(config.seeds),
            classes=CLASSES,
            class_weights=weights_of_all,
            **{name: value if name == "evaluation_steps" else value[row] for name, value in arrays.items()},
            observation_steps=np.arange(0, steps_done, every),
            observations={name: value[row] for name, value in history.observations.items()},
            attrs={"dataset": "spiral", "member_updates_per_second": history.steps_per_second * len(seeds)},
        ).assign_coords(init=init, width=width, learning_rate=rate)
        for row, rate in zip(rows, config.learning_rate, strict=True)
    ]
    return _join(parts, "learning_rate"), history.finished, history.interrupted


def spiral(noise_seed: int) -> Dataset:
    """Three arms of 100 points, `[300, 2]`, arm by arm. Noise seed 0 is the authors' training set.

    Radii from 0 to 1, two turns, noise N(0, 0.2²) on the angle from NumPy's legacy generator. The arms share the
    origin: at most 298 of the 300 points can be classified. The validation set is noise seed 1, a choice of ours.
    """
    rng = np.random.RandomState(noise_seed)
    radius = np.linspace(0.0, 1, 100)
    starts = [2 * np.pi * j / 3 for j in range(3)]
    angles = [np.linspace(start, start + 4 * np.pi, 100) + 0.2 * rng.randn(100) for start in starts]
    points = np.concatenate([np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1) for angle in angles])
    return Dataset(jnp.asarray(points, float), jnp.repeat(jnp.arange(3), 100))


def curvature(state, loss, data) -> dict[str, jax.Array]:
    """Extreme eigenvalues at the state: of the Hessian of the loss with the step's class weights, on all data, and of
    the neural tangent kernel of the first 50 points. Ten Lanczos products each, as in the paper for the Hessian."""

    def objective(model):
        return loss(jax.vmap(model)(data.inputs), data.labels, state.step)

    hessian_key, ntk_key = jr.split(jr.fold_in(state.key, state.step))
    hessian = landscape.hessian_spectrum(objective, state.model, order=10, key=hessian_key)
    ntk = landscape.ntk_spectrum(state.model, data.inputs[:NTK_POINTS], order=10, key=ntk_key)
    return {
        "hessian_max": hessian.eigenvalues[-1],
        "hessian_max_error": hessian.errors[-1],
        "hessian_min": hessian.eigenvalues[0],
        "hessian_min_error": hessian.errors[0],
        "ntk_max": ntk.eigenvalues[-1],
        "ntk_max_error": ntk.errors[-1],
    }


def make_schedules(config: Config) -> OscillatingWeights:
    """The schedules of all losses as one batch, in the order of `_results.conditions`: the static one first.

    They stop after the last whole period of T + 1 updates. The paper's figure does so; for other periods it is our
    rule. Where not one period fits, they do not stop.
    """
    pairs = [(A, T or 1) for A, T in _results.conditions(config.amplitude, config.period)]
    amplitudes, periods = np.array(pairs).T
    whole = config.updates // (periods + 1) * (periods + 1)
    stop = np.where(whole > 0, whole, np.inf)
    return OscillatingWeights(len(CLASSES), amplitudes, periods, stop=stop, inclusive_period=True)


def cpu_seconds_per_update(width: int, curvature: int) -> float:
    """About how long an update of a member takes on this CPU's cores; for the announced time and the length of chunks.

    Fitted to widths 10, 100 and 1000 on two cores. An observation costs as much as some twenty updates.
    """
    update = 2.5e-5 + 6e-7 * width + 1.2e-9 * width**2
    return update * (1 + (20 / curvature if curvature else 0)) / jax.device_count()


def report(results: xr.Dataset, directory: Path, show_seed: int) -> None:
    """Writes what is to be read and looked at, and prints the table."""
    summary = _summary.summarise(results)
    observed = "hessian_max" in results
    _summary.write_summary(summary, results, directory, _bifurcation.report(results) if observed else ())
    figures = _dynamics_plots.write(results, directory, show_seed)
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
            raise UsageError(f"--{name.replace('_', '-')} takes one or more different values, got {values}.")
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
