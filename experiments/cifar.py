"""Static against dynamical loss on CIFAR-10: `python -m experiments.cifar --seeds 8`.

Trains Myrtle5 with the static loss (amplitude 1) and with every dynamical loss asked for, all on the same seeds, as one
compiled program, and reports the paired differences.
"""

import dataclasses
import functools as ft
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import tyro
import xarray as xr
from jaxtyping import Array, Float, UInt8

from eqx_dynloss import ensemble
from eqx_dynloss.loss import DynamicalLoss
from eqx_dynloss.models import Myrtle
from eqx_dynloss.schedule import OscillatingWeights
from eqx_dynloss.train import Dataset

from . import _data, _plots, _results, _run, _summary
from ._run import UsageError, console

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _of_preset(metavar: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the preset's)")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Values of the flags that are not given."""

    amplitude: tuple[float, ...]
    period: tuple[str, ...]
    width: int
    epochs: int
    batch_size: int
    learning_rate: float
    train_examples: int | None
    validation_examples: int | None
    evaluations: int


PRESETS = {
    # Ruiz-Garcia et al. 2021 (CIFAR-10). Their unit of T is not known: amplitude and period are choices of ours.
    "paper": Preset((10.0,), ("100",), 64, 700, 512, 0.02, None, None, 700),
    # Ours: the same protocol, scaled down to about two minutes for eight seeds on two CPU cores.
    "quick": Preset((3.0,), ("10",), 16, 4, 64, 0.05, 8_000, 2_000, 8),
}


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
    out: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: results/cifar-DATASET-TIME)")
    ] = None
    """A new or empty directory for the results."""
    preset: Annotated[
        Literal["paper", "quick"] | None,
        tyro.conf.arg(metavar="{paper,quick}", help_behavior_hint="(default: quick on a CPU, else paper)"),
    ] = None
    """paper is the paper's protocol in full; quick takes about two minutes for eight seeds on two CPU cores."""


class Standardise(eqx.Module):
    """uint8 images to floats of mean 0 and standard deviation 1 in every channel."""

    mean: Float[Array, " channels"]
    std: Float[Array, " channels"]

    def __call__(
        self, images: UInt8[Array, "*batch height width channels"]
    ) -> Float[Array, "*batch height width channels"]:
        shape = images.shape
        return (images.astype(self.mean.dtype) - jnp.broadcast_to(self.mean, shape)) / jnp.broadcast_to(self.std, shape)


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    arguments = sys.argv[1:] if arguments is None else arguments
    description = f"{Config.__doc__}\n\n" + "\n".join(_flags(name, preset) for name, preset in PRESETS.items())
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.cifar", description=description)
    _run.use_all_cores()
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    name = config.preset or ("quick" if on_cpu else "paper")
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(Preset)}
    preset = dataclasses.replace(PRESETS[name], **{k: v for k, v in given.items() if v is not None})
    _check(config, preset)
    _run.refuse_used(config.out)

    images = _data.load(config.dataset, config.data_dir, report=_report)
    train_data, validation_data = datasets(images, preset)
    if config.epochs is None and preset.train_examples:  # a smaller data set gets more epochs, and as many steps
        scale = max(1.0, preset.train_examples / len(train_data))
        preset = dataclasses.replace(preset, epochs=round(scale * preset.epochs))
    steps_per_epoch = len(train_data) // preset.batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"a batch of {preset.batch_size} is larger than the training set of {len(train_data)} examples: "
            "pass a smaller --batch-size."
        )
    num_steps = preset.epochs * steps_per_epoch
    stop = round((6 / 7 * preset.epochs if config.stop_epoch is None else config.stop_epoch) * steps_per_epoch)
    periods = [parse_period(text, steps_per_epoch) for text in preset.period]
    schedules = make_schedules(preset.amplitude, periods, stop)  # one per loss
    num_losses = len(schedules.amplitude)
    seeds = jnp.tile(jnp.arange(config.seeds), num_losses)
    losses = DynamicalLoss(jax.tree.map(lambda leaf: jnp.repeat(leaf, config.seeds), schedules))  # one per member

    used = {"train_examples": len(train_data), "validation_examples": len(validation_data), "preset": name}
    settings = dataclasses.asdict(config) | dataclasses.asdict(preset) | used | {"dataset": images.name}
    directory = _run.new_directory(config.out, f"cifar-{images.name}", images.name, settings)
    optimiser = nesterov(preset.learning_rate, config.momentum, num_steps)
    keys = jax.vmap(ft.partial(jr.fold_in, jr.key(0)))(seeds)
    states = ensemble.init(lambda key: Myrtle(preset.width, key=key), optimiser, keys)
    train_data, validation_data = ensemble.replicate((train_data, validation_data), states)

    devices = f"{len(states.step.sharding.device_set)} x {device.device_kind}"
    reason = "as asked" if config.preset else f"{'no' if on_cpu else 'an'} accelerator was found"
    images_per_step = preset.batch_size * len(seeds)
    evaluated = (preset.evaluations * len(validation_data) + len(train_data)) * len(seeds) / 3  # a forward pass only
    seconds = cpu_seconds_per_image(preset.width) * (num_steps * images_per_step + evaluated)
    console.print(
        f"{devices} | {len(seeds)} members = {config.seeds} seeds x {num_losses} losses | {num_steps:,} steps of "
        f"{preset.batch_size} images | {_results.dataset_title(images.name)}, {len(train_data):,} + "
        f"{len(validation_data):,} images | preset {name} ({reason}) | "
        + (f"about {_run.duration(seconds)}" if on_cpu else "time: see the ETA after the first chunk")
    )
    chunk_target = 2 / (cpu_seconds_per_image(preset.width) * images_per_step) if on_cpu else steps_per_epoch
    states, history = _run.train(
        states,
        losses,
        optimiser,
        train_data,
        {"train": train_data, "validation": validation_data},
        num_steps=num_steps,
        chunk=_run.chunk_length(num_steps, min(chunk_target, num_steps / preset.evaluations)),
        batch_size=preset.batch_size,
        microbatch_size=math.gcd(preset.batch_size, 8) if on_cpu else None,
        num_evaluations=preset.evaluations,
    )

    steps_done = history.minibatch.loss.shape[1]
    results = _results.assemble(
        amplitudes=preset.amplitude,
        periods=periods,
        seeds=range(config.seeds),
        classes=CLASSES if images.name == "cifar10" else [str(digit) for digit in range(10)],
        class_weights=jax.vmap(lambda schedule: jax.vmap(schedule)(jnp.arange(steps_done)))(schedules),
        **history.arrays(),
        attrs=_results.provenance()
        | {
            "dataset": images.name,
            "source": images.source,
            "device": devices,
            "command": shlex.join(["python", "-m", "experiments.cifar", *arguments]),
            "finished": history.finished,
            "steps_done": steps_done,
            "steps_planned": num_steps,
            "steps_per_epoch": steps_per_epoch,
            "images_per_second": history.steps_per_second * images_per_step,
        },
    )
    report(results, directory)
    return history.finished


