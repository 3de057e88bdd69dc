"""Static against dynamical loss on CIFAR-10: `python -m experiments.cifar --seeds 8`.

Trains Myrtle5 with the static loss (amplitude 1) and with every dynamical loss asked for, all on the same seeds, as one
compiled program, and reports the paired differences.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
import xarray as xr

from . import _data, _directory, _results, _run
from ._cifar import PRESETS, Preset, Task, as_many_steps, parse_period
from ._directory import Run
from ._run import UsageError, console
from ._training import train


def _of_preset(metavar: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the preset's)")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train Myrtle5 with a static and with dynamical loss functions on the same seeds, and compare.

    The paper's protocol: Nesterov momentum 0.9, no augmentation, a learning rate that rises linearly from 0 over the
    first 3/7 of the epochs and falls linearly to a tenth, and an oscillation that stops after 6/7 of them (epochs 300,
    700 and 600 of 700). Writes results.nc (read it with xarray), summary.md, summary.json, config.json and two figures.
    """

    seeds: int = 8
    """Members per loss. Member s of every loss has the same initial weights and order of examples."""
    amplitude: Annotated[tuple[float, ...] | None, _of_preset("FLOAT [FLOAT ...]")] = None
    """One or more amplitudes A >= 1 of the dynamical loss. The static loss, A = 1, is always trained."""
    period: Annotated[tuple[str, ...] | None, _of_preset("PERIOD [PERIOD ...]")] = None
    """One or more periods T of one class, in optimiser steps (250), or in epochs (0.5ep)."""
    stop_epoch: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 6/7 of the epochs)")
    ] = None
    """The epoch at which the oscillation stops for good."""
    width: Annotated[int | None, _of_preset("INT")] = None
    """Channels of the convolutions."""
    epochs: Annotated[int | None, _of_preset("INT")] = None
    """Passes over the training set."""
    batch_size: Annotated[int | None, _of_preset("INT")] = None
    """Examples in a minibatch."""
    learning_rate: Annotated[float | None, _of_preset("FLOAT")] = None
    """The learning rate at its peak."""
    momentum: float = 0.9
    """Nesterov momentum."""
    train_examples: Annotated[int | None, _of_preset("INT")] = None
    """Train on the first so many examples only."""
    validation_examples: Annotated[int | None, _of_preset("INT")] = None
    """Validate on the first so many examples only."""
    evaluations: Annotated[int | None, _of_preset("INT")] = None
    """How often the validation set is evaluated during training."""
    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    """auto falls back to scikit-learn's digits, loudly, when CIFAR-10 is neither on disk nor reachable."""
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"),
    ] = None
    """The tensorflow-datasets directory. CIFAR-10 is prepared there if it is not yet."""
    preset: Annotated[
        Literal["paper", "quick"] | None,
        tyro.conf.arg(metavar="{paper,quick}", help_behavior_hint="(default: quick on a CPU, else paper)"),
    ] = None
    """paper is the paper's protocol in full; quick takes about two minutes for eight seeds on two CPU cores."""
    run: tyro.conf.OmitArgPrefixes[Run] = Run()


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    arguments = sys.argv[1:] if arguments is None else arguments
    description = f"{Config.__doc__}\n\n" + "\n".join(_flags(name, preset) for name, preset in PRESETS.items())
    config = _directory.parse(Config, arguments, "cifar", description)
    _run.start_jax(config.run.distributed)
    on_cpu = jax.devices()[0].platform == "cpu"
    name = config.preset or ("quick" if on_cpu else "paper")
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(Preset)}
    preset = dataclasses.replace(PRESETS[name], **{k: v for k, v in given.items() if v is not None})
    _check(config, preset)

    images = _data.load(config.dataset, config.data_dir, report=_report)
    if config.epochs is None:
        preset = as_many_steps(preset, images)
    task = Task.of(preset, images, config.seeds, config.momentum, config.stop_epoch)
    settings = (
        dataclasses.asdict(config) | dataclasses.asdict(preset) | task.sizes | {"dataset": images.name, "preset": name}
    )
    directory = _directory.directory_of(config.run, "cifar", arguments, f"cifar-{images.name}", images.name, settings)
    reason = "as asked" if config.preset else f"{'no' if on_cpu else 'an'} accelerator was found"
    console.print(
        f"{_run.devices()} | {len(task.members)} members = {config.seeds} seeds x "
        f"{len(task.schedules.amplitude)} losses | {task.work} | preset {name} ({reason}) | "
        f"{_run.announced(task.cpu_seconds)}"
    )

    def trained() -> xr.Dataset:
        history = train(
            task.members,
            task.train_data,
            task.splits,
            task.plan,
            checkpoint=directory / "checkpoint",
            checkpoint_minutes=config.run.checkpoint_every,
        )
        steps = jnp.arange(history.steps_done)
        weights = jax.vmap(lambda schedule: jax.vmap(schedule)(steps))(task.schedules)
        return _results.assemble(**task.axes, **history.arrays(), class_weights=weights, attrs=task.attrs(history))

    return _directory.conclude("cifar", arguments, directory, trained, report)


def report(results: xr.Dataset, directory: Path) -> None:
    """Writes what is to be read and looked at, and prints the table."""
    # Here: what only the end needs takes seconds to import.
    from . import _plots, _summary

    path = lambda name: directory / _results.file_name(results.attrs["dataset"], name)
    summary = _summary.summarise(results)
    _summary.write_summary(summary, results, directory)
    _plots.learning_curves(results, path("learning_curves.png"))
    _plots.class_weights(results, path("class_weights.png"))
    console.print(_summary.console_table(summary))
    for condition in summary.conditions:
        if condition.evidence:
            console.print(condition.evidence)
    speed = results.attrs["images_per_second"]
    console.print(
        (f"{speed:,.0f} images/s. " if math.isfinite(speed) else "") + f"Results, summary and figures: {directory}"
    )


def _check(config: Config, preset: Preset) -> None:
    at_least_one = {"seeds": config.seeds} | {
        name: getattr(preset, name)
        for name in ("width", "epochs", "batch_size", "train_examples", "validation_examples", "evaluations")
    }
    for name in ("amplitude", "period"):
        if not getattr(preset, name):
            raise UsageError(f"--{name} takes one or more values, got none.")
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if not 0 < preset.learning_rate < math.inf:
        raise UsageError(f"--learning-rate must be a positive number, got {preset.learning_rate}.")
    if not 0 <= config.momentum < 1:
        raise UsageError(f"--momentum must be at least 0 and below 1, got {config.momentum}.")
    for amplitude in preset.amplitude:
        if not 1 <= amplitude < math.inf:
            raise UsageError(f"--amplitude must be at least 1, which is the static loss, got {amplitude:g}.")
    for period in preset.period:
        parse_period(period, steps_per_epoch=1)
    if config.stop_epoch is not None and not 0 <= config.stop_epoch < math.inf:
        raise UsageError(f"--stop-epoch must be a finite number of epochs, 0 or more, got {config.stop_epoch}.")


def _flags(name: str, preset: Preset) -> str:
    """A preset in the words of the command line."""
    values = {k: " ".join(map(str, v)) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(preset).items()}
    flags = (f"--{k.replace('_', '-')} {'all' if v is None else v}" for k, v in values.items())
    return f"Preset {name}: {' '.join(flags)}."


def _report(message: str) -> None:
    console.print(message, style="bold red" if message.startswith("WARNING") else None)


if __name__ == "__main__":
    _run.run(main)
