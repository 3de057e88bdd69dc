"""Static against dynamical loss on CIFAR-10: `python -m experiments.cifar --seeds 8`.

Trains Myrtle5 with the static loss (amplitude 1) and with every dynamical loss asked for, all on the same seeds, as one
compiled program, and reports the paired differences.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import xarray as xr

from ..problems import curvature, images
from ..problems.cifar import Problem, parse_period
from ..problems.oscillation import Oscillation
from ..problems.presets import PRESETS, ComputeDtype, PresetName, chosen, default_name, in_words
from ..results.files import file_name
from ..running.flags import LEAST, RunFlags, Seeds, parse_seeds, require, require_different
from ..running.session import Session
from ..running.task import announcement
from ..running.terminal import console, execute, tell
from ..running.training import train

# Of the training set (ours): with 80 % or less a dynamical loss cost accuracy, from 96 % on it gained, at 90 % neither.
_OVERFITTED = 0.9
_TOO_SHORT = (
    "The static loss has only {:.0%} of its training set. Where it does not overfit, no dynamical loss has gained "
    "accuracy in what we tried on CIFAR-10: train for longer (--epochs), or on fewer images (--train-examples)."
)
_ELSEWHERE = (
    "Not established here: a higher validation accuracy. With the preset's A, T and epochs and 1,000 images it was "
    "(+2.73 points [1.50 to 3.96], and with 8 other seeds +2.01 [0.47 to 3.55], seven minutes on two slow CPU cores): "
    "python -m experiments.cifar --preset quick --train-examples 1000 --period 60. "
    "And where a network of width 64 overfits all of CIFAR-10 (A = 20, T = 1 epoch: +0.78 points [0.61 to 0.94], 4 "
    "seeds, a pilot on one GPU): python -m experiments.cifar --preset short"
)


def _of_preset(metavar: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the preset's)")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train Myrtle5 with a static and with dynamical loss functions on the same seeds, and compare.

    The paper's protocol: Nesterov momentum 0.9, no augmentation, a learning rate that rises linearly from 0 over the
    first 3/7 of the epochs and falls linearly to a tenth, and an oscillation that stops after 6/7 of them (epochs 300,
    700 and 600 of 700). Writes results.nc (read it with xarray), summary.md, summary.json, config.json and two figures.
    """

    seeds: Seeds = 8
    """Members per loss: so many, or a slice, 8:16. Seed s has the same initial weights and order of examples for every
    loss, in every run."""
    amplitude: Annotated[tuple[float, ...] | None, _of_preset("FLOAT [FLOAT ...]")] = None
    """One or more amplitudes A >= 1 of the dynamical loss. The static loss, A = 1, is always trained."""
    period: Annotated[tuple[str, ...] | None, _of_preset("PERIOD [PERIOD ...]")] = None
    """One or more periods T of one class, in optimiser steps (250), or in epochs (0.5ep)."""
    stop_epoch: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 6/7 of the epochs)")
    ] = None
    """The epoch at which the oscillation stops for good."""
    oscillation: Oscillation = "triangle"
    """triangle: the paper's. Controls of ours, with the same A and T: cosine, square: another waveform. random-order:
    the classes take turns in an order drawn anew for every pass. learning-rate: a static loss whose learning rate
    oscillates as the weight of the active class does, with the same mean over a period."""
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
    curvature: Annotated[int | None, _of_preset("INT")] = None
    """Compute the largest Hessian eigenvalue on the first so many training images at every evaluation (hundreds; 0: not
    at all). A hundred cost about as much as training on 5,000 images does."""
    compute_dtype: Annotated[ComputeDtype | None, _of_preset("{float32,bfloat16}")] = None
    """What the network computes in. bfloat16 is for GPUs; parameters, loss and optimiser are float32 in any case."""
    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    """auto falls back to scikit-learn's digits, loudly, when CIFAR-10 is neither on disk nor reachable."""
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"),
    ] = None
    """The tensorflow-datasets directory. CIFAR-10 is prepared there if it is not yet."""
    preset: Annotated[
        PresetName | None,
        tyro.conf.arg(metavar="{short,quick,paper}", help_behavior_hint="(default: quick on a CPU, else short)"),
    ] = None
    """quick takes two to four minutes for eight seeds on two CPU cores (a minute and a half on fast ones); short, with
    a seventh of the epochs, should take as long on a GPU; paper is the paper's protocol in full."""
    run: tyro.conf.OmitArgPrefixes[RunFlags] = RunFlags()

    def __post_init__(self):
        parse_seeds(self.seeds)
        counts = ("width", "epochs", "batch_size", "train_examples", "validation_examples", "evaluations")
        require(self, counts, 1, math.inf, "at least 1")
        require(self, ("curvature",), 0, math.inf, "a number of images, or 0")
        require_different(self, ("amplitude", "period"))
        require(self, ("learning_rate",), LEAST, math.inf, "a positive number")
        require(self, ("momentum",), 0, 1, "at least 0 and below 1")
        require(self, ("amplitude",), 1, math.inf, "at least 1, which is the static loss")
        require(self, ("stop_epoch",), 0, math.inf, "a finite number of epochs, 0 or more")
        for period in self.period or ():
            parse_period(period, steps_per_epoch=1)


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    arguments = sys.argv[1:] if arguments is None else arguments
    description = f"{Config.__doc__}\n\n" + "\n".join(map(in_words, PRESETS))
    with Session.start(Config, "cifar", arguments, description) as run:
        config = run.config
        name = config.preset or default_name()
        data = images.load(config.dataset, config.data_dir, tell=tell)
        preset = chosen(name, data, vars(config))
        observed: dict[str, Any] = {}
        if preset.curvature:
            observed = {"observe": curvature.at_peak_and_static(preset.curvature), "observe_evaluated": True}
        how = config.momentum, config.stop_epoch, config.oscillation
        problem = Problem.of(preset, data, parse_seeds(config.seeds), *how, **observed)
        configuration = dataclasses.asdict(config) | dataclasses.asdict(preset) | problem.sizes
        run.open(f"cifar-{data.name}", data.name, configuration | {"dataset": data.name, "preset": name})
        reason = "as asked" if config.preset else f"{'no' if name == 'quick' else 'an'} accelerator was found"
        console.print(announcement([problem.task], f"{problem.work} | preset {name} ({reason})"))
        results = problem.results(train([problem.task], **run.checkpoints)).assign_attrs(preset=name)
        if run.save(results):
            console.print(f"{write_outputs(results, run.directory)}: {run.directory}")
    return run.finished


