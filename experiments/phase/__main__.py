"""Phase diagrams: accuracy over the plane of amplitude and period, `python -m experiments.phase`.

Every (A, T, seed) is a member of one ensemble: the whole diagram is one compiled program, on all devices there are.
"""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
import xarray as xr

from ..problems import cifar, curvature, images, spiral
from ..problems.presets import ComputeDtype, PresetName, chosen, default_name
from ..problems.spiral import Init, LossName
from ..running.errors import UsageError
from ..running.flags import LEAST, RunFlags, Seeds, parse_seeds, require
from ..running.session import Session
from ..running.task import announcement
from ..running.terminal import console, execute, tell, warn
from ..running.training import train

_CURVATURE_IMAGES = 100  # of CIFAR-10's training set, for the Hessian: a fifteenth of the time with preset quick
_AMPLITUDES = {"spiral": "1,2,5,10,20,50,100", "cifar": "1,2,5,10,20"}
_PERIODS = {"spiral": "log:50:5000:7", "cifar": "0.25ep,1ep,4ep,16ep"}
_OF_PRESET = ("epochs", "batch_size", "train_examples", "validation_examples", "evaluations", "compute_dtype")
_OF_ONE = {  # flags that mean something for one experiment only
    "spiral": ("loss", "init", "updates"),
    "cifar": ("preset", *(name for name in _OF_PRESET if name != "evaluations"), "dataset", "data_dir"),
}