def make_schedules(amplitudes: Sequence[float], periods: Sequence[float], stop: int) -> OscillatingWeights:
    """The schedules of all losses as one batch, in the order of `_results.conditions`: the static one first."""
    try:
        pairs = np.array([(A, 1 if T is None else T) for A, T in _results.conditions(amplitudes, periods)])
        return OscillatingWeights(len(CLASSES), pairs[:, 0], pairs[:, 1], stop=stop)
    except ValueError as error:
        raise UsageError(str(error)) from error


def parse_period(text: str, steps_per_epoch: int) -> float:
    """A period in optimiser steps, from `"250"` (steps) or `"0.5ep"` (epochs)."""
    match = re.fullmatch(r"([0-9.eE+-]+?)\s*(ep|epochs?)?", text.strip())
    try:
        number = float(match[1] if match else text)
    except ValueError:
        raise UsageError(f"{text!r} is not a period: give optimiser steps (250) or epochs (0.5ep).") from None
    if not 0 < number < math.inf:
        raise UsageError(f"--period must be a positive number of steps or epochs, got {text}.")
    return number * steps_per_epoch if match and match[2] else number


def nesterov(learning_rate: float, momentum: float, num_steps: int) -> optax.GradientTransformation:
    """The paper's optimiser: the rate rises from 0 to its peak at 3/7 of the steps and falls to a tenth at the end.

    The peak and the momentum are injected hyperparameters, so that members may differ in them.
    """
    rise = round(num_steps * 3 / 7)
    shape = optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, rise), optax.linear_schedule(1.0, 0.1, num_steps - rise)], [rise]
    )

    def make(learning_rate, momentum):
        return optax.sgd(lambda count: learning_rate * shape(count), momentum, nesterov=True)

    return optax.inject_hyperparams(make)(learning_rate=learning_rate, momentum=momentum)


def flops_per_image(width: int) -> float:
    """Floating-point operations of a forward and backward pass of Myrtle on one image.

    Three times the forward pass, but for the first convolution, whose input needs no gradient.
    """
    return 2 * 9 * (2 * 1024 * 3 * width + 3 * (1024 + 256 + 64) * width**2)


def cpu_seconds_per_image(width: int) -> float:
    """About how long an image takes in training on this CPU's cores; for the announced time and the length of chunks.

    Fitted to widths 16 and 64 on two cores: arithmetic at 140 GFLOP/s a core, and the rest.
    """
    return (flops_per_image(width) / 140e9 + 2e-4) / jax.device_count()


def datasets(images: _data.ImageData, preset: Preset) -> tuple[Dataset, Dataset]:
    """The training and validation sets, as uint8; their transform standardises with the training set's statistics."""
    train, validation = slice(preset.train_examples), slice(preset.validation_examples)
    pixels = images.train_images[train]
    mean = pixels.mean((0, 1, 2))
    squares = np.einsum("nhwc,nhwc->c", pixels, pixels, dtype=np.int64)  # exact, and no copy of the images in float64
    std = np.sqrt(squares / pixels[..., 0].size - mean**2)
    standardise = Standardise(jnp.asarray(mean, float), jnp.asarray(std, float))
    return (
        Dataset(jnp.asarray(pixels), jnp.asarray(images.train_labels[train]), standardise),
        Dataset(
            jnp.asarray(images.validation_images[validation]),
            jnp.asarray(images.validation_labels[validation]),
            standardise,
        ),
    )


def report(results: xr.Dataset, directory: Path) -> None:
    """Writes everything that a run leaves behind, and prints the table."""
    path = lambda name: directory / _results.file_name(results.attrs["dataset"], name)
    _results.save(results, path("results.nc"))
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