def write_outputs(results: xr.Dataset, directory: Path) -> str:
    """Writes what is to be read and looked at, prints the table, and returns what there is now, in words."""
    # Here: what only the end needs takes seconds to import.
    from ..results import summary, tables
    from . import figures

    path = lambda name: directory / file_name(results.attrs["dataset"], name)
    summarised = summary.summarise(results)
    tables.write_summary(summarised, results, directory)
    figures.learning_curves(results, path("learning_curves.png"))
    if results.get("oscillation", "") != "learning-rate":
        figures.class_weights(results, path("class_weights.png"))
    for printed in tables.to_print(summarised):
        console.print(printed)
    static, *dynamical = summarised.conditions
    gains = [condition.difference("validation").low for condition in dynamical]
    if results.attrs["dataset"] == "cifar10" and gains and not any(low and low > 0 for low in gains):
        learned = static.outcome("train").mean
        if learned is not None and learned < _OVERFITTED:
            console.print(_TOO_SHORT.format(learned))
        if results.attrs.get("preset") == "quick":
            console.print(_ELSEWHERE)
    speed = results.attrs["images_per_second"]
    return (f"{speed:,.0f} images/s. " if math.isfinite(speed) else "") + "Results, summary and figures"


if __name__ == "__main__":
    execute(main)