def _default(metavar: str, default: str):
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train every combination of amplitude, period and seed, and draw accuracy over the (A, T) plane.

    The static loss, A = 1, is trained once for every seed, and what each (A, T) gains over it is paired by seed. Writes
    results.nc (dimensions amplitude, period, seed), summary.md, summary.json, config.json and heat maps. A grid is a
    list (1,2,5), or log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT.
    """

    experiment: Literal["spiral", "cifar"] = "spiral"
    """The spiral in full-batch gradient descent, or Myrtle5 on CIFAR-10; the protocols are those of
    `python -m experiments.spiral` and `python -m experiments.cifar`."""
    amplitudes: Annotated[str | None, _default("GRID", "1,2,5,10,20,50,100, for CIFAR-10 1,2,5,10,20")] = None
    """Amplitudes A >= 1 of the dynamical loss."""
    periods: Annotated[str | None, _default("GRID", "log:50:5000:7, for CIFAR-10 0.25ep,1ep,4ep,16ep")] = None
    """Periods T of one class, in updates, rounded to whole ones; those of a list for CIFAR-10 are taken as they are,
    also in epochs (0.5ep)."""
    seeds: Seeds = 8
    """Members of every cell of the diagram: so many, or a slice, 8:16. Seed s has the same initial weights in all."""
    widths: Annotated[str | None, _default("GRID", "100, for CIFAR-10 the preset's")] = None
    """Units of the hidden layer, or channels. Several, for the spiral, are several diagrams, each a program."""
    learning_rates: Annotated[str | None, _default("GRID", "1, for CIFAR-10 the preset's")] = None
    """Learning rates. Several, for the spiral, are several diagrams in one program."""
    loss: LossName = "cross-entropy"
    """What is weighted, for the spiral: the paper's cross-entropy, or a squared error whose weights belong to the
    examples (squared-sample) or to the output units (squared-unit). The two squared errors are choices of ours, and at
    rate 1 they are at the edge of what is stable: take 0.3 or less."""
    init: Init = "paper"
    """Initialisation of the spiral's network: see `python -m experiments.spiral --help`."""
    updates: Annotated[int | None, _default("INT", "70,000")] = None
    """Updates on the spiral. The oscillation stops after the last whole period."""
    preset: Annotated[PresetName | None, _default("{short,quick,paper}", "quick on a CPU, else short")] = None
    """The protocol for CIFAR-10, as of `python -m experiments.cifar --help`."""
    epochs: Annotated[int | None, _default("INT", "the preset's")] = None
    """Passes over CIFAR-10's training set. The oscillation stops after 6/7 of them."""
    batch_size: Annotated[int | None, _default("INT", "the preset's")] = None
    """Images of CIFAR-10 in a minibatch."""
    train_examples: Annotated[int | None, _default("INT", "the preset's")] = None
    """Train on the first so many images of CIFAR-10."""
    validation_examples: Annotated[int | None, _default("INT", "the preset's")] = None
    """Validate on the first so many images of CIFAR-10."""
    compute_dtype: Annotated[ComputeDtype | None, _default("{float32,bfloat16}", "the preset's")] = None
    """What Myrtle5 computes in. bfloat16 is for GPUs."""
    dataset: Literal["auto", "cifar10", "digits"] = "auto"
    """For --experiment cifar: auto falls back to scikit-learn's digits, loudly, when CIFAR-10 cannot be had."""
    data_dir: Annotated[Path | None, _default("PATH", "$TFDS_DATA_DIR or ~/tensorflow_datasets")] = None
    """The tensorflow-datasets directory."""
    evaluations: Annotated[int | None, _default("INT", "20, for CIFAR-10 the preset's")] = None
    """How often the validation set is evaluated during training."""
    wave: Annotated[int | None, _default("INT", "all members, or as many as fit into memory")] = None
    """Members that are trained at a time."""
    run: tyro.conf.OmitArgPrefixes[RunFlags] = RunFlags()

    def __post_init__(self):
        parse_seeds(self.seeds)
        counts = ("evaluations", "updates", "epochs", "batch_size", "train_examples", "validation_examples", "wave")
        require(self, counts, 1, math.inf, "at least 1")
        grids = {"amplitudes": self.amplitudes, "widths": self.widths, "learning-rates": self.learning_rates}
        if self.experiment == "spiral" or ":" in (self.periods or ""):
            grids["periods"] = self.periods
        least = {"periods": "at least 2 updates", "learning-rates": "positive"}
        for flag, text in grids.items():
            if text is None:
                continue
            values = parse_grid(text, flag)
            if len(set(values)) < len(values):
                raise UsageError(f"--{flag} takes different values, got {text}.")
            low = {"periods": 2, "learning-rates": LEAST}.get(flag, 1)
            if not all(low <= value < math.inf for value in values):
                raise UsageError(f"--{flag} must be {least.get(flag, 'at least 1')}, got {text}.")
            if self.experiment == "cifar" and flag in ("widths", "learning-rates") and len(values) > 1:
                raise UsageError(f"--experiment cifar takes one width and one learning rate, got --{flag} {text}.")
        other = _OF_ONE["cifar" if self.experiment == "spiral" else "spiral"]
        usual = {field.name: field.default for field in dataclasses.fields(Config)}
        for name in other:
            if getattr(self, name) != usual[name]:
                raise UsageError(
                    f"--{name.replace('_', '-')} has no meaning for --experiment {self.experiment}: leave it out."
                )


def main(arguments: list[str] | None = None) -> bool:
    """The command. Returns whether the training was finished."""
    with Session.start(Config, "phase", sys.argv[1:] if arguments is None else arguments) as run:
        diagram = spiral_diagrams if run.config.experiment == "spiral" else cifar_diagram
        results = diagram(run)
        if run.save(results):
            console.print(f"{write_outputs(results, run.directory)}: {run.directory}")
    return run.finished


def spiral_diagrams(run: Session[Config]) -> xr.Dataset:
    """Trains a diagram for every width and learning rate: a program for a width."""
    config = run.config
    run.open("phase-spiral", "spiral", dataclasses.asdict(config))
    periods = whole(parse_grid(config.periods or _PERIODS["spiral"], "periods"))
    widths = [int(width) for width in whole(parse_grid(config.widths or "100", "widths"))]
    rates, updates = parse_grid(config.learning_rates or "1", "learning-rates"), config.updates or 70_000
    with jax.enable_x64(True):
        tasks = spiral.tasks(
            {f"width-{width}": {"init": config.init, "width": width} for width in widths},
            updates,
            config.evaluations or 20,
            {"observe": spiral.curvature, "keep_steps": False},
            amplitudes=parse_grid(config.amplitudes or _AMPLITUDES["spiral"], "amplitudes"),
            periods=periods,
            seeds=parse_seeds(config.seeds),
            learning_rates=rates,
            loss=config.loss,
        )
        console.print(announcement(tasks, f"{updates:,} updates | the spiral"))
        measured = train(tasks, **run.checkpoints, wave=config.wave)
        return spiral.results(tasks, measured, periods, config.loss)


def cifar_diagram(run: Session[Config]) -> xr.Dataset:
    """Trains the diagram of Myrtle5 on CIFAR-10, or on what stands in for it."""
    config = run.config
    text = config.periods or _PERIODS["cifar"]
    periods = [f"{T:g}" for T in whole(parse_grid(text, "periods"))] if ":" in text else text.split(",")
    given: dict[str, Any] = {name: getattr(config, name) for name in _OF_PRESET}
    if config.widths:
        (given["width"],) = [int(width) for width in whole(parse_grid(config.widths, "widths"))]
    if config.learning_rates:
        (given["learning_rate"],) = parse_grid(config.learning_rates, "learning-rates")
    given["amplitude"] = parse_grid(config.amplitudes or _AMPLITUDES["cifar"], "amplitudes")
    name = config.preset or default_name()
    data = images.load(config.dataset, config.data_dir, tell=tell)
    preset = chosen(name, data, given | {"period": tuple(periods)})
    problem = cifar.Problem.of(
        preset, data, parse_seeds(config.seeds), observe=curvature.of_step(_CURVATURE_IMAGES), keep_steps=False
    )
    configuration = dataclasses.asdict(config) | {name: getattr(preset, name) for name in _OF_PRESET}
    configuration |= problem.sizes | {"dataset": data.name, "preset": name, "curvature": _CURVATURE_IMAGES}
    run.open(f"phase-{data.name}", data.name, configuration)
    console.print(announcement([problem.task], f"{problem.work} | preset {name}"))
    return problem.results(train([problem.task], **run.checkpoints, wave=config.wave))


def parse_grid(text: str, flag: str) -> tuple[float, ...]:
    """The numbers of a list, `1,2,5`, or of a range, `log:LOW:HIGH:COUNT` or `lin:LOW:HIGH:COUNT`."""
    kind, *rest = text.split(":")
    try:
        if kind in ("log", "lin"):
            low, high, count = float(rest[0]), float(rest[1]), int(rest[2])
            if len(rest) > 3 or count < 1 or not 0 < low <= high < math.inf:
                raise ValueError
            values = np.geomspace(low, high, count) if kind == "log" else np.linspace(low, high, count)
        else:
            values = [float(number) for number in text.split(",")]
    except (ValueError, IndexError):
        raise UsageError(
            f"--{flag} takes a list such as 1,2,5 or a range such as log:50:5000:7 (or lin:), got {text!r}."
        ) from None
    # Rounded as it is printed, so that a file name, a table and the schedule have the same number.
    return tuple(float(f"{value:.6g}") for value in values)


def whole(values: tuple[float, ...]) -> tuple[float, ...]:
    """The values rounded to whole numbers, each once."""
    return tuple(float(value) for value in dict.fromkeys(round(value) for value in values))


def write_outputs(results: xr.Dataset, directory: Path) -> str:
    """Writes what is to be read and looked at, prints what it says, and returns what there is now, in words."""
    # Here: what only the end needs takes seconds to import.
    from ..results import summary, tables
    from . import figures, statistics

    summarised, lines = summary.summarise(results), statistics.markdown(results)
    tables.write_summary(summarised, results, directory, lines)
    written = figures.write(results, directory)
    for notice in summarised.notices:
        warn(notice)
    for line in lines:
        console.print(line)
    speed = float(results.attrs.get("member_updates_per_second", math.nan))
    lead = f"{speed:,.0f} member-updates/s. " if math.isfinite(speed) else ""
    return f"{lead}Results, summary and {len(written)} figures"


if __name__ == "__main__":
    execute(main)
